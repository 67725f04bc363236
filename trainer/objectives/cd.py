"""Consistency distillation as first published (CM, arXiv 2303.01469, Alg. 2), on latents."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...samplers import Schedule
from .distances import huber, karras_ticks, mean_square
from .objective import Levels, Pair, SelfConsistency, Solver


class CD(SelfConsistency):
    """Start anywhere on Karras' levels, neighbour the next cleaner one by a Heun step, target x0, weight 1.

    The metric is the paper's l2 (squared) or l1; its third, LPIPS, is for pixels and says nothing about latents.
    Levels are rounded to the network's own, and beyond its noisiest there are none: `scales` (the paper's N) counts
    them before that.
    """

    name: Literal["cd"] = "cd"
    scales: int = Field(40, ge=2, le=1000, description="levels, the paper's N")
    metric: Literal["l2", "l1"] = Field(
        "l2", description="l2: mean square; l1: mean absolute, as a narrow pseudo-Huber"
    )
    solver: Solver = Field("heun", description="the teacher's; the paper's is heun, of two evaluations a step")
    target_ema: float = Field(0.95, ge=0, lt=1, description="decay of the averaged weights that make the target")

    def levels(self, count: int, schedule: Schedule, progress: float, generator: torch.Generator) -> Levels:
        ticks = torch.cat([torch.zeros(1, dtype=torch.long), karras_ticks(schedule, self.scales)])
        n = torch.randint(1, len(ticks), (count,), generator=generator)
        return Levels(ticks[n], ticks[n - 1], torch.zeros_like(n))

    def distance(self, pair: Pair) -> Tensor:
        if self.metric == "l1":
            return huber(pair.student, pair.target, self.huber_c)
        return mean_square(pair.student, pair.target)
