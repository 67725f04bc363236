"""Pictures on a node while it samples: the host's, but for the demo base, whose latents are no other model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import comfy.utils
import latent_preview
import torch
from comfy.taesd.taesd import Block, Clamp, conv
from torch import Tensor, nn

from .demo import base_part

SIZE = (3, 16)  # of its transformer: attention heads, and patches along an edge
WIDTH = 32  # channels of the demo's decoder
STAGES = (3, 3, 1, 1)  # its blocks before, between and after the upsamplings
# RGB in [-1, 1] by channel of a latent, and what is added: fitted by least squares to 160 pictures that the base draws
# with its LoRA in 4 steps. On those left out the mean error is 0.07 of the range.
FACTORS = (
    (-0.017, 0.057, 0.022),
    (0.033, 0.017, 0.082),
    (-0.037, 0.072, 0.219),
    (-0.086, -0.031, 0.075),
    (-0.014, -0.177, 0.035),
    (-0.112, 0.016, -0.085),
    (-0.145, -0.051, 0.138),
    (-0.023, 0.031, 0.013),
    (0.086, -0.085, -0.165),
    (0.020, -0.053, -0.034),
    (-0.039, -0.097, 0.105),
    (0.284, -0.004, -0.029),
    (0.057, 0.165, 0.145),
    (-0.039, 0.002, -0.140),
    (-0.089, -0.024, -0.038),
    (0.029, 0.026, 0.107),
)
BIAS = (0.223, -0.120, -0.434)


def preview_callback(model: Any, steps: int) -> Callable[..., None]:
    """A callback of the host's kind that shows progress and previews for so many steps of a host MODEL.

    The host's own but for the demo base: its factors for SD3 show that in wrong colours.
    """
    shown = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    if shown is None or not is_demo(model):
        return latent_preview.prepare_callback(model, steps)

    bar = comfy.utils.ProgressBar(steps)
    previewer = DemoPreviewer()

    def show(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        bar.update_absolute(step + 1, total, previewer.decode_latent_to_preview_image("JPEG", x0))

    return show


def set_colours(model: Any) -> None:
    """Have the host's own samplers show a host MODEL of the demo base in its colours: coarsely, since they know no
    decoder of its own."""
    if is_demo(model):
        latent_format = model.model.latent_format  # which no other model has
        latent_format.latent_rgb_factors = [list(row) for row in FACTORS]
        latent_format.latent_rgb_factors_bias = list(BIAS)


def is_demo(model: Any) -> bool:
    """Whether a host MODEL is of the demo base's size, which no other SD3 has."""
    network = getattr(model.model, "diffusion_model", None)
    return (getattr(network, "depth", None), getattr(network, "pos_embed_max_size", None)) == SIZE


class DemoPreviewer(latent_preview.LatentPreviewer):
    """The host's preview, by the demo base's own decoder."""

    def decode_latent_to_preview(self, x0: Tensor) -> Any:
        config = vae_config()
        latent = x0[:1].float().cpu() / config["scaling_factor"] + config["shift_factor"]
        with torch.no_grad():
            picture = decoder()(latent)[0].movedim(0, 2)
        return latent_preview.preview_to_image(2 * picture - 1)


@cache
def vae_config() -> dict[str, Any]:
    """What diffusers says of the demo base's VAE."""
    return json.loads((base_part("vae") / "config.json").read_text(encoding="utf-8"))


@cache
def decoder() -> nn.Sequential:
    """The demo base's decoder, latents (B, 16, h, w) to pictures (B, 3, 8 h, 8 w) in [0, 1], in fp32 on the CPU."""
    layers = [Clamp(), conv(vae_config()["latent_channels"], WIDTH), nn.ReLU()]
    for i, blocks in enumerate(STAGES):
        layers += [nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False)] if i else []
        layers += [Block(WIDTH, WIDTH) for _ in range(blocks)]
    network = nn.Sequential(*layers, conv(WIDTH, 3))

    weights = comfy.utils.load_torch_file(str(base_part("vae") / "diffusion_pytorch_model.safetensors"))
    # diffusers does not count the clamp as a layer
    parts = (name.split(".", 3) for name in weights if name.startswith("decoder.layers."))
    named = {f"{int(layer) + 1}.{rest}": weights[f"decoder.layers.{layer}.{rest}"] for _, _, layer, rest in parts}
    network.load_state_dict(named)
    return network.float().eval()
