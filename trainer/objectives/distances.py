"""Distances between student and target, (B, ...) -> (B,), and levels in the units that the family's papers use."""

from __future__ import annotations

import torch
from torch import Tensor

from ...samplers import Schedule

SIGMA_MAX = 80.0  # the family's highest noise level (arXiv 2303.01469, Sec. 3); pure noise stands for it too


def huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Mean over elements of sqrt(d^2 + c^2) - c: nearly |d| for the customary c = 0.001 (arXiv 2310.04378's code)."""
    return ((a - b).square() + c**2).sqrt().sub(c).flatten(1).mean(1)


def vector_huber(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(|d|^2 + c^2) - c of a whole sample of D elements, c = 0.00054 sqrt(D) (iCT, arXiv 2310.14189, Sec. 3.3)."""
    d = (a - b).flatten(1)
    c = 0.00054 * d.shape[1] ** 0.5
    return (d.square().sum(1) + c**2).sqrt() - c


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)


def noise_to_signal(schedule: Schedule, tick: Tensor) -> Tensor:
    """sigma / alpha, the papers' sigma or t for data of unit spread, at ticks; at most `SIGMA_MAX`."""
    ratio = schedule.sigma(tick) / schedule.alpha(tick)
    return ratio.clamp(max=SIGMA_MAX).to(tick.device)  # flow's tables are on the CPU where a device has no float64


def nearest_ticks(schedule: Schedule, sigma: Tensor) -> Tensor:
    """Whole ticks 1..T whose sigma / alpha is nearest; T, where sampling starts, from `SIGMA_MAX` on."""
    ticks = torch.arange(schedule.ticks + 1)
    table = schedule.sigma(ticks) / schedule.alpha(ticks)
    above = torch.searchsorted(table, sigma.float().contiguous()).clamp(1, schedule.ticks)
    nearer_below = sigma - table[above - 1] < table[above] - sigma
    return torch.where(sigma < SIGMA_MAX, (above - nearer_below.long()).clamp(min=1), schedule.ticks)


def karras_ticks(schedule: Schedule, count: int, rho: float = 7.0) -> Tensor:
    """At most `count` ticks from 1 to T, evenly spaced in sigma^(1/rho) (arXiv 2206.00364, Eq. 5); equal ones merge."""
    low, high = noise_to_signal(schedule, torch.tensor([1, schedule.ticks])).tolist()
    sigma = torch.linspace(low ** (1 / rho), high ** (1 / rho), count) ** rho
    return torch.cat([nearest_ticks(schedule, sigma[:-1]), torch.tensor([schedule.ticks])]).unique()
