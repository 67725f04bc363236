"""Figures of edited pictures: how well the known parts are kept, how the new ones fit, how near the truth they come.

Pictures are (B, 3, H, W) in [0, 1]; figures are taken from the 8-bit picture, as it is saved, and in its
levels (0 to 255). A figure is of the whole batch, or where it says so the mean of the pictures' own.
"""

from __future__ import annotations

from math import inf, log10

import torch
import torch.nn.functional as F
from torch import Tensor

from ...samplers.operators import dilate, luminance


def as_saved(image: Tensor) -> Tensor:
    """A picture as its 8-bit file has it, in [0, 1]."""
    return image.float().clamp(0, 1).mul(255).round().div(255)


def psnr(pictures: Tensor, truth: Tensor, where: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / mean squared difference); infinite where there is none.

    where: (B, 1, H, W), the pixels that count; default: all.
    """
    squared = (_levels(pictures) - _levels(truth)).square()
    error = (squared.mean() if where is None else squared[(where > 0).expand_as(squared)].mean()).item()
    return 10 * log10(255**2 / error) if error else inf


def low_pass_psnr(pictures: Tensor, truth: Tensor, block: int) -> float:
    """PSNR in dB of the means of block x block pixels: of the layout, with the detail left out."""
    error = (F.avg_pool2d(_levels(pictures), block) - F.avg_pool2d(_levels(truth), block)).square().mean().item()
    return 10 * log10(255**2 / error) if error else inf


def pooled_error(pictures: Tensor, low: Tensor) -> float:
    """Largest difference, in levels, between the pixels of the small picture and the means of the blocks for them."""
    return (F.avg_pool2d(_levels(pictures), pictures.shape[-1] // low.shape[-1]) - _levels(low)).abs().max().item()


def luminance_error(pictures: Tensor, grey: Tensor) -> float:
    """Mean |luminance(pictures) - grey| in levels; grey: (B, 1, H, W)."""
    return (luminance(_levels(pictures)) - _levels(grey)).abs().mean().item()


def seam_ratio(pictures: Tensor, region: Tensor, near: int = 8) -> float:
    """How much more neighbouring pixels differ across a region's border than beside it: 1 is no seam to see.

    region: (B, 1, H, W), 1 is in it. Mean |difference| (over channels) of the neighbours, side by side or one
    above the other, of which one is in the region and one is not; over that of all others within `near`
    pixels of the border, on both sides. Each mean is over the whole batch, so that a picture without edges
    does no harm. By chance a picture has about its truth's own ratio.
    """
    inside = region.gt(0).float().expand(len(pictures), -1, -1, -1)
    strip = dilate(inside, near) * dilate(1 - inside, near)
    across, beside = [], []
    for axis in (-1, -2):
        change = _levels(pictures).diff(dim=axis).abs().mean(1, keepdim=True)
        border = inside.diff(dim=axis) != 0
        pairs = strip.unfold(axis, 2, 1).amin(-1) > 0
        across.append(change[border])
        beside.append(change[pairs & ~border])
    return (torch.cat(across).mean() / torch.cat(beside).mean()).item()


def chroma(pictures: Tensor) -> float:
    """Standard deviation of R - Y and B - Y in levels, the mean over the pictures. 0 is grey."""
    image = _levels(pictures)
    return (image[:, ::2] - luminance(image)).flatten(1).std(1, correction=0).mean().item()


def colourfulness(pictures: Tensor) -> float:
    """Colourfulness M3 of Hasler & Suesstrunk 2003, Sec. 6, in levels, the mean over the pictures.

    It is the spread plus 0.3 times the mean of R - G and (R + G) / 2 - B.
    """
    red, green, blue = _levels(pictures).flatten(2).unbind(1)
    opponent = torch.stack([red - green, (red + green) / 2 - blue], 1)
    return (opponent.std(2, correction=0).norm(dim=1) + 0.3 * opponent.mean(2).norm(dim=1)).mean().item()


def sharpness(pictures: Tensor) -> float:
    """Variance of the luminance's Laplacian, in squared levels, the mean over the pictures."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return F.conv2d(luminance(_levels(pictures)), kernel).flatten(1).var(1, correction=0).mean().item()


def evenness(frames: Tensor) -> float:
    """Largest over mean distance between one frame (or latent) and the next: 1 is even, n - 1 a single jump of n."""
    steps = frames.diff(dim=0).flatten(1).norm(dim=1)
    return (steps.max() / steps.mean()).item()


def _levels(image: Tensor) -> Tensor:
    """A picture in the levels of its 8-bit file, 0 to 255."""
    return as_saved(image) * 255
