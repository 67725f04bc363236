"""Levels that a recipe gives one by one, or by the size of a picture, and not by points and phases.

`recipe` is a `recipe.Recipe` throughout, which asks these functions while it is made.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from .field_kinds import Numbers, Pairs
from .phases import falls
from .schedule import TICKS, FlowSchedule

MOST_K_SIGMA = 5000  # of a noise level of VP models in the host's convention: with zero terminal SNR it ends below


def level_problems(recipe: Any) -> list[str]:
    """Faults in what a recipe says of levels otherwise than by points and phases, each as a clause."""
    problems, is_flow = [], recipe.prediction == "flow"
    if recipe.timesteps and recipe.sigmas:
        problems.append("timesteps and sigmas are given; one of them")
    if recipe.levels_given and recipe.sampling_points is not None:
        problems.append(f"sampling_points is {recipe.sampling_points} beside levels that are given: leave one out")
    if clause := _list_problem(recipe):
        problems.append(clause)

    sizes = [size for size, _ in recipe.mu_by_size or ()]
    if sizes and (not is_flow or len(sizes) < 2 or any(a >= b for a, b in pairwise(sizes))):
        problems.append(f"mu_by_size has the sizes {sizes}; two or more that rise, for flow models")
    if recipe.boundary is not None and not (is_flow and 0 < recipe.boundary < 1):
        problems.append(f"boundary is {recipe.boundary:g}; a noise level of a flow model between 0 and 1")
    if recipe.embedded_guidance is not None and recipe.embedded_guidance < 0:
        problems.append(f"embedded_guidance is {recipe.embedded_guidance:g}; 0 or more")
    return problems


def _list_problem(recipe: Any) -> str | None:
    """The fault in the levels that are given one by one, as a clause, or None."""
    if recipe.levels_given is None:
        return None
    name, is_flow = "timesteps" if recipe.timesteps else "sigmas", recipe.prediction == "flow"
    if name == "sigmas":
        most, clean = (1 if is_flow else MOST_K_SIGMA), 0
    else:  # timestep 0 of models other than flow is a level, tick 1
        most, clean = (TICKS, 0) if is_flow else (TICKS - 1, -1)
    if falls([level - clean for level in recipe.levels_given], most - clean):
        return None
    listed = ", ".join(f"{level:g}" for level in recipe.levels_given)
    bottom = "above 0, without the clean end" if clean == 0 else "0 at least"
    return f"{name} are {listed}; they have to fall from {most} at most to {bottom}"


def ticks_of(recipe: Any) -> Numbers:
    """The ticks of the levels that are given one by one, in their order; the recipe has no `level_problems`."""
    if recipe.timesteps:
        first = 0 if recipe.prediction == "flow" else 1  # tick of timestep 0
        return tuple(first + time for time in recipe.timesteps)
    # those of a flow model are its own, however the host counts them
    schedule = FlowSchedule(recipe.shift) if recipe.prediction == "flow" else recipe.schedule()
    ticks = schedule.tick(torch.tensor(recipe.sigmas, dtype=torch.float64))
    return tuple(ticks.tolist())


def mu_at(positions: float, line: Pairs) -> float:
    """mu of a flow shift, exp(mu), for a picture of so many positions: on a broken line of two points (positions, mu)
    or more, whose outermost pieces go on beyond its ends."""
    piece = next((i for i in range(1, len(line) - 1) if positions <= line[i][0]), len(line) - 1)
    (low, mu_low), (high, mu_high) = line[piece - 1], line[piece]
    return mu_low + (mu_high - mu_low) * (positions - low) / (high - low)
