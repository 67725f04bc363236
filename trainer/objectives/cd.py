"""Consistency distillation as first published (CM, arXiv 2303.01469, Alg. 2), on latents."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...samplers import Schedule
from .distances import huber, karras_ticks, mean_square
from .objective import Jumps, Levels, SelfConsistency, Solver


class CD(SelfConsistency):
    """Start anywhere on Karras' levels, neighbour the next cleaner one by a step of Heun's rule, target x0, weight 1.

    The metric is the paper's l2 (squared) or l1; its third, LPIPS, is for pixels and says nothing about
    latents. Levels are rounded to the network's own. The clean end lies below the `scales` levels; the
    paper's N counts it as one of them. Heun's rule is taken on x0 (see `training/engine.py`), in the paper on
    dx/dsigma.
    """

    name: Literal["cd"] = Field(
        "cd",
        description="consistency distillation as first published: Heun's method, Karras' levels, an averaged target",
    )
    scales: int = Field(40, ge=2, le=1000, description="levels above the clean end, the paper's N - 1")
    huber_c: float | None = Field(
        None, gt=0, description="metric l1: where it turns from square to linear; default 1e-3"
    )
    metric: Literal["l2", "l1"] = Field(
        "l2", description="l2: mean square; l1: mean absolute, as a narrow pseudo-Huber"
    )
    solver: Solver = Field("heun", description="the teacher's solver; the paper's is heun, of two evaluations a step")
    target_ema: float = Field(0.95, ge=0, lt=1, description="decay of the averaged weights that make the target")

    @model_validator(mode="after")
    def _check_metric(self):
        if self.huber_c is not None and self.metric == "l2":
            raise ValueError("objective.huber_c is of the metric l1, and objective.metric is l2. Leave it out")
        return self

    def levels(self, count: int, schedule: Schedule, progress: float, generator: torch.Generator) -> Levels:
        ticks = torch.cat([torch.zeros(1, dtype=torch.long), karras_ticks(schedule, self.scales)])
        n = torch.randint(1, len(ticks), (count,), generator=generator)  # the paper's n + 1; n - 1 is its n
        return Levels(ticks[n], ticks[n - 1], torch.zeros_like(n))

    def distance(self, jumps: Jumps) -> Tensor:
        if self.metric == "l1":
            return huber(*self.compared(jumps), self.huber_c or 1e-3)
        return mean_square(*self.compared(jumps))
