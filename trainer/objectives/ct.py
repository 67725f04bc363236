"""Consistency training without a teacher (CT), with the improvements of iCT (arXiv 2310.14189) and ECT (2406.14548)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...samplers import Schedule
from .distances import SIGMA_MAX, karras_ticks, nearest_ticks, noise_level, vector_huber
from .objective import FromNoise, Jumps, Levels


class CT(FromNoise):
    """The neighbour is on the data's own path, with the same noise; levels and their spacing follow a curriculum.

    ict: Karras' levels, N = s0 of them at first and twice as many in each later stage, up to s1; their index
    is drawn with lognormal weight (iCT, Sec. 3.4, 3.5). For networks that start from nothing.
    ect: lognormal levels t, and r = t (1 - q^-(stage + 1) (1 + 8 sigmoid(-t / 2))), at least 0 (ECT, Sec.
    3.3): at the first stage nearly a diffusion loss. For networks that start from a diffusion model.

    In both the loss is the pseudo-Huber of the whole sample with weight 1 / (t - r), and the student's own
    weights make the target. Levels t are sigma / alpha for data of unit spread, rounded to the network's own
    ticks.
    """

    name: Literal["ct"] = Field(
        "ct", description="consistency training by ECT's or iCT's curriculum: jumps to x0, without a teacher"
    )
    curriculum: Literal["ict", "ect"] = Field(
        "ect",
        description="how levels and their gap change over the run; ict: from nothing, ect: from a diffusion model",
    )
    p_mean: float = Field(
        -0.4, description="mean of log t, t = sigma / alpha; the papers' -1.1 is for data of spread 0.5"
    )
    p_std: float = Field(2.0, gt=0, description="spread of log t")
    s0: int | None = Field(None, ge=2, description="ict: levels at first; default 10")
    s1: int | None = Field(None, ge=2, description="ict: levels at last; default 1280")
    q: float | None = Field(None, gt=1, description="ect: by what the gap shrinks from stage to stage; default 2")
    stages: int | None = Field(None, ge=1, description="ect: stages of the curriculum, evenly over the run; default 8")

    needs_teacher: ClassVar[bool] = False

    @model_validator(mode="after")
    def _check_curriculum(self):
        others = {"ict": ("q", "stages"), "ect": ("s0", "s1")}[self.curriculum]
        strangers = [f"objective.{key}" for key in others if getattr(self, key) is not None]
        if strangers:
            other = {"ict": "ect", "ect": "ict"}[self.curriculum]
            raise ValueError(
                f"{' and '.join(strangers)}: a setting of the curriculum {other}, and objective.curriculum is "
                f"{self.curriculum}. Leave it out, or set objective.curriculum={other}"
            )
        if (self.s0 or 10) > (self.s1 or 1280):
            raise ValueError(f"objective.s0 = {self.s0 or 10} is more than objective.s1 = {self.s1 or 1280}: lower it")
        return self

    def levels(self, count: int, schedule: Schedule, progress: float, generator: torch.Generator) -> Levels:
        curriculum = self._improved if self.curriculum == "ict" else self._easy
        u, r = curriculum(count, schedule, progress, generator)
        return Levels(u, r, torch.zeros_like(u))

    def scales(self, progress: float) -> int:
        """iCT's N(k) - 1 after share k / K = `progress` of the run (Sec. 3.4): how many intervals the levels make.

        It is s0 * 2^floor(k / K'), at most s1, with K' = K / (floor(log2(s1 / s0)) + 1).
        """
        s0, s1 = self.s0 or 10, self.s1 or 1280
        doublings = math.floor(math.log2(s1 / s0)) + 1
        return min(s0 * 2 ** math.floor(progress * doublings), s1)

    def _improved(
        self, count: int, schedule: Schedule, progress: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Ticks (u, r) of iCT: an index n of Karras' levels by the lognormal's mass between levels n - 1 and n."""
        # one level more than the paper: here the clean end is a level too, below the network's cleanest
        ticks = torch.cat([torch.zeros(1, dtype=torch.long), karras_ticks(schedule, self.scales(progress) + 1)])
        log_sigma = noise_level(schedule, ticks).double().log()
        below = torch.erf((log_sigma - self.p_mean) / (2**0.5 * self.p_std))  # -1 at the clean end
        n = torch.multinomial(below.diff().clamp(min=1e-12), count, replacement=True, generator=generator) + 1
        n = self.with_noisiest(n, len(ticks) - 1, generator)
        return ticks[n], ticks[n - 1]

    def _easy(
        self, count: int, schedule: Schedule, progress: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Ticks (u, r) of ECT: t lognormal, and r nearer to it from stage to stage."""
        t = (self.p_mean + self.p_std * torch.randn(count, generator=generator)).exp().clamp(max=SIGMA_MAX)
        t = self.with_noisiest(t, noise_level(schedule, torch.tensor(schedule.ticks)).item(), generator)
        u = nearest_ticks(schedule, t)

        stage = math.floor(progress * (self.stages or 8))
        gap = (self.q or 2.0) ** -(stage + 1) * (1 + 8 * torch.sigmoid(-t / 2))  # the paper's t is of spread 0.5
        r = t * (1 - gap)
        r = torch.where(r > 0, nearest_ticks(schedule, r), 0)
        return u, torch.minimum(r, u - 1)  # rounding may have put them on one tick

    def distance(self, jumps: Jumps) -> Tensor:
        t = noise_level(jumps.schedule, jumps.levels.u)
        r = noise_level(jumps.schedule, jumps.levels.r)
        gap = (t - r).maximum(0.01 * t)  # as near as whole ticks come; 0 where both are `SIGMA_MAX`
        return vector_huber(jumps.student, jumps.target) / gap
