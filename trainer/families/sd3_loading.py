"""Reading the parts of SD3, from a folder or a single file: transformer, VAE, text encoders, their tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, SD3Transformer2DModel
from huggingface_hub import snapshot_download
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

from ...samplers.lora_file import TensorInfo, file_hash
from ..system.comfyui import hosts
from ..tiny.bundled import bundled_folder
from . import loading
from .clip import clip_tokenizers

COMFYUI_T5 = "comfy/text_encoders/t5_tokenizer"  # T5's words in a ComfyUI
T5, T5_LENGTH, T5_REPO = "text_encoder_3", 77, "google/t5-v1_1-xxl"
COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
# component -> how the names of its weights begin in single files, and its name for people
IN_FILES = {
    "vae": (loading.VAE_PREFIXES, "VAE"),
    "text_encoder": (("text_encoders.clip_l.transformer.",), "CLIP-L text encoder"),
    "text_encoder_2": (("text_encoders.clip_g.transformer.",), "CLIP-bigG text encoder"),
    T5: (("text_encoders.t5xxl.transformer.",), "T5-XXL text encoder"),
}
BLOCKS = loading.NETWORK_PREFIX + "joint_blocks."
WITHOUT_T5 = "or base.t5=false to do without T5, as SD3 can"


@dataclass(frozen=True)
class SD3Parts:
    """The parts of one SD3, read: text encoders and tokenizers are two each, or three with T5.

    scheduler: path of the scheduler config. base_hash: see `Base`. supplied: SHA-256 of the weights that
    `base.parts` supplied, or nothing.
    """

    transformer: SD3Transformer2DModel
    vae: AutoencoderKL | AutoencoderTiny
    text_encoders: list[nn.Module]
    tokenizers: list
    scheduler: Path
    base_hash: str
    supplied: str = ""


@dataclass(frozen=True)
class SD3Places:
    """Where the parts of a single file are, before any is read.

    names: the file's tensors. network_configs, configs: folders with the transformer's config, and with all
    others. t5: whether T5 is used. missing: components that the file lacks; other: the folder that supplies
    them, if one is set and here.
    """

    names: dict[str, TensorInfo]
    network_configs: Path
    configs: Path
    t5: bool
    missing: list[str]
    other: Path | None

    @property
    def scheduler(self) -> Path:
        return self.configs / "scheduler" / "scheduler_config.json"


def find_folder(path: str, t5: bool | None) -> tuple[Path, bool]:
    """The diffusers folder of a base, and whether T5 is used: where it has one, unless `t5` says otherwise.

    Raises as `diffusers_folder`, and ValueError where `t5` asks for one that it has not.
    """
    optional = () if t5 is False else (T5, "tokenizer_3")
    root = loading.diffusers_folder(path, COMPONENTS, "SD3", optional)
    use_t5 = t5 is not False and (root / T5).is_dir()
    if t5 and not use_t5:
        raise ValueError(f"{root} has no {T5}/, the T5-XXL that base.t5=true asks for. Add it, {WITHOUT_T5}.")
    return root, use_t5


def weights_of(t5: bool) -> list[str]:
    """The components of a diffusers folder that hold weights."""
    return ["transformer", "vae", *_encoders(t5)]


def folder_parts(
    path: str, tokenizer: str | None, t5: bool | None, dtype: torch.dtype, t5_dtype: torch.dtype
) -> SD3Parts:
    """Read all parts from a diffusers folder or hub id. t5: whether with T5; None: where the folder has one."""
    root, use_t5 = find_folder(path, t5)
    encoders = _encoders(use_t5)
    return SD3Parts(
        transformer=loading.load_part(root, "transformer", SD3Transformer2DModel, dtype),
        vae=loading.load_vae(root),
        text_encoders=[_folder_encoder(root, name, t5_dtype) for name in encoders],
        tokenizers=tokenizers_from(tokenizer, [root], path, use_t5),
        scheduler=root / "scheduler" / "scheduler_config.json",
        base_hash=loading.folder_hash(root, weights_of(use_t5)),
    )


def find_in_file(
    path: Path, config: str | None, parts: str | None, t5: bool | None, download: bool = True
) -> SD3Places:
    """Find every part of a base in one .safetensors file and in the diffusers folder `parts`; none is read.

    t5: whether to use T5; None: where one of the two has it. download: whether a hub id in `parts` may be
    fetched. Raises ValueError for a file of another kind or size, and for components that are nowhere.
    """
    names = loading.checkpoint_header(path).tensors
    configs = Path(config) if config else loading.CONFIGS / "sd3"
    network_configs = Path(config) if config else loading.CONFIGS / variant(names)
    _check_size(path, names, network_configs)
    in_file = {part for part, (prefixes, _) in IN_FILES.items() if any(name.startswith(prefixes) for name in names)}
    if t5 is None:
        t5 = T5 in in_file or bool(parts) and (Path(bundled_folder(parts) or parts) / T5).is_dir()
    encoders = _encoders(t5)
    missing = [part for part in ("vae", *encoders) if part not in in_file]
    lacking = {part: "{1} ({0[0]}*)".format(*IN_FILES[part]) for part in missing}
    if T5 in missing:
        lacking[T5] += f", {WITHOUT_T5.removeprefix('or ')}"
    other = loading.parts_folder(path, parts, lacking, "SD3", download)
    return SD3Places(names, network_configs, configs, t5, missing, other)


def single_file_parts(
    path: Path,
    config: str | None,
    parts: str | None,
    tokenizer: str | None,
    t5: bool | None,
    dtype: torch.dtype,
    t5_dtype: torch.dtype,
) -> SD3Parts:
    """Read the parts from one .safetensors file, and from the diffusers folder `parts` those that it lacks.

    t5: whether with T5; None: where one of them has it.
    """
    places = find_in_file(path, config, parts, t5)
    configs = places.configs
    missing = places.missing
    other = places.other
    return SD3Parts(
        transformer=loading.convert_part(path, places.network_configs, "transformer", SD3Transformer2DModel, dtype),
        vae=loading.load_vae(other)
        if "vae" in missing
        else loading.convert_part(path, configs, "vae", AutoencoderKL, torch.float32),
        text_encoders=[
            _folder_encoder(other, part, t5_dtype)
            if part in missing
            else _file_encoder(path, places.names, part, configs, t5_dtype)
            for part in _encoders(places.t5)
        ],
        tokenizers=tokenizers_from(tokenizer, [other, configs], str(path), places.t5),
        scheduler=places.scheduler,
        base_hash=file_hash(path),
        supplied=loading.folder_hash(other, missing) if missing else "",
    )


def _encoders(t5: bool) -> list[str]:
    """The text encoders' components."""
    return ["text_encoder", "text_encoder_2", *([T5] if t5 else [])]


def variant(names: dict) -> str:
    """The folder of the transformer's config for a single file with these tensors.

    SD3.5 normalises q and k (ln_q), which SD3 does not; SD3.5-medium has a second attention (attn2) besides.
    """
    if f"{BLOCKS}0.x_block.attn2.qkv.weight" in names:
        return "sd35-medium"
    return "sd35-large" if f"{BLOCKS}0.x_block.attn.ln_q.weight" in names else "sd3"


def _check_size(path: Path, names: dict, configs: Path) -> None:
    """Raise ValueError for a transformer of another size, which would fail deep inside the conversion."""
    config = loading.read_config(configs / "transformer" / "config.json")
    blocks = len({name.removeprefix(BLOCKS).split(".")[0] for name in names if name.startswith(BLOCKS)})
    query = names.get(f"{BLOCKS}0.x_block.attn.qkv.weight")
    if query is None:
        raise ValueError(
            f"{path.name} is no SD3 checkpoint: it has no {BLOCKS}0.* weights. Leave base.family out to have it found."
        )
    wanted = config["num_layers"], config["num_attention_heads"] * config["attention_head_dim"]
    width = query.shape[-1] if query.shape else 0
    if (blocks, width) != wanted:
        raise ValueError(
            f"{path.name} has {blocks} blocks {width} wide, {configs.name} has {wanted[0]} of {wanted[1]}. "
            "Set base.config to a folder with this model's component configs."
        )


def _folder_encoder(root: Path, part: str, t5_dtype: torch.dtype) -> nn.Module:
    if part == T5:
        return loading.load_part(root, part, T5EncoderModel, t5_dtype)
    return loading.load_part(root, part, CLIPTextModelWithProjection, torch.float32)


def _file_encoder(path: Path, names: dict, part: str, configs: Path, t5_dtype: torch.dtype) -> nn.Module:
    (prefix,), title = IN_FILES[part]
    weights = loading.read_tensors(path, names, prefix)
    if part == T5:
        return _file_t5(path, weights, configs / part, t5_dtype)
    config = CLIPTextConfig.from_pretrained(configs / part)
    if part == "text_encoder":
        # SD3 takes CLIP-L's pooled output as it is; a projection that some files carry is never applied
        weights["text_projection.weight"] = torch.eye(config.projection_dim)
    return loading.fill(CLIPTextModelWithProjection(config), weights, path, title)


def _file_t5(path: Path, weights: dict, config: Path, dtype: torch.dtype) -> T5EncoderModel:
    """T5 with these weights of a single file. Raises ValueError for scaled fp8, and as `loading.fill`."""
    if any(name.endswith(tuple(loading.QUANTISED)) for name in weights):
        raise ValueError(
            f"{path.name} holds T5-XXL in scaled fp8 or otherwise quantised, which is not read. Give a file with "
            f"fp16 or plain fp8 weights, {WITHOUT_T5}."
        )
    with torch.device("meta"):  # drawing 5 billion numbers to overwrite would take minutes
        encoder = T5EncoderModel(T5Config.from_pretrained(config))
    if "shared.weight" in weights:
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    loading.fill(encoder, weights, path, IN_FILES[T5][1], assign=True).tie_weights()
    return encoder


def tokenizers_from(chosen: str | None, defaults: list[Path | None], base: str, t5: bool) -> list:
    """CLIP-L's, CLIP-bigG's and, where used, T5's tokenizer, each from the first of these folders that has it.

    Parameters and errors as of `clip_tokenizers`; FileNotFoundError where T5's is nowhere.
    """
    clips = clip_tokenizers(chosen, defaults, base)
    return [*clips, _t5_tokenizer([Path(p) for p in (chosen, *defaults) if p], base)] if t5 else clips


def _t5_tokenizer(folders: list[Path], base: str) -> T5TokenizerFast:
    """T5's tokenizer from the first of these folders that has one in tokenizer_3/, else from a ComfyUI on this machine,
    the hub or its cache."""
    folder = next((f / "tokenizer_3" for f in folders if (f / "tokenizer_3").is_dir()), None)
    folder = folder or next((words for host in hosts() if (words := host / COMFYUI_T5).is_dir()), None)
    try:
        if folder:
            return T5TokenizerFast.from_pretrained(folder)
        files = ["spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
        return T5TokenizerFast.from_pretrained(snapshot_download(T5_REPO, allow_patterns=files))
    except ImportError as error:
        raise FileNotFoundError(
            f"T5's tokenizer for {Path(base).name} is a spiece.model, which needs packages that are not installed. "
            "Run: pip install sentencepiece protobuf. Or set base.tokenizer to a folder with a tokenizer_3/ that has a "
            f"tokenizer.json, {WITHOUT_T5}."
        ) from error
    except Exception as error:  # tokenizers' own, too
        raise FileNotFoundError(
            f"{Path(base).name} brings no usable T5 tokenizer ({type(error).__name__}), and {T5_REPO} is neither "
            "cached nor reachable. Put the tokenizer_3 folder of any SD3 diffusers model (or ComfyUI's "
            "comfy/text_encoders/t5_tokenizer under that name) into a folder with CLIP's vocab.json and merges.txt and "
            f"set base.tokenizer to it, {WITHOUT_T5}."
        ) from error
