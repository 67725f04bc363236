"""Trajectory consistency (TCD, arXiv 2402.19159, Sec. 4.1), and CTM's way to it (arXiv 2310.02279), on latents."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ...samplers import Schedule
from .objective import Levels, SelfConsistency, counted_from_noise


class TCD(SelfConsistency):
    """Start anywhere on the grid, neighbour one point cleaner, target any point from the neighbour down to x0.

    So one LoRA can take jumps of every length, which its sampler needs: with gamma it jumps below the next
    level and puts noise on again. The jump is the first-order one, the paper's TCF(1), which needs no second
    time input.
    """

    name: Literal["tcd"] = Field("tcd", description="trajectory consistency: a jump ends anywhere below its start")
    points: int = Field(50, description="solver points; the paper's skipping step k is 1000 / points")

    gamma: ClassVar[float] = 0.3

    def levels(self, count: int, schedule: Schedule, progress: float, generator: torch.Generator) -> Levels:
        u = self.start(count, generator)
        r = self.grid().previous(u)
        return Levels(u, r, self.point_between(torch.zeros_like(r), r, generator))

    def sampling(self) -> dict[str, Any]:
        return super().sampling() | counted_from_noise(self.points)
