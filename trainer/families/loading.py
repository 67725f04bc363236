"""Reading bases: diffusers folders, hub ids, and single .safetensors checkpoints as shared on Civitai."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, ModelMixin
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ...samplers.file_kinds import kind_of
from ...samplers.lora_file import LoraHeader, TensorInfo, file_hash, not_finite, read_header
from ...samplers.lora_modules import FLOATS
from ...samplers.texts import brief
from ..system.comfyui import hosts
from ..tiny.bundled import bundled_folder

CONFIGS = Path(__file__).parent / "configs"
TOKENIZER_REPO = "openai/clip-vit-large-patch14"
COMFYUI_CLIP = "comfy/sd1_tokenizer"  # CLIP's words in a ComfyUI
NETWORK_PREFIX = "model.diffusion_model."
VAE_PREFIXES = ("first_stage_model.", "vae.")
CLIP_PREFIXES = ("cond_stage_model.", "conditioner.", "text_encoders.clip_l.", "text_encoders.clip_g.")
SINGLE_FILES = (".safetensors", ".sft")
# Ends of the names of what stands beside quantised weights -> how these are quantised. Read without it, such a tensor
# is not the weight.
QUANTISED = {
    "scale_weight": "scaled fp8",
    "weight_scale": "scaled fp8",
    "scaled_fp8": "scaled fp8",
    "comfy_quant": "scaled fp8 or otherwise quantised",
    "SCB": "bitsandbytes int8",
    "weight_format": "bitsandbytes int8",
    "bitsandbytes__nf4": "bitsandbytes NF4",
    "bitsandbytes__fp4": "bitsandbytes FP4",
    "absmax": "bitsandbytes 4 bits",
    "quant_map": "bitsandbytes 4 bits",
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
}
POSITIONS = "position_ids"  # which older text encoders keep among their weights, as integers
TAKE_PLAIN = (
    "Give the checkpoint in fp16, bf16 or plain fp8; base.quantize makes the frozen base small when it is loaded."
)
VARIANT = re.compile(r"[^.]+\.(?P<variant>\w+?)(?:-\d+-of-\d+)?\.safetensors")  # model.fp16-00001-of-00002.safetensors
LOW = ("fp16", "bf16")
VARIANTS = ("fp32", *LOW)  # in the order in which they are taken where there are no plain weights
# Transformers before 4.56 called the argument dtype torch_dtype.
OLD_TRANSFORMERS = Version(transformers.__version__) < Version("4.56")
GET_IT = "Get the file again, or set base.config to a folder with this model's component configs."
VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


@contextmanager
def naming(place: str | Path, advice: str) -> Iterator[None]:
    """Raise ValueError that names this place where a library fails in this block at what the place holds."""
    try:
        yield
    except Exception as error:  # every library has its own
        raise ValueError(f"{place} cannot be loaded: {brief(error).rstrip('.')}. {advice}") from error


def read_config(path: Path) -> dict[str, Any]:
    """A component's config. Raises ValueError for a file that holds no JSON object."""
    with naming(path, "Get the base again."):
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    return config


def check_finite(path: str, modules: Iterable[nn.Module]) -> None:
    """Raise ValueError for a base with weights that are not finite, naming one. A billion weights take a second."""
    for module in modules:
        tensors = dict(chain(module.named_parameters(), module.named_buffers()))
        broken = not_finite(tensors.items())
        if broken:
            raise ValueError(
                f"{path} has weights that are not finite, in {len(broken)} of the tensors of its "
                f"{type(module).__name__}, such as {broken[0]}, as {tensors[broken[0]].dtype}. Every picture would be "
                "black: get the base again, or set base.dtype=fp32 if they are too large for fp16."
            )


def is_single_file(path: str) -> bool:
    """Whether a base path is that of a single file, by its name."""
    return Path(path).suffix.lower() in SINGLE_FILES


def is_hub_id(path: str) -> bool:
    """Whether a base path reads as owner/name on the hub and as nothing here."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).parent.is_dir()


def diffusers_folder(path: str, components: Iterable[str], title: str, optional: Iterable[str] = ()) -> Path:
    """The folder of a diffusers base that has these components, fetched from the hub where the path is a hub id.

    title: the family for people, for errors. optional: components to fetch that need not be there.
    Raises ValueError when a component or its config is missing, or for a file of another kind;
    FileNotFoundError when there is no such folder or hub id, or when the hub does not give it.
    """
    components = tuple(components)
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{path} {kind_of(folder)} Set base.path to a .safetensors checkpoint or a diffusers folder.")
    if not folder.is_dir():
        folder = _from_hub(path, components, tuple(optional))

    missing = [c for c in components if not (folder / c).is_dir()]
    if missing:
        raise ValueError(f"{path} is no diffusers folder of {title}: it lacks {', '.join(missing)}/.")
    configs = [_config_name(c) for c in components if not c.startswith("tokenizer")]
    missing = [name for name in configs if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{path} is not whole: it lacks {', '.join(missing)}. Get the base again.")
    return folder


def _config_name(component: str) -> str:
    return f"{component}/scheduler_config.json" if component == "scheduler" else f"{component}/config.json"


def _from_hub(path: str, components: tuple[str, ...], optional: tuple[str, ...]) -> Path:
    """Fetch these components of a hub id; returns their cached folder.

    Weights in fp16, then in bf16, are fetched only for components that have no others. Raises FileNotFoundError.
    """
    if not is_hub_id(path):
        raise FileNotFoundError(
            f"No base at {path}. Set base.path to a diffusers folder, a .safetensors checkpoint, a hub id, "
            "or a bundled tiny-sd15, tiny-sdxl, tiny-emoji."
        )
    wanted = (*components, *optional)
    patterns = ["model_index.json", "*/config.json"]
    patterns += [f"{c}/*.{kind}" for c in wanted for kind in ("json", "txt", "model", "safetensors")]
    try:
        others = [*(f"*.{variant}*" for variant in LOW), "*non_ema*"]
        folder = Path(snapshot_download(path, allow_patterns=patterns, ignore_patterns=others))
        for variant in LOW:
            bare = [c for c in wanted if (folder / c / "config.json").is_file() and not weight_files(folder / c)]
            if bare:
                patterns = [f"{c}/*.{variant}{rest}" for c in bare for rest in ("*.safetensors", "*.json")]
                folder = Path(snapshot_download(path, allow_patterns=patterns, ignore_patterns=["*non_ema*"]))
        return folder
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"The hub gives {path} only to those who accepted its licence: accept its licence at "
            f"https://huggingface.co/{path} and run hf auth login."
        ) from error
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"No base at {path}: no such folder or file here, and the hub did not give it ({type(error).__name__}). "
            "Set base.path to a diffusers folder, a .safetensors checkpoint, or a hub id that you can reach."
        ) from error


def parts_folder(
    path: Path, parts: str | None, lacking: dict[str, str], title: str, download: bool = True
) -> Path | None:
    """The folder base.parts, which supplies what a single file lacks, and perhaps tokenizers; None where it is not set.

    parts: diffusers folder, bundled base or hub id. lacking: the components that the file lacks -> their names
    for people. title: the family for people. download: whether a hub id may be fetched; else None is returned.
    Raises ValueError where something is lacking and `parts` has it not either, FileNotFoundError where there is
    no such folder.
    """
    if parts is None:
        if lacking:
            raise ValueError(
                f"{path.name} holds no {', no '.join(lacking.values())}. Give a full checkpoint, or set base.parts to "
                f"a diffusers folder of {title} that has {', '.join(f'{c}/' for c in lacking)}."
            )
        return None
    place = str(bundled_folder(parts) or parts)
    if not Path(place).is_dir() and not is_hub_id(place):
        raise FileNotFoundError(
            f"No folder at {parts}. Set base.parts to a diffusers folder of {title}, or leave it out."
        )
    if not (download or Path(place).is_dir()):
        return None
    return diffusers_folder(place, lacking, title, ("tokenizer", "tokenizer_2", "tokenizer_3"))


def load_part(root: Path, part: str, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    """Load one component of a diffusers folder as this class. Raises ValueError when it cannot be read."""
    check_weights(root, [part])
    files = weight_files(root / part)
    of_diffusers = issubclass(kind, ModelMixin)
    argument = "torch_dtype" if of_diffusers or OLD_TRANSFORMERS else "dtype"
    variant = _variant(files[0])
    options = {"use_safetensors": True, "local_files_only": True, "variant": variant, argument: dtype}
    with naming(root, f"Get its {part} again."):
        model, loading = kind.from_pretrained(root / part, output_loading_info=True, **options)
    _check_filled(model, f"{root} is not whole: its {part}", "Get the base again.")
    if loading["missing_keys"] and not of_diffusers:  # transformers has drawn these at random, with a warning alone
        with naming(root, f"Get its {part} again."):
            weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
        fill(model, weights, root / part, kind.__name__)
    # transformers keeps some weights in fp32, whatever it is asked for
    return model if of_diffusers else model.to(dtype)


def check_weights(root: Path, parts: Iterable[str]) -> None:
    """Raise ValueError for a component of a diffusers folder without weights of the kind that is read, or with
    quantised ones."""
    for part in parts:
        if "quantization_config" in (config := read_config(root / part / "config.json")):
            settings = config["quantization_config"]
            method = settings.get("quant_method") if isinstance(settings, dict) else settings
            raise ValueError(f"{root / part} holds quantised weights ({method}), which are not read. {TAKE_PLAIN}")
        files = weight_files(root / part)
        if not files:
            raise ValueError(
                f"{root / part} holds no weights in .safetensors, the only kind that is read. "
                "Get the base in that format."
            )
        for file in files:
            try:
                header = read_header(file)
            except ValueError as error:
                raise ValueError(f"{root / part} cannot be loaded: {error}") from error
            _check_floats(str(file), header.tensors)


def weight_files(folder: Path) -> list[Path]:
    """The files with a component's weights: the plain ones, or where there are none those of one variant."""
    files = [f for f in sorted(folder.glob("*.safetensors")) if _variant(f) != "non_ema"]
    kinds = {_variant(file) for file in files}
    chosen = next((kind for kind in (None, *VARIANTS, *sorted(kinds - {None})) if kind in kinds), None)
    return [file for file in files if _variant(file) == chosen]


def _variant(file: Path) -> str | None:
    """The variant that a file of weights is by its name: "fp16" of model.fp16.safetensors; None for a plain one."""
    name = VARIANT.fullmatch(file.name)
    return name and name["variant"]


def load_vae(root: Path) -> AutoencoderKL | AutoencoderTiny:
    """The VAE of a diffusers folder, in fp32."""
    kind = str(read_config(root / "vae" / "config.json").get("_class_name"))
    if kind not in VAES:
        raise ValueError(f"{root / 'vae'} is a {kind}; available: {', '.join(VAES)}.")
    return load_part(root, "vae", VAES[kind], torch.float32)


def folder_hash(root: Path, parts: Iterable[str]) -> str:
    """SHA-256 of the weight files of these components together."""
    digest = hashlib.sha256()
    for part in parts:
        for file in weight_files(root / part):
            digest.update(file_hash(file).encode())
    return digest.hexdigest()


def checkpoint_header(path: Path) -> LoraHeader:
    """The header of a single-file checkpoint.

    Raises ValueError for a file that holds no network, or quantised weights. A quantised T5 is let through: SD3 can
    do without it.
    """
    header = read_header(path)
    if not any(n.startswith(NETWORK_PREFIX) for n in header.tensors):
        raise ValueError(
            f"{path.name} is no Stable Diffusion checkpoint: it has no {NETWORK_PREFIX}* weights "
            f"(its names are like {next(iter(header.tensors), 'nothing')}). "
            "Give a full checkpoint file or a diffusers folder."
        )
    needed = (NETWORK_PREFIX, *VAE_PREFIXES, *CLIP_PREFIXES)
    _check_floats(path.name, {n: info for n, info in header.tensors.items() if n.startswith(needed)})
    return header


def _check_floats(name: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise ValueError for weights that are quantised, by what stands beside them or by their own type.

    name: of the file, for errors. tensors: those of it that a base needs.
    """
    if beside := next((n for n in tensors if n.endswith(tuple(QUANTISED))), None):
        method = next(title for end, title in QUANTISED.items() if beside.endswith(end))
        raise ValueError(f"{name} holds {method} weights (it has {beside}), which are not read. {TAKE_PLAIN}")
    weights = ((n, info) for n, info in tensors.items() if len(info.shape) > 1 and not n.endswith(POSITIONS))
    if integer := next((n for n, info in weights if info.dtype not in FLOATS), None):
        kind = tensors[integer].dtype
        raise ValueError(f"{name} holds integers for weights ({kind}: {integer}), which are not read. {TAKE_PLAIN}")


def read_tensors(path: Path, names: Iterable[str], prefix: str) -> dict[str, Tensor]:
    """The file's tensors whose names begin with a prefix, by their names without it."""
    with safe_open(path, "pt") as file:
        return {n.removeprefix(prefix): file.get_tensor(n) for n in names if n.startswith(prefix)}


def convert_part(path: Path, config: Path, part: str, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    """The network or the VAE of a single file, by diffusers' own conversion.

    config: folder of component configs. Raises ValueError for one that is not whole or of other shapes.
    """
    try:
        # the tensors, not the path: diffusers takes a file whose name ends otherwise than .safetensors for a pickle
        model = kind.from_single_file(
            load_file(path), config=str(config), subfolder=part, torch_dtype=dtype, local_files_only=True
        )
    except SingleFileComponentError as error:
        raise ValueError(
            f"{path.name} lacks a part of a full checkpoint ({error}). "
            "Give one that holds the network, the VAE and the text encoders."
        ) from error
    except (NotImplementedError, KeyError) as error:  # torch's, for weights never filled in; the conversion's
        raise ValueError(f"{path.name} lacks some of the weights of its {part}. {GET_IT}") from error
    except Exception as error:  # the conversion's, at weights of other shapes
        raise ValueError(f"{path.name}: its {part} cannot be converted ({brief(error)}). {GET_IT}") from error
    _check_filled(model, f"{path.name}: its {part}", GET_IT)
    return model


def _check_filled(model: nn.Module, name: str, advice: str) -> None:
    """Raise ValueError for weights that a library found in no file, and left on the meta device. name: for errors."""
    missing = [n for n, p in model.named_parameters() if p.is_meta]
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights, such as {missing[0]}. {advice}")


def fill(model: nn.Module, weights: dict[str, Tensor], path: Path, title: str, assign: bool = False) -> nn.Module:
    """Load weights into a text encoder, whatever this version of transformers puts before their names.

    path, title: the file and the encoder, for errors. assign: take the tensors themselves instead of copying
    their numbers, for a model on the meta device. Raises ValueError for weights that are missing or of other
    shapes.
    """
    bare = lambda name: name.removeprefix("text_model.")  # noqa: E731
    state = model.state_dict()
    names = {bare(bare_name): bare_name for bare_name in state}
    tensors = {bare(bare_name): tensor for bare_name, tensor in weights.items()}
    missing = [bare_name for bare_name in names if bare_name not in tensors and not bare_name.endswith("position_ids")]
    if missing:
        shortage = f"{len(missing)} {title} weights (such as {missing[0]})"
        raise ValueError(f"{path.name} lacks {shortage}. Get the file again.")
    wrong = [
        bare_name
        for bare_name, name in names.items()
        if bare_name in tensors and tensors[bare_name].shape != state[name].shape
    ]
    if wrong:
        mismatch = f"{wrong[0]} of shape {tuple(tensors[wrong[0]].shape)}"
        raise ValueError(f"{path.name} has {title} weights of other shapes, such as {mismatch}. {GET_IT}")
    model.load_state_dict(
        {names[bare_name]: tensor for bare_name, tensor in tensors.items() if bare_name in names},
        strict=False,
        assign=assign,
    )
    return model


def has_clip_words(folder: Path) -> bool:
    """Whether the folder itself holds a CLIP tokenizer."""
    return (folder / "tokenizer.json").is_file() or all((folder / n).is_file() for n in ("vocab.json", "merges.txt"))


def load_clip_tokenizer(folder: str | Path, base: str) -> CLIPTokenizer:
    """CLIP's tokenizer from the folder, where it holds one, else from a ComfyUI on this machine, the hub or its cache.

    base: path of the base, for errors. Raises FileNotFoundError where there is none, ValueError for a broken
    one.
    """
    folder = Path(folder)
    if has_clip_words(folder):
        with naming(f"The tokenizer in {folder}", "Get it again, or set base.tokenizer to a folder with a whole one."):
            return CLIPTokenizer.from_pretrained(folder)
    if words := next((words for host in hosts() if has_clip_words(words := host / COMFYUI_CLIP)), None):
        return CLIPTokenizer.from_pretrained(words)
    try:
        words = ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
        return CLIPTokenizer.from_pretrained(snapshot_download(TOKENIZER_REPO, allow_patterns=words))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"{Path(base).name} brings no CLIP tokenizer, and {TOKENIZER_REPO} is neither cached nor reachable, "
            "nor is there a ComfyUI (COMFYUI_PATH) that has one. Put its vocab.json and merges.txt (from the "
            "tokenizer folder of any SD1.5 diffusers model) in a folder "
            "and set base.tokenizer to that folder."
        ) from error
