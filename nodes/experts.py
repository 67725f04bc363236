"""Models of two experts, such as Wan 2.2: which levels each of them has, and one run over both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..samplers import LevelPlan, Recipe
from ..samplers.phases import count_steps
from ..samplers.sampling import NoiseSampler
from .lora_on_model import CARRIED, model_family, model_title
from .loras_in_graph import checkpoints

ROUNDING = 1e-4  # of a noise level: one at the boundary is the high-noise expert's
NO_SECOND = (
    "This recipe is for two experts, and noise levels below {boundary:g} are the low-noise one's: connect that to "
    "low_noise_model, with its own LoRA."
)
NO_BOUNDARY = (
    "A low-noise model is connected, but the recipe tells no boundary: set it in the widgets of Load PCM LoRA or PCM "
    "Recipe (0.875 for Wan 2.2 text to video, 0.9 for image to video), or take the second model off."
)
SWAPPED = "The LoRA on {socket} is for the {expert}-noise expert: swap model and low_noise_model."


@dataclass
class Relay:
    """What one expert hands to the next in the middle of a run: the point that it has come to, and the source of the
    noise between steps, so that the next goes on as one model would."""

    x: Tensor | None = None
    noise_sampler: NoiseSampler | None = None


@dataclass(frozen=True)
class ExpertRun:
    """The steps of one expert: its MODEL, its sigmas (n + 1,), and how many steps there were before."""

    model: Any
    sigmas: Tensor
    before: int


def parts_of(model: Any, low_noise_model: Any | None, recipe: Recipe, sigmas: Tensor) -> Iterator[ExpertRun]:
    """The experts of a run in turn, each with its steps; one of none is left out.

    One model alone may draw what is wholly on one side of the boundary. Raises ValueError for a run across a boundary
    without a second model, and for a second model without a boundary.
    """
    high, steps = steps_above(recipe, sigmas), len(sigmas) - 1
    if low_noise_model is not None and recipe.boundary is None:
        raise ValueError(NO_BOUNDARY)
    if low_noise_model is None and 0 < high < steps:
        raise ValueError(NO_SECOND.format(boundary=recipe.boundary))
    if low_noise_model is None or high == steps:
        yield ExpertRun(model, sigmas, 0)
        return
    if high:
        yield ExpertRun(model, sigmas[: high + 1], 0)
    yield ExpertRun(low_noise_model, sigmas[high:], high)


def steps_above(recipe: Recipe, sigmas: Tensor) -> int:
    """The number of steps that begin at the recipe's boundary or above it, the high-noise expert's; all without one."""
    boundary = (recipe.boundary or 0) - ROUNDING
    return sum(sigma >= boundary for sigma in sigmas[:-1].tolist())


def expert_warnings(model: Any, low_noise_model: Any | None, recipe: Recipe) -> list[str]:
    """Faults of two models that are sampled one after the other, a sentence each."""
    if low_noise_model is None:
        return []
    warnings = []
    first, second = (each.get_attachment(CARRIED) for each in (model, low_noise_model))
    if first and first.expert == "low":
        warnings.append(SWAPPED.format(socket="model", expert="low"))
    elif second and second.expert == "high":
        warnings.append(SWAPPED.format(socket="low_noise_model", expert="high"))
    if model_family(model) != model_family(low_noise_model):
        titles = model_title(model), model_title(low_noise_model)
        warnings.append("The first model is {}, the second {}: take two experts of one model.".format(*titles))
    if second and (second.grid(), second.shift) != (recipe.grid(), recipe.shift):
        warnings.append("The second model's LoRA is for other levels: take the two LoRAs of one release.")
    return warnings


def wrong_expert(path: list[dict[str, Any]], recipe: Recipe) -> list[str]:
    """The sentence for a LoRA of one expert on the other, by the file that a `graph.model_path` begins with."""
    other = {"high": "low", "low": "high"}.get(recipe.expert)
    for name in checkpoints(path)[-1:]:
        if other and re.search(rf"(?<![a-z]){other}(?![a-z])", name.lower()):
            return [
                f"This LoRA is for the {recipe.expert}-noise model, and {name} is the {other}-noise one: swap them."
            ]
    return []


def expert_note(recipe: Recipe, plan: LevelPlan) -> list[str]:
    """A sentence on which steps are whose, for the recipe of two experts."""
    if recipe.boundary is None:
        return []
    high = steps_above(recipe, recipe.schedule().k_sigma(plan.ticks))
    return [f"{count_steps(high)} by the high-noise model, {plan.steps - high} by the low-noise one."]
