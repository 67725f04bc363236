"""Diffusion and GAN in one (UFOGen, arXiv 2311.09257, Sec. 4): x0 from any level, judged after re-noising it."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...samplers import Schedule
from .distances import mean_square
from .objective import Adversarial, Levels, Objective, Pair


class UFOGen(Objective):
    """Start anywhere on the grid; the target is the picture x0 itself, so the distance is a diffusion loss.

    What makes few steps of it is the adversarial loss: the student's x0 and the picture, each with fresh noise of a
    level a quarter of the schedule below u, are told apart (Eq. 7, with the heads and the frozen body that the PCM
    objective has instead of the paper's second network). It learns from pictures, at batch sizes that the paper has
    many machines for.
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

    def distance(self, pair: Pair) -> Tensor:
        return self.reconstruction * mean_square(pair.student, pair.target)

    def judged_at(self, levels: Levels, generator: torch.Generator) -> Tensor:
        return (levels.u - self.grid().ticks // 4).clamp(min=1)
