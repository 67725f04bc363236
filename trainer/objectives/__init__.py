"""Objectives: each a row of the choices that make one distillation step (see `engine`)."""

from __future__ import annotations

from typing import Annotated, Any, Union

from pydantic import Field

from .cd import CD
from .ct import CT
from .ctm import CTM
from .dscd import DSCD
from .lcf import LCF
from .lcm import LCM
from .objective import Distillation, Levels, Objective, Pair, Section
from .pcm import PCM
from .progressive import Progressive
from .tcd import TCD
from .ufogen import UFOGen

ROWS = (PCM, LCM, LCF, CT, CD, TCD, CTM, UFOGen, Progressive, DSCD)
OBJECTIVES: dict[str, type[Objective]] = {row.model_fields["name"].default: row for row in ROWS}
AnyObjective = Annotated[Union[ROWS], Field(discriminator="name")]  # noqa: UP007 (of a tuple)


def known_to(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of another objective's settings that the objective of this name has too."""
    return {key: value for key, value in settings.items() if key in OBJECTIVES[name].model_fields}


def tells_target_time(objective: str) -> bool:
    """Whether the objective of this name (a recipe's: it may be none of these) tells a network where its jumps end."""
    return objective in OBJECTIVES and OBJECTIVES[objective].target_time


__all__ = [
    "OBJECTIVES",
    "AnyObjective",
    "Distillation",
    "Levels",
    "Objective",
    "Pair",
    "Section",
    "known_to",
    "tells_target_time",
    *(row.__name__ for row in ROWS),
]
