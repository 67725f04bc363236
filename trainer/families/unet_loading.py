"""Reading the parts of SD1.5 and SDXL, from a folder or a single file: UNet, VAE, text encoders, their tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from torch import nn
from transformers import CLIPTextConfig

from ...samplers.lora_file import LoraHeader, file_hash
from . import loading
from .clip import clip_tokenizers
from .prediction import Finding, found_in_header


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a family, and where it is.

    component: its folder in a diffusers folder. title: its name for people. kind: its class. prefix: how the
    names of its weights begin in single files. open_clip: whether these have it under OpenCLIP's names, with
    q, k and v in one.
    """

    component: str
    title: str
    kind: type[nn.Module]
    prefix: str
    open_clip: bool = False


@dataclass(frozen=True)
class UNetParts:
    """The parts of one base, read.

    scheduler: path of the scheduler config. mark: the prediction that a single file names, for one that is
    a single file. base_hash: see `Base`. supplied: SHA-256 of the weights that `base.parts` supplied, or
    nothing.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    text_encoders: list[nn.Module]
    tokenizers: list
    scheduler: Path
    base_hash: str
    mark: Finding | None = None
    supplied: str = ""


@dataclass(frozen=True)
class UNetPlaces:
    """Where the parts of a single file are, before any is read.

    header: the file's. configs: folder of component configs. mark: the prediction that the file names. missing:
    components that it lacks; other: the folder that supplies them, if one is set and here.
    """

    header: LoraHeader
    configs: Path
    mark: Finding
    missing: list[str]
    other: Path | None

    @property
    def scheduler(self) -> Path:
        return self.configs / "scheduler" / "scheduler_config.json"


def weights_of(family) -> list[str]:
    """The components of a diffusers folder that hold weights. family: a subclass of `UNetBase`."""
    return ["unet", "vae", *(encoder.component for encoder in family.encoders)]


def find_folder(family, path: str) -> Path:
    """The diffusers folder of a base, with all that the family has. Raises as `diffusers_folder`."""
    tokenizers = [encoder.component.replace("text_encoder", "tokenizer") for encoder in family.encoders]
    return loading.diffusers_folder(path, (*weights_of(family), *tokenizers, "scheduler"), family.title)


def folder_parts(family, path: str, tokenizer: str | None, dtype: torch.dtype) -> UNetParts:
    """Read all parts from a diffusers folder or hub id. family: a subclass of `UNetBase`."""
    root = find_folder(family, path)
    return UNetParts(
        unet=loading.load_part(root, "unet", UNet2DConditionModel, dtype),
        vae=loading.load_vae(root),
        text_encoders=[loading.load_part(root, e.component, e.kind, torch.float32) for e in family.encoders],
        tokenizers=clip_tokenizers(tokenizer, [root], path)[: len(family.encoders)],
        scheduler=root / "scheduler" / "scheduler_config.json",
        base_hash=loading.folder_hash(root, weights_of(family)),
    )


def find_in_file(family, path: Path, config: str | None, parts: str | None, download: bool = True) -> UNetPlaces:
    """Find every part of a base in one .safetensors file and in the diffusers folder `parts`; none is read.

    family: a subclass of `UNetBase`. download: whether a hub id in `parts` may be fetched. Raises ValueError for
    a file of another kind, and for components that are nowhere.
    """
    header = loading.checkpoint_header(path)
    configs = Path(config) if config else family.configs
    _check_context_width(path, header.tensors, configs, family.name)
    mark = found_in_header(header)
    prefixes = {"vae": loading.VAE_PREFIXES} | {e.component: (e.prefix,) for e in family.encoders}
    titles = {"vae": "VAE"} | {e.component: e.title for e in family.encoders}
    missing = [c for c, prefix in prefixes.items() if not any(n.startswith(prefix) for n in header.tensors)]
    lacking = {c: f"{titles[c]} ({prefixes[c][0]}*)" for c in missing}
    other = loading.parts_folder(path, parts, lacking, family.title, download)
    return UNetPlaces(header, configs, mark, missing, other)


def single_file_parts(
    family, path: Path, config: str | None, parts: str | None, tokenizer: str | None, dtype: torch.dtype
) -> UNetParts:
    """Read the parts from one .safetensors file, and from the diffusers folder `parts` those that it lacks."""
    places = find_in_file(family, path, config, parts)
    configs = places.configs
    missing = places.missing
    other = places.other
    return UNetParts(
        unet=loading.convert_part(path, configs, "unet", UNet2DConditionModel, dtype),
        vae=loading.load_vae(other) if "vae" in missing else _file_vae(path, configs),
        text_encoders=[
            loading.load_part(other, e.component, e.kind, torch.float32)
            if e.component in missing
            else _file_encoder(path, places.header.tensors, e, configs)
            for e in family.encoders
        ],
        tokenizers=clip_tokenizers(tokenizer, [other, configs], str(path))[: len(family.encoders)],
        scheduler=places.scheduler,
        base_hash=file_hash(path),
        mark=places.mark,
        supplied=loading.folder_hash(other, missing) if missing else "",
    )


def _file_vae(path: Path, configs: Path) -> AutoencoderKL:
    return loading.convert_part(path, configs, "vae", AutoencoderKL, torch.float32)


def _file_encoder(path: Path, names: dict, encoder: TextEncoder, configs: Path) -> nn.Module:
    with loading.naming(configs / encoder.component, loading.GET_IT):
        model = encoder.kind(CLIPTextConfig.from_pretrained(configs / encoder.component))
    weights = loading.read_tensors(path, names, encoder.prefix)
    if encoder.open_clip:
        if (projection := weights.pop("text_projection.weight", None)) is not None:  # as a linear layer has it
            weights["text_projection"] = projection.T
        with loading.naming(path.name, loading.GET_IT):
            weights = convert_open_clip_checkpoint(model, weights, prefix="")
    return loading.fill(model, weights, path, encoder.title)


def _check_context_width(path: Path, names: dict, config: Path, family: str) -> None:
    """Raise ValueError for another kind of UNet, which would fail deep inside the conversion without saying so."""
    wanted = loading.read_config(config / "unet" / "config.json").get("cross_attention_dim")
    width = next((i.shape[-1] for n, i in names.items() if n.endswith("attn2.to_k.weight") and i.shape), None)
    if width != wanted:
        raise ValueError(
            f"{path.name} has text conditioning {width} wide, base.family {family} needs {wanted}. Set base.family and "
            "start from a preset of that family, or set base.config to a folder with this model's configs."
        )
