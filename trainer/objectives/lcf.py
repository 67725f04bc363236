"""Latent consistency fine-tuning (LCF, arXiv 2310.04378, Sec. 4.4): on one's own pictures, without a teacher."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ...samplers import PhaseGrid, Schedule
from .objective import Levels, OwnTarget


class LCF(OwnTarget):
    """Start anywhere on the grid; the neighbour, one point cleaner, is on the picture's own path, with the same noise.

    The pictures carry no guidance, so a run from the bare base forgets how to follow prompts closely: start from a
    few-step LoRA (`lora.init`), whose guidance fades slowly. With `phases` the jumps end at the edges, so that a PCM
    LoRA stays one.
    """

    name: Literal["lcf"] = "lcf"
    points: int = Field(50, description="solver points; the paper's skipping step k is 1000 / points")
    phases: int = Field(1, description="1 for LCM LoRAs and bare bases; a PCM LoRA's own number")
    needs_teacher: ClassVar[bool] = False

    def grid(self) -> PhaseGrid:
        return PhaseGrid(self.points, self.phases)

    def levels(self, count: int, schedule: Schedule, progress: float, generator: torch.Generator) -> Levels:
        u = self.start(count, generator)
        return Levels(u, self.grid().previous(u), self.grid().target(u))

    def sampling(self, fine_tuned: bool = False) -> dict[str, Any]:
        jumps = {"mode": "deterministic", "gamma": 0.0} if self.phases > 1 else {}
        return super().sampling(fine_tuned) | jumps
