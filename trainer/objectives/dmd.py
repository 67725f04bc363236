"""Distribution matching distillation in a few steps (DMD2, arXiv 2405.14867, Sec. 4), without pictures."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...samplers import PhaseGrid
from .matching import Matching


class DMD(Matching):
    """Every step's x0 is re-noised anywhere and matched there; between the steps all noise is fresh.

    The steps are spread evenly from noise on, and the student is trained where its own samples come through
    them (the paper's backward simulation). As landings are x0 itself, the critic's denoising loss is exact. The
    paper's GAN loss, which needs pictures, is left out.
    """

    name: Literal["dmd"] = Field(
        "dmd", description="distribution matching: every step's x0, re-noised anywhere, against a critic"
    )
    steps: int = Field(4, ge=1, le=16, description="steps that it is trained to take, with fresh noise between")

    def starts(self) -> tuple[int, ...]:
        return self.grid().plan(self.steps).ticks[:-1]

    def grid(self) -> PhaseGrid:
        return PhaseGrid(self.points, 1)

    def landings(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.zeros(count, self.steps, dtype=torch.long)

    def sampling(self) -> dict[str, Any]:
        return super().sampling() | {"steps": self.steps}
