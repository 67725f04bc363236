"""Phased consistency (PCM, arXiv 2405.18407, Sec. 3.1, 3.2): every point of a phase is mapped to its clean edge."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...samplers import Schedule
from .objective import Adversarial, Levels, Phased, SelfConsistency


class PCM(Phased, SelfConsistency):
    """Start anywhere on the grid, neighbour one point cleaner, target the edge of the start's phase.

    On N solver points, cut into M phases (`points`, `phases`), one step is

        u  uniform on the points         r  the point below u        s  the edge of u's phase, at most r
        x_r = one step of the teacher's solver from x_u, with its guidance (`smallcfg`) or without (`normalcfg`)
        loss = d(J(x_u, u -> s), sg J(x_r, r -> s))

    with sg for "no gradient", the student's own weights in both jumps (the paper: an average), and for d the
    pseudo-Huber of each element (Eq. 10's d, c = 0.001 in the published runs), compared at the edge and
    unweighted. At the lowest point of a phase r is the edge itself, and the target is the teacher's step.
    With `inside` a share of the jumps end at any point from the edge to r, as TCD's do from x0 to r. Edges are
    shared by neighbouring phases, so M jumps, each from one edge to the next, lead from noise to x0
    without any noise between.

    Levels come from `Phased`, guidance from `Distillation`, target and distance from `OwnTarget`, the solver
    from `SelfConsistency`, all in objective.py; here is what only PCM has.
    """

    name: Literal["pcm"] = Field(
        "pcm", description="phased consistency: every jump ends at the clean edge of its phase"
    )
    mode: Literal["deterministic", "stochastic"] = Field(
        "deterministic", description="how the LoRA is to be sampled; stochastic needs phases = 1"
    )
    min_alpha: float = Field(
        0.0, ge=0, lt=1, description="one-step clamp of the x0 divisor (0.5 in the paper); 0: none; needs the PCM nodes"
    )

    inside: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the jumps that end anywhere from the phase's edge to the neighbour, and not at the edge; "
        "0.5 is for a LoRA that is sampled at more steps than phases as well",
    )

    adversarial: ClassVar[Adversarial] = "optional"

    @model_validator(mode="after")
    def _check(self):
        if self.phases > 1 and self.mode == "stochastic":
            raise ValueError(
                f"objective.mode stochastic samples straight to x0, which only one phase trains; got phases = "
                f"{self.phases}. Set objective.phases=1, or objective.mode=deterministic"
            )
        if self.phases > 1 and self.min_alpha:
            raise ValueError(
                f"objective.min_alpha is for one phase; got {self.min_alpha:g} with phases = {self.phases}. "
                "Set objective.phases=1, or objective.min_alpha=0"
            )
        return self

    def levels(self, count: int, schedule: Schedule, progress: float, generator: torch.Generator) -> Levels:
        levels = super().levels(count, schedule, progress, generator)
        if not self.inside:  # and nothing is drawn, so that other draws stay the same
            return levels
        anywhere = self.point_between(levels.s, levels.r, generator)
        chosen = torch.rand(count, generator=generator) < self.inside
        return Levels(levels.u, levels.r, torch.where(chosen, anywhere, levels.s))

    def clamp(self) -> float:
        """Eq. 39's max(alpha, 0.5): at SD1.5's noisiest level 1 / alpha is 14.6, and makes dots of small errors."""
        return self.min_alpha

    def judged_at(self, levels: Levels, generator: torch.Generator) -> Tensor:
        """Ticks (B,), uniform on the solver points of the start's phase (Sec. 3.3) above the jump's end."""
        grid = self.grid()
        points = grid.start_ticks()
        inside = (grid.target(points) == grid.target(levels.u)[:, None]) & (points > levels.s[:, None])
        return points[torch.multinomial(inside.double(), 1, generator=generator).squeeze(1)]

    def sampling(self) -> dict[str, Any]:
        # phases chain exactly without noise; one phase is a consistency model, sampled as LCM's, all noise
        # fresh
        gamma = 0.0 if self.mode == "deterministic" else 1.0
        return super().sampling() | {"mode": self.mode, "gamma": gamma, "min_alpha": self.min_alpha}
