"""Progressive distillation (arXiv 2202.00512, Sec. 3): a student of half the teacher's steps, again and again."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...samplers import PhaseGrid, Schedule
from .distances import noise_level
from .objective import Distillation, Jumps, Levels


class Progressive(Distillation):
    """In each stage one jump of the student imitates two DDIM steps of its teacher; then the student is the teacher.

    The first teacher is the base, with its guidance; the last student takes `phases` steps. A student of n
    steps takes them from edge to edge of n phases. The distance is the paper's truncated-SNR loss: max(SNR,
    1) times the squared error of x0 (Sec. 4).
    """

    name: Literal["progressive"] = Field(
        "progressive",
        description="progressive distillation: two steps of the teacher in one, then it is the teacher, and again",
    )
    phases: int = Field(4, ge=1, description="steps at last, which is also the number to sample with")
    halvings: int = Field(3, ge=1, le=8, description="stages; the first teacher takes phases * 2^halvings steps")

    average_teaches: bool = Field(
        False,
        description="a later stage's teacher, and its student at first, are the average of train.ema, not the last "
        "weights",
    )

    target_network: ClassVar[bool] = False

    @model_validator(mode="after")
    def _check_stages(self):
        if self.phases * 2**self.halvings > 500:
            raise ValueError(
                f"objective.halvings = {self.halvings} from {self.phases} steps begins with "
                f"{self.phases * 2**self.halvings}, more than the 500 that leave room for two: lower it"
            )
        return self

    def grid(self) -> PhaseGrid:
        return PhaseGrid(self.points, self.phases)

    def stage(self, progress: float) -> int:
        return min(math.floor(progress * self.stage_count()), self.stage_count() - 1)

    def stage_count(self) -> int:
        return self.halvings

    def averaged_teacher(self) -> bool:
        return self.average_teaches

    def edges(self, stage: int) -> Tensor:
        """Ticks from 0 to T that the student of a stage steps on.

        They are the last student's, cut in halves once for each stage that is still to come.
        """
        edges = torch.tensor(self.grid().edges)
        for _ in range(self.halvings - 1 - stage):
            edges = torch.cat([edges, (edges[1:] + edges[:-1]) // 2]).sort().values
        return edges

    def levels(self, count: int, schedule: Schedule, progress: float, generator: torch.Generator) -> Levels:
        edges = self.edges(self.stage(progress))
        n = torch.randint(1, len(edges), (count,), generator=generator)
        return Levels(edges[n], edges[n - 1], edges[n - 1])

    def teacher_solver(self) -> tuple[str, int]:
        return "ddim", 2

    def draw_guidance(self, count: int, progress: float, generator: torch.Generator) -> Tensor | None:
        """CFG scales in the first stage alone: its student, and so every later teacher, has them in its weights."""
        return None if self.stage(progress) else super().draw_guidance(count, progress, generator)

    def distance(self, jumps: Jumps) -> Tensor:
        u, s = jumps.levels.u, jumps.levels.s
        alpha, sigma = jumps.schedule.alpha(u).to(u.device), jumps.schedule.sigma(u).to(u.device)
        alpha_s, sigma_s = jumps.schedule.alpha(s).to(u.device), jumps.schedule.sigma(s).to(u.device)

        # student and target are points at s; from one x_u they differ by this times the difference of their
        # x0
        per_x0 = alpha_s - sigma_s * alpha / sigma
        snr = noise_level(jumps.schedule, u) ** -2
        square = (jumps.student - jumps.target).square().flatten(1).mean(1)
        return snr.clamp(min=1) * square / per_x0**2

    def sampling(self) -> dict[str, Any]:
        return super().sampling() | {"mode": "deterministic", "gamma": 0.0}
