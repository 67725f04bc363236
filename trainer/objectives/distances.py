"""Distances between student and target, (B, ...) -> (B,), and noise levels in the papers' units.

The papers' noise level is sigma of x0 + sigma eps (EDM's), or t with the same meaning. A schedule's point
alpha x0 + sigma eps has that level at sigma / alpha, so ticks and the papers' levels are translated into each
other here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...samplers import Schedule

# The highest noise level of the papers (arXiv 2303.01469, Sec. 3). A schedule that ends in noise alone has an
# infinite one there, which counts as this.
SIGMA_MAX = 80.0


def huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Pseudo-Huber of each element d = a - b, sqrt(d^2 + c^2) - c, meaned over the elements of a sample.

    Nearly |d| for the customary c = 0.001, which is that of LCM's code (arXiv 2310.04378). Not to be mixed up
    with `vector_huber`, whose c is for the norm of a whole sample.
    """
    return ((a - b).square() + c**2).sqrt().sub(c).flatten(1).mean(1)


def vector_huber(a: Tensor, b: Tensor) -> Tensor:
    """Pseudo-Huber of a whole sample d = a - b of D elements: sqrt(|d|^2 + c^2) - c with c = 0.00054 sqrt(D).

    Source: iCT, arXiv 2310.14189, Sec. 3.3.
    """
    d = (a - b).flatten(1)
    c = 0.00054 * d.shape[1] ** 0.5
    return (d.square().sum(1) + c**2).sqrt() - c


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean over a sample's elements of (a - b)^2."""
    return (a - b).square().flatten(1).mean(1)


def noise_level(schedule: Schedule, tick: Tensor) -> Tensor:
    """Ticks -> the papers' noise levels for data of unit spread: sigma / alpha, at most `SIGMA_MAX`."""
    ratio = schedule.sigma(tick) / schedule.alpha(tick)
    return ratio.clamp(max=SIGMA_MAX).to(tick.device)  # flow's tables are on the CPU where a device has no float64


def nearest_ticks(schedule: Schedule, sigma: Tensor) -> Tensor:
    """The papers' noise levels -> the nearest ticks from 1 to T; from `SIGMA_MAX` on T, where sampling starts."""
    ticks = torch.arange(schedule.ticks + 1)
    table = schedule.sigma(ticks) / schedule.alpha(ticks)
    above = torch.searchsorted(table, sigma.float().contiguous()).clamp(1, schedule.ticks)
    nearer_below = sigma - table[above - 1] < table[above] - sigma
    return torch.where(sigma < SIGMA_MAX, (above - nearer_below.long()).clamp(min=1), schedule.ticks)


def karras_ticks(schedule: Schedule, count: int, rho: float = 7.0) -> Tensor:
    """Karras' levels as ticks 1 to T, increasing: evenly spaced in sigma^(1/rho) (arXiv 2206.00364, Eq. 5).

    At most `count` of them: levels that round to the same tick are one.
    """
    low, high = noise_level(schedule, torch.tensor([1, schedule.ticks])).tolist()
    sigma = torch.linspace(low ** (1 / rho), high ** (1 / rho), count) ** rho
    return torch.cat([nearest_ticks(schedule, sigma[:-1]), torch.tensor([schedule.ticks])]).unique()
