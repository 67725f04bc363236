"""Latent consistency distillation (LCM, arXiv 2310.04378, Sec. 4; LCM-LoRA, arXiv 2311.05556): every level to x0."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from ...samplers import Schedule
from .objective import Levels, SelfConsistency, counted_from_noise


class LCM(SelfConsistency):
    """Start anywhere on the grid, neighbour one point cleaner, target x0 itself.

    The paper's skipping step k is one cell of the grid: k = 1000 / points. Its boundary terms (c_skip, c_out)
    are (1, 0) at timestep 0 and nearly (0, 1) from the next on; a jump to x0 has exactly these. As in
    LCM-LoRA, the guidance scale is drawn for each sample and is no input of the network, and the student's
    own weights make the target (the paper: an average, target_ema = 0.95).
    """

    name: Literal["lcm"] = Field(
        "lcm", description="latent consistency: every jump ends at x0; the teacher skips 1000 / points timesteps"
    )
    points: int = Field(50, description="solver points; the paper's skipping step k is 1000 / points")

    def levels(self, count: int, schedule: Schedule, progress: float, generator: torch.Generator) -> Levels:
        u = self.start(count, generator)
        return Levels(u, self.grid().previous(u), torch.zeros_like(u))

    def sampling(self) -> dict[str, Any]:
        return super().sampling() | counted_from_noise(self.points)
