"""Phased consistency (PCM, arXiv 2405.18407, Sec. 3.1, 3.2): every point of a phase is mapped to its clean edge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...samplers import PhaseGrid


@dataclass(frozen=True)
class PCM:
    """Start anywhere on the grid, neighbour one point cleaner, target the edge of the start's phase.

    The target comes from the teacher's solver step and the student itself without gradient; the distance is the
    pseudo-Huber of each element (Eq. 10's d, c = 0.001 in the published runs), compared at the edge and unweighted.

    guidance: CFG range of the teacher's step, drawn per sample; None: its conditional output alone (normalcfg).
    prompt_dropout: share of the samples that learn without their prompt.
    min_alpha: the least divisor of the student's and the target's x0 (Eq. 39), for one phase; 0: alpha itself.
    """

    grid: PhaseGrid
    guidance: tuple[float, float] | None
    prompt_dropout: float = 0.0
    min_alpha: float = 0.0
    huber_c: float = 1e-3

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """(B,) start ticks u, uniform on the solver points."""
        points = self.grid.start_ticks()
        return points[torch.randint(len(points), (count,), generator=generator)]

    def neighbour(self, start: Tensor) -> Tensor:
        """(B,) ticks r where the teacher's one solver step lands."""
        return self.grid.previous(start)

    def target(self, start: Tensor) -> Tensor:
        """(B,) ticks s that both sides jump to."""
        return self.grid.target(start)

    def judged_at(self, start: Tensor, generator: torch.Generator) -> Tensor:
        """(B,) ticks that a discriminator's inputs are noised to: uniform on the solver points of the start's phase."""
        low, points = self.grid.target(start), self.grid.start_ticks()
        inside = self.grid.target(points) == low[:, None]
        return points[torch.multinomial(inside.double(), 1, generator=generator).squeeze(1)]

    def draw_guidance(self, count: int, generator: torch.Generator) -> Tensor | None:
        """(B,) CFG scales of the teacher's step; None without guidance."""
        if self.guidance is None:
            return None
        low, high = self.guidance
        return low + (high - low) * torch.rand(count, generator=generator)

    def draw_dropped(self, count: int, generator: torch.Generator) -> Tensor:
        """(B,) booleans: which samples lose their prompt."""
        return torch.rand(count, generator=generator) < self.prompt_dropout

    def distance(self, student: Tensor, target: Tensor) -> Tensor:
        """(B,) mean over elements of sqrt(d^2 + c^2) - c."""
        c = self.huber_c
        return ((student - target).square() + c**2).sqrt().sub(c).flatten(1).mean(1)
