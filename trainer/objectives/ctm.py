"""Consistency trajectories (CTM, arXiv 2310.02279, Sec. 3), brought to latents as in PCM's baseline SimpleCTM."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from ...samplers import Schedule
from .objective import Levels
from .tcd import TCD


class CTM(TCD):
    """Like TCD, with CTM's soft consistency: the neighbour is any of the next `solver_steps` points, and the
    teacher takes so many steps to it.

    The network is told the level s that it jumps to, where it has an input for that (a UNet with
    `time_cond_proj_dim`); the usual bases have none, and learn without. Student and target are compared at s,
    with PCM's distance. CTM itself compares them at x0, after one more jump of both, and adds a GAN; these
    two are left out, as in SimpleCTM (arXiv 2405.18407, Sec. 4).
    """

    name: Literal["ctm"] = Field(
        "ctm",
        description="consistency trajectories: as tcd, over several steps of the teacher; the network is told "
        "where a jump ends, if it has an input for it",
    )
    solver_steps: int = Field(4, ge=1, le=100, description="points that the neighbour may be away, and steps to it")

    target_time: ClassVar[bool] = True

    def levels(self, count: int, schedule: Schedule, progress: float, generator: torch.Generator) -> Levels:
        u = self.start(count, generator)
        cell = self.grid().ticks // self.points
        cells_away = 1 + torch.randint(self.solver_steps, (count,), generator=generator)
        r = (u - cell * cells_away).clamp(min=0)
        return Levels(u, r, self.point_between(torch.zeros_like(r), r, generator))
