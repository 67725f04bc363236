"""PCM and its relatives: each objective is the choices that make one distillation step (see `objective.py`).

To add one, write `x.py` with a subclass of `Objective`, import the class here and name it in `CLASSES`:
settings, dry run, recipe and generated pages take it from there.
"""

from __future__ import annotations

from typing import Annotated, Any, Union

from pydantic import Field

from .cd import CD
from .ct import CT
from .ctm import CTM
from .dmd import DMD
from .dscd import DSCD
from .lcf import LCF
from .lcm import LCM
from .matching import Criticised, Draws, Matched, Matching
from .objective import Distillation, Jumps, Levels, Objective, Section
from .pcm import PCM
from .progressive import Progressive
from .tcd import TCD
from .tdm import TDM
from .ufogen import UFOGen

# In the order in which errors and tables list them.
CLASSES = (PCM, LCM, LCF, CT, CD, TCD, CTM, UFOGen, Progressive, DSCD, DMD, TDM)
OBJECTIVES: dict[str, type[Objective]] = {kind.model_fields["name"].default: kind for kind in CLASSES}
AnyObjective = Annotated[Union[CLASSES], Field(discriminator="name")]  # noqa: UP007 (| takes no tuple)


def known_to(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The part of another objective's settings that the objective of this name has too."""
    return {key: value for key, value in settings.items() if key in OBJECTIVES[name].model_fields}


def tells_target_time(objective: str) -> bool:
    """Whether an objective tells its network where a jump ends; False for the name of a recipe from elsewhere."""
    return objective in OBJECTIVES and OBJECTIVES[objective].target_time


__all__ = [
    "OBJECTIVES",
    "AnyObjective",
    "Criticised",
    "Distillation",
    "Draws",
    "Jumps",
    "Levels",
    "Matched",
    "Matching",
    "Objective",
    "Section",
    "known_to",
    "tells_target_time",
    *(kind.__name__ for kind in CLASSES),
]
