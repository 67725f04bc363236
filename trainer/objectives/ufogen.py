"""Diffusion and GAN in one (UFOGen, arXiv 2311.09257, Sec. 4): x0 from any level, judged after re-noising it."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...samplers import Schedule
from .distances import mean_square
from .objective import Adversarial, Jumps, Levels, Objective


class UFOGen(Objective):
    """Start anywhere on the grid; the target is the picture x0 itself, so the distance is a diffusion loss.

    The adversarial loss is what makes it sample in few steps: a discriminator tells the student's x0 and the
    picture apart, each with fresh noise of a level a quarter of the schedule below u (Eq. 7). It is PCM's,
    heads on the frozen base, in place of the paper's second network. It learns from pictures, at batch sizes
    that the paper has many machines for.
    """

    name: Literal["ufogen"] = Field(
        "ufogen", description="diffusion and GAN in one: x0 from any level, judged after re-noising it"
    )
    reconstruction: float = Field(1.0, gt=0, description="weight of the distance, beside adversarial.weight")

    needs_teacher: ClassVar[bool] = False
    target_network: ClassVar[bool] = False
    adversarial: ClassVar[Adversarial] = "required"

    def levels(self, count: int, schedule: Schedule, progress: float, generator: torch.Generator) -> Levels:
        u = self.start(count, generator)
        return Levels(u, torch.zeros_like(u), torch.zeros_like(u))

    def distance(self, jumps: Jumps) -> Tensor:
        return self.reconstruction * mean_square(jumps.student, jumps.target)

    def judged_at(self, levels: Levels, generator: torch.Generator) -> Tensor:
        """A quarter of the schedule below the start, ticks (B,), at least 1."""
        return (levels.u - self.grid().ticks // 4).clamp(min=1)
