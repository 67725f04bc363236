"""The baselines of edits: inpainting by a mask on the latents, as ComfyUI does it, and filters of any program."""

from __future__ import annotations

from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageFilter
from torch import Tensor

from ...samplers import sample_phased
from ...samplers.editing import noised
from ..families import Base, Condition
from ..families.generate import sampling_model, unit_noise
from ..pictures import to_image


def latent_mask(
    base: Base,
    condition: Condition,
    null: Condition,
    known: Tensor,
    cells: Tensor,
    ticks: tuple[int, ...],
    guidance: float = 1.0,
    gamma: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Latents (B, C, h, w) inpainted as the host does with a "noise_mask" (KSampler: euler, or lcm for gamma 1).

    known: (B, C, h, w) the encoded picture. cells: (B, 1, h, w) in [0, 1], how far to draw each (`cells_of`).
    Before every evaluation the known part of x is the encoded picture with one and the same noise; after it,
    the known part of x0 is the encoded picture. The rest is as in `generate`, with the adapter as it stands.
    """
    schedule = base.schedule
    sigmas = schedule.k_sigma(torch.tensor(ticks))
    noise = unit_noise(known.shape, seed)
    unmasked = sampling_model(base, condition, null, guidance)

    def model(x: Tensor, sigma: Tensor, **_) -> Tensor:
        level = sigma.view(-1, 1, 1, 1)
        noised_known = schedule.k_alpha(level) * known + level * noise
        return cells * unmasked(cells * x + (1 - cells) * noised_known, sigma) + (1 - cells) * known

    x = noised(known, noise, sigmas[0], schedule)
    return sample_phased(model, x, sigmas, schedule=schedule, gamma=gamma, extra_args={"seed": seed})


def cells_of(mask: Tensor, latents: Tensor) -> Tensor:
    """(B, 1, h, w) the mask (B, 1, H, W) at the latents' size, by the host's own way: bilinear, which skips pixels."""
    return F.interpolate(mask, latents.shape[-2:], mode="bilinear").expand(len(latents), -1, -1, -1)


def greyed(picture: Tensor, mask: Tensor, grow: int = 6) -> tuple[Tensor, Tensor]:
    """(picture, mask) of the host's VAEEncodeForInpaint: the picture that it encodes, grey in the mask, and
    the grown mask that it hands on."""
    height, width = mask.shape[-2:]
    kernel = torch.ones(1, 1, grow, grow)
    grown = F.conv2d(mask.round(), kernel, padding=ceil((grow - 1) / 2)).clamp(0, 1)[..., :height, :width]
    return (picture - 0.5) * (1 - mask.round()) + 0.5, grown.round()


def filtered(pictures: Tensor, by: ImageFilter.Filter) -> Tensor:
    """(B, 3, H, W) pictures through one of Pillow's filters, in 8 bits."""
    return torch.stack([torch.from_numpy(np.array(to_image(p).filter(by))).permute(2, 0, 1) / 255 for p in pictures])
