"""Trajectory distribution matching (TDM, arXiv 2503.06674, Sec. 4): the student's trajectory, phase by phase."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...samplers import PhaseGrid
from ...samplers.schedule import rows
from .distances import noise_level
from .matching import HIGHEST, LEAST, Criticised, Matching, Region


class TDM(Matching):
    """Each jump's landing at the clean edge of its phase is re-noised within the phase, and matched there.

    The student is sampled as PCM is, from edge to edge without fresh noise; its phases' levels do not overlap, so
    that one critic serves all. The critic's target is the student's x0 as in the paper's code, with its
    importance weight: how likely the noise that a point holds beside that x0 is, over the noise that was drawn.
    With `critic_target` score it is the exact denoising target of the landing instead, whose optimum is the
    student's score; both are one at x0.
    """

    name: Literal["tdm"] = Field(
        "tdm", description="distribution matching along the trajectory: every landing, re-noised within its phase"
    )
    phases: int = Field(4, description="phases, which is also the number of steps to sample with")
    landing: Literal["edge", "anywhere"] = Field(
        "edge", description="where the jumps that are matched land: on the clean edge of the phase, or anywhere in it"
    )
    critic_target: Literal["x0", "score"] = Field(
        "x0", description="what the critic learns: the student's x0, or the exact score of the landings"
    )
    importance: bool = Field(
        True, description="critic_target x0: weigh points by how likely the noise beside the student's x0 is"
    )

    gamma: ClassVar[float] = 0.0
    usual_levels: ClassVar[Region] = "phase"

    @model_validator(mode="after")
    def _check_phases(self):
        if self.phases < 2:
            raise ValueError(
                f"objective.phases = {self.phases} has no trajectory for tdm to match: with one step it is dmd. Set "
                "objective.name=dmd objective.steps=1, or objective.phases to 2 or more"
            )
        return self

    def grid(self) -> PhaseGrid:
        return PhaseGrid(self.points, self.phases)

    def starts(self) -> tuple[int, ...]:
        return self.grid().edges[:0:-1]

    def landings(self, count: int, generator: torch.Generator) -> Tensor:
        edges = torch.tensor(self.grid().edges[-2::-1]).expand(count, -1)
        if self.landing == "edge":
            return edges
        room = (torch.tensor(self.starts()).clamp(max=HIGHEST) - edges - LEAST).clamp(min=0)
        return edges + (torch.rand(edges.shape, generator=generator) * (room + 1)).long()

    def critic_loss(self, seen: Criticised) -> Tensor:
        if self.critic_target == "score":
            return self._score_loss(seen)
        if not self.importance:
            return super().critic_loss(seen)
        alpha, sigma = (rows(c(seen.tick), seen.x0) for c in (seen.schedule.alpha, seen.schedule.sigma))
        beside = (seen.point - alpha * seen.x0) / sigma
        likely, drawn = (noise.square().flatten(1).mean(1) for noise in (beside, seen.noise))
        return torch.exp((drawn - likely) / 2) * super().critic_loss(seen)

    def _score_loss(self, seen: Criticised) -> Tensor:
        """(B,) as `critic_loss`, with the x0 that the landing's own noise stands for; its spread, which grows where
        little noise was put on, is divided out."""
        schedule = seen.schedule
        alpha, sigma = schedule.alpha(seen.tick), schedule.sigma(seen.tick)
        kept = alpha / schedule.alpha(seen.s) * schedule.sigma(seen.s)
        added = ((sigma - kept) * (sigma + kept)).clamp(min=0).sqrt()
        of_noise, whole = rows(sigma**2 / added, seen.point), rows(alpha, seen.point)
        target = (seen.point - of_noise * seen.noise) / whole

        snr = noise_level(schedule, seen.tick) ** -2
        weight = snr.clamp(max=self.min_snr) * (added / sigma) ** 2
        return weight * (seen.prediction - target).square().flatten(1).mean(1)
