"""Reading bases: diffusers folders, hub ids, and single .safetensors checkpoints as shared on Civitai."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
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
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ...samplers.lora_file import LoraHeader, file_hash, not_finite, read_header
from ...samplers.texts import brief
from ..tiny.bundled import bundled_folder

CONFIGS = Path(__file__).parent / "configs"
TOKENIZER_REPO = "openai/clip-vit-large-patch14"
NETWORK_PREFIX = "model.diffusion_model."
VAE_PREFIXES = ("first_stage_model.", "vae.")
CLIP_PREFIXES = ("cond_stage_model.", "conditioner.", "text_encoders.clip_l.", "text_encoders.clip_g.")
# Ends of the names that only quantised weights have beside them: read without, these are anything but the weights.
SCALES = ("scale_weight", "weight_scale", "scaled_fp8", "comfy_quant")
OLD_TRANSFORMERS = Version(transformers.__version__) < Version("4.56")  # which called dtype torch_dtype
GET_IT = "Get the file again, or set base.config to a folder with this model's component configs."
VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


@contextmanager
def naming(place: str | Path, advice: str) -> Iterator[None]:
    """Raise ValueError that names this place where a library fails at what is in it, which each does in its own way."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{place} cannot be loaded: {brief(error).rstrip('.')}. {advice}") from error


def read_config(path: Path) -> dict[str, Any]:
    """A component's config. Raises ValueError for a file that holds no JSON object."""
    with naming(path, "Get the base again."):
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    return config


def check_finite(path: str, modules: Iterable[nn.Module]) -> None:
    """Raise ValueError for a base with weights that are not finite, naming one; a billion take about a second."""
    for module in modules:
        tensors = dict(chain(module.named_parameters(), module.named_buffers()))
        found = not_finite(tensors.items())
        if found:
            raise ValueError(
                f"{path} has weights that are not finite, in {len(found)} of the tensors of its "
                f"{type(module).__name__}, such as {found[0]}, as {tensors[found[0]].dtype}. Every picture would be "
                "black: get the base again, or set base.dtype=fp32 if they are too large for fp16."
            )


def is_hub_id(path: str) -> bool:
    """Whether a base path reads as owner/name on the hub and as nothing here."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).parent.is_dir()


def diffusers_folder(path: str, components: Iterable[str], title: str, optional: Iterable[str] = ()) -> Path:
    """The folder of a diffusers base that has these components, brought from the hub where the path is a hub id.

    optional: components to bring along that need not be there.

    Raises ValueError when a component or its config is missing, or for a file of another kind; FileNotFoundError when
    there is no such folder or hub id, or when the hub does not give it.
    """
    components, folder = tuple(components), Path(path)
    if folder.is_file():
        raise ValueError(
            f"{path} is a file of a kind that is not read. Convert it to a .safetensors checkpoint (ComfyUI's and "
            "kohya's tools do that for .ckpt), and set base.path to that."
        )
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
    """The cached folder of a hub id; of components whose weights are there in fp16 alone, these."""
    if not is_hub_id(path):
        raise FileNotFoundError(
            f"No base at {path}. Set base.path to a diffusers folder, a .safetensors checkpoint, a hub id, "
            "or a bundled tiny-sd15, tiny-sdxl, tiny-sd3."
        )
    wanted = (*components, *optional)
    patterns = ["model_index.json", "*/config.json"]
    patterns += [f"{c}/*.{kind}" for c in wanted for kind in ("json", "txt", "model", "safetensors")]
    try:
        folder = Path(snapshot_download(path, allow_patterns=patterns, ignore_patterns=["*.fp16*", "*non_ema*"]))
        bare = [c for c in wanted if (folder / c / "config.json").is_file() and not weight_files(folder / c)]
        if bare:
            patterns = [f"{c}/*.fp16{rest}" for c in bare for rest in ("*.safetensors", "*.json")]
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
    """The folder that supplies what a single file has not, and its tokenizers if it has any; None where none is set.

    parts: diffusers folder, bundled base or hub id. lacking: component -> what it is, for people. download: whether a
    hub id may be brought here; else it is None.
    Raises ValueError where something is lacking and `parts` has it not either.
    """
    if parts is None:
        if lacking:
            raise ValueError(
                f"{path.name} holds no {', no '.join(lacking.values())}. Give a full checkpoint, or set base.parts to "
                f"a diffusers folder of {title} that has {', '.join(f'{c}/' for c in lacking)}."
            )
        return None
    where = str(bundled_folder(parts) or parts)
    if not Path(where).is_dir() and not is_hub_id(where):
        raise FileNotFoundError(
            f"No folder at {parts}. Set base.parts to a diffusers folder of {title}, or leave it out."
        )
    if not (download or Path(where).is_dir()):
        return None
    return diffusers_folder(where, lacking, title, ("tokenizer", "tokenizer_2", "tokenizer_3"))


def load_part(root: Path, part: str, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    """One component of a diffusers folder. Raises ValueError when it cannot be read."""
    check_weights(root, [part])
    files = weight_files(root / part)
    of_diffusers = issubclass(kind, ModelMixin)
    name = "torch_dtype" if of_diffusers or OLD_TRANSFORMERS else "dtype"
    variant = "fp16" if _is_fp16(files[0]) else None
    with naming(root, f"Get its {part} again."):
        model = kind.from_pretrained(
            root / part, use_safetensors=True, local_files_only=True, variant=variant, **{name: dtype}
        )
    _check_filled(model, f"{root} is not whole: its {part}", "Get the base again.")
    return model if of_diffusers else model.to(dtype)  # what transformers keeps in fp32 too


def check_weights(root: Path, parts: Iterable[str]) -> None:
    """Raise ValueError for a component of a diffusers folder without weights of the kind that is read."""
    for part in parts:
        if not weight_files(root / part):
            raise ValueError(
                f"{root / part} holds no weights in .safetensors, the only kind that is read. "
                "Get the base in that format."
            )


def weight_files(folder: Path) -> list[Path]:
    """The files of a component's weights: the plain ones, or where there are none those in fp16."""
    files = [f for f in sorted(folder.glob("*.safetensors")) if "non_ema" not in f.name]
    return [f for f in files if not _is_fp16(f)] or files


def _is_fp16(file: Path) -> bool:
    return ".fp16" in file.name


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
    """The header of a single-file checkpoint; ValueError when it holds no network, or one in scaled fp8.

    A T5 in scaled fp8 is let through: SD3 can do without it.
    """
    header = read_header(path)
    if not any(n.startswith(NETWORK_PREFIX) for n in header.tensors):
        raise ValueError(
            f"{path.name} is no Stable Diffusion checkpoint: it has no {NETWORK_PREFIX}* weights "
            f"(its names are like {next(iter(header.tensors), 'nothing')}). "
            "Give a full checkpoint file or a diffusers folder."
        )
    read = (NETWORK_PREFIX, *VAE_PREFIXES, *CLIP_PREFIXES)
    scale = next((n for n in header.tensors if n.startswith(read) and n.endswith(SCALES)), None)
    if scale:
        raise ValueError(
            f"{path.name} holds scaled fp8 or other quantised weights (it has {scale}), which are not read. "
            "Give the checkpoint in fp16, bf16 or plain fp8."
        )
    return header


def read_tensors(path: Path, names: Iterable[str], prefix: str) -> dict[str, Tensor]:
    """The file's tensors under a prefix, which is taken off."""
    with safe_open(path, "pt") as file:
        return {n.removeprefix(prefix): file.get_tensor(n) for n in names if n.startswith(prefix)}


def convert_part(path: Path, config: Path, part: str, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    """Network or VAE of a single file, by diffusers' own conversion. Raises ValueError for one that is not whole."""
    try:
        model = kind.from_single_file(
            str(path), config=str(config), subfolder=part, torch_dtype=dtype, local_files_only=True
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


def _check_filled(model: nn.Module, what: str, advice: str) -> None:
    """Raise ValueError for weights that a library found in no file, and left on the meta device."""
    missing = [n for n, p in model.named_parameters() if p.is_meta]
    if missing:
        raise ValueError(f"{what} lacks {len(missing)} weights, such as {missing[0]}. {advice}")


def fill(model: nn.Module, weights: dict[str, Tensor], path: Path, what: str, assign: bool = False) -> nn.Module:
    """Load a text encoder's weights, whatever this version of transformers puts before their names.

    assign: make them the model's own, which may be on the meta device, instead of copying them.
    Raises ValueError when any is missing.
    """
    bare = lambda name: name.removeprefix("text_model.")  # noqa: E731
    state = model.state_dict()
    own = {bare(k): k for k in state}
    found = {bare(k): v for k, v in weights.items()}
    missing = [k for k in own if k not in found and not k.endswith("position_ids")]
    if missing:
        some = f"{len(missing)} {what} weights (such as {missing[0]})"
        raise ValueError(f"{path.name} lacks {some}. Get the file again.")
    wrong = [k for k, name in own.items() if k in found and found[k].shape != state[name].shape]
    if wrong:
        told = f"{wrong[0]} of shape {tuple(found[wrong[0]].shape)}"
        raise ValueError(f"{path.name} has {what} weights of other shapes, such as {told}. {GET_IT}")
    model.load_state_dict({own[k]: v for k, v in found.items() if k in own}, strict=False, assign=assign)
    return model


def has_clip_words(folder: Path) -> bool:
    """Whether the folder itself holds a CLIP tokenizer."""
    return (folder / "tokenizer.json").is_file() or all((folder / n).is_file() for n in ("vocab.json", "merges.txt"))


def load_clip_tokenizer(folder: str | Path, base: str) -> CLIPTokenizer:
    """From the folder, where it holds one, else from the hub's cache."""
    folder = Path(folder)
    if has_clip_words(folder):
        with naming(f"The tokenizer in {folder}", "Get it again, or set base.tokenizer to a folder with a whole one."):
            return CLIPTokenizer.from_pretrained(folder)
    try:
        words = ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
        return CLIPTokenizer.from_pretrained(snapshot_download(TOKENIZER_REPO, allow_patterns=words))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"{Path(base).name} brings no CLIP tokenizer, and {TOKENIZER_REPO} is neither cached nor reachable. "
            "Put its vocab.json and merges.txt (from the tokenizer folder of any SD1.5 diffusers model) in a folder "
            "and set base.tokenizer to that folder."
        ) from error
