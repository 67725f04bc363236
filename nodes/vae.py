"""The host's VAE in an edit: whole, never in tiles where steps build on it, and in memory beside the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management as memory
import torch
from torch import Tensor

from ..samplers.editing import CELL
from ..samplers.sampling import Projection
from . import inputs
from .host import warned

# Latent cells, as the host's own fallback takes them.
TILE = 64
OVERLAP = 16


class Tiled(RuntimeError):
    """Raised where the host would go over to tiles because memory has run out."""


@dataclass(frozen=True)
class HostVAE:
    """A host VAE as a `Codec`: pictures (B, 3, H, W), and latents as the host stores them."""

    vae: Any

    def encode(self, pixels: Tensor) -> Tensor:
        memory.throw_exception_if_processing_interrupted()
        images = pixels.movedim(1, -1)
        # A VAE for video would take a batch of pictures for the frames of one clip.
        parts = images.split(1) if getattr(self.vae, "latent_dim", 2) == 3 else (images,)
        return torch.cat([self.vae.encode(part) for part in parts]).to(pixels.device)

    def decode(self, latents: Tensor) -> Tensor:
        memory.throw_exception_if_processing_interrupted()
        return pictures(self.vae.decode(latents)).to(latents.device)


@dataclass(frozen=True)
class TiledVAE(HostVAE):
    """A `HostVAE` that decodes in tiles that overlap."""

    def decode(self, latents: Tensor) -> Tensor:
        pixels = self.vae.decode_tiled(latents, tile_x=TILE, tile_y=TILE, overlap=OVERLAP)
        return pictures(pixels).to(latents.device)


def pictures(images: Tensor) -> Tensor:
    """What a host VAE decodes, (B, H, W, C) or of clips (B, T, H, W, C), as pictures (B or B * T, C, H, W)."""
    return images.flatten(0, -4).movedim(-1, 1)


@dataclass(frozen=True)
class ModelVAE(HostVAE):
    """A `HostVAE` for latents as a BaseModel works on them, not as the host stores them: scaled and shifted."""

    model: Any

    def encode(self, pixels: Tensor) -> Tensor:
        return self.model.process_latent_in(super().encode(pixels).float())

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(self.model.process_latent_out(latents))


def beside_model(project: Projection, guider: Any, vae: Any, shape: tuple[int, ...]) -> Projection:
    """`project` with the VAE loaded beside every model that the guider evaluates.

    shape: of the latents. The host loads models for sampling once, before the first step. A VAE that is used
    between steps may push them out, so they are loaded again where they have lost weights, and only there:
    loading takes time.
    """
    models = [guider.model_patcher, *getattr(guider, "loaded_models", [])]
    needed = guider.inner_model.memory_required([2 * shape[0], *shape[1:]])  # both prompts in one batch
    # A VAE on another device, such as the CPU, takes no room beside the model.
    beside = vae.memory_used_decode(shape, vae.vae_dtype) if vae.device == guider.model_patcher.load_device else 0
    memory.load_models_gpu([*models, vae.patcher], memory_required=max(needed, beside))

    def projected(x0: Tensor, steps_left: int) -> Tensor:
        sizes = [model.loaded_size() for model in models]
        x0 = project(x0, steps_left)
        if steps_left and any(model.loaded_size() < size for model, size in zip(models, sizes, strict=True)):
            memory.load_models_gpu(models, memory_required=needed)
        return x0

    return projected


def whole(vae: Any) -> Any:
    """A copy of a host VAE that raises `Tiled` where the VAE would go over to tiles with no more than a log line."""

    def refuse(*args: Any, **keywords: Any) -> None:
        raise Tiled(
            "The VAE ran out of memory, and in tiles it would draw their seams into every step. Take a small VAE such "
            "as TAESD for the steps, or a smaller picture."
        )

    copied = copy.copy(vae)
    for name in dir(vae):
        if "code_tiled" in name:  # decode_tiled, encode_tiled, and those for one and three dimensions
            setattr(copied, name, refuse)
    return copied


def decode_last(vae: Any, last_decode: str, decode: Callable[[HostVAE], Tensor]) -> tuple[Tensor, list[str]]:
    """The result of `decode`, and a sentence where memory ran out and the VAE had to go over to tiles.

    vae: a host VAE. last_decode: one of `inputs.LAST_DECODES`. decode: uses
    the `HostVAE` that it is called with.
    Raises ValueError for a last_decode that is none of `inputs.LAST_DECODES`.
    """
    inputs.check("last_decode", last_decode, inputs.LAST_DECODES)
    if last_decode == "tiled":
        return decode(TiledVAE(vae)), []
    try:
        return decode(HostVAE(whole(vae))), []
    except Tiled:
        notes = warned(["Memory ran out: the last decode is tiled."])
    # Outside of the except, where the exception would keep the failed decode's tensors alive.
    return decode(TiledVAE(vae)), notes


def check_family(vae: Any, model: Any) -> None:
    """Raise ValueError for a VAE whose latents have not the channels that a host MODEL works on."""
    channels = model.get_model_object("latent_format").latent_channels
    if vae.latent_channels != channels:
        raise ValueError(
            f"The VAE's latents have {vae.latent_channels} channels, the model's {channels}: "
            "use the VAE of the model's own family."
        )


def check_pictures(model: Any) -> None:
    """Raise ValueError for a host MODEL whose latents are not of pictures, in cells of 8 x 8 pixels as edits go by."""
    latent_format = model.get_model_object("latent_format")
    cell = getattr(latent_format, "spacial_downscale_ratio", CELL)  # 0.3.64 has none
    if getattr(latent_format, "latent_dimensions", 2) == 1 or cell != CELL:
        kind = f"cells of {cell} pixels" if cell != CELL else "no picture"
        raise ValueError(
            f"Edits are made in latents with cells of {CELL} pixels, and this model's have {kind}: take a model such "
            "as SD1.5, SDXL, SD3, FLUX.1, Qwen-Image or Z-Image, or Sample PCM with VAE Encode and a mask."
        )
