"""The contestants of a report: its LoRAs and their settings, the teacher's at the same cost, and the prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, count, cycle, islice
from pathlib import Path
from typing import Any

from ...samplers import Recipe
from ...samplers.lora_info import recipe_of
from ..data.prompts import prompts_in, read_prompts
from ..families import Base
from ..lora.install import header_of_family
from ..tiny.bundled import bundled_folder, own_prompts
from ..tiny.languages import Language, language_of
from .setting import SOLVERS, TEACHER, TRAILING, Setting

GUIDANCE, TINY_GUIDANCE = 7.5, 4.0  # the teacher's CFG where no LoRA tells, on other bases and on the tiny ones
READ = ("prediction", "snr", "shift")  # the keys of `_reading`


@dataclass(frozen=True)
class Contestant:
    """A LoRA that is in a report.

    name: in the report. recipe: None for a file without one. guidance: the CFG that it was distilled under,
    None where its header does not tell.
    """

    file: Path
    name: str
    recipe: Recipe | None
    guidance: float | None

    def recipe_on(self, base: Base) -> Recipe:
        """The LoRA's recipe, else the plainest one: DDIM's steps on trailing levels, CFG 1."""
        shift = getattr(base.schedule, "shift", None)
        return self.recipe or Recipe(
            family=base.name,
            objective="unknown",
            prediction=base.prediction,
            zero_terminal_snr=base.zero_terminal_snr,
            shift=shift,
            points=1000,
            phases=1,
            steps=4,
            sampling_points=1000,
            sampling_from_noise=True,
        )


def find_contestants(files: list[Path], family: str, steps: list[int]) -> list[Contestant]:
    """The LoRAs of these files, from their headers alone. steps: the numbers of steps to sample them at.

    Raises ValueError or FileNotFoundError for a file that is no LoRA, one of another family, one that cannot
    be sampled at these steps, and for two that need the base read in different ways.
    """
    contestants = []
    for file, name in zip(files, unique_names((file.stem for file in files), reserved=[TEACHER]), strict=True):
        header = header_of_family(file, family)
        recipe = recipe_of(header)
        for n in steps:
            (recipe.grid() if recipe else TRAILING).plan(n)
        guidance = distilled_guidance(_objective(header.metadata), recipe)
        contestants.append(Contestant(header.path, name, recipe, guidance))

    readings = [(c.name, _reading(c.recipe)) for c in contestants if c.recipe]
    if differ := [key for key in READ if len({words[key] for _, words in readings if key in words}) > 1]:
        ways = [(name, ", ".join(words[key] for key in differ if key in words)) for name, words in readings]
        lines = "; ".join(f"{name}: {way}" for name, way in ways if way)
        raise ValueError(f"These LoRAs want the base read in different ways ({lines}). Make a report for each.")
    return contestants


def _reading(recipe: Recipe) -> dict[str, str]:
    """In words, how the base is to be read for this recipe, as far as it tells: by some of the keys `READ`.

    A known file's "epsilon" is a default and tells nothing; a shift tells wherever there is one.
    """
    words = {} if recipe.shift is None else {"shift": f"shift {recipe.shift:g}"}
    if recipe.source == "header":
        snr = "zero terminal SNR" if recipe.zero_terminal_snr else "no zero terminal SNR"
        words |= {"prediction": recipe.prediction, "snr": snr}
    return words


def tells_most(contestants: list[Contestant]) -> Contestant:
    """The contestant to load the base by: the first with a recipe in its header, else with any, else the first."""
    return max(contestants, key=lambda c: 0 if c.recipe is None else 1 + (c.recipe.source == "header"))


def unique_names(names: Iterable[str], reserved: Iterable[str] = ()) -> list[str]:
    """The names, each with a number where it is one of `reserved` or the same as an earlier one."""
    unique, used = [], set(reserved)
    for name in names:
        numbered = chain([name], (f"{name} ({n})" for n in count(2)))
        unique.append(next(candidate for candidate in numbered if candidate not in used))
        used.add(unique[-1])
    return unique


def distilled_guidance(objective: Mapping[str, Any], recipe: Recipe | None) -> float | None:
    """The CFG that a LoRA was distilled under: the middle of `guidance`, the range of the teacher's step, in
    the settings of its objective. None where they have none; for a normal-CFG LoRA the recipe's, at which it
    is sampled.
    """
    if recipe and recipe.guidance_mode == "normalcfg":
        return recipe.guidance
    try:
        low, high = objective["guidance"]
        return (low + high) / 2
    except (KeyError, TypeError, ValueError):
        return None


def _objective(metadata: dict[str, str]) -> dict[str, Any]:
    """The objective's settings in a header; {} where it has none."""
    try:
        return json.loads(metadata["pcm.config"])["objective"]
    except (KeyError, TypeError, ValueError):
        return {}


def teacher_guidance(contestants: list[Contestant], base: str) -> float:
    """The teacher's CFG where the user names none: that of the first LoRA that tells, else the usual one."""
    usual = TINY_GUIDANCE if bundled_folder(base) else GUIDANCE
    return next((c.guidance for c in contestants if c.guidance is not None), usual)


def teacher_settings(budgets: set[int], guidance: float) -> list[Setting]:
    """The teacher's settings for these numbers of evaluations: each solver with guidance at no more than each
    of them, and DDIM without guidance at just as many."""
    cost = 1 if guidance == 1 else 2
    guided = [
        Setting(TEACHER, n // cost, guidance, solver=solver) for n in sorted(budgets) for solver in SOLVERS if n >= cost
    ]
    return list(dict.fromkeys([*guided, *(Setting(TEACHER, n, 1.0) for n in sorted(budgets))]))


@dataclass(frozen=True)
class Prompts:
    """A prompt for each picture, and where they are from. language: a bundled base's, where they are of it."""

    texts: list[str]
    source: str
    language: Language | None = None

    def as_dict(self) -> dict:
        """For the report, each prompt once."""
        return {"source": self.source, "different": len(set(self.texts)), "list": list(dict.fromkeys(self.texts))}


def unseen_prompts(base: str, number: int) -> list[str]:
    """`number` prompts of a bundled base's language that are not among its training prompts."""
    return language_of(base).held_out(number, set(read_prompts(own_prompts(base))))


def choose_prompts(file: str | None, base: str, number: int) -> Prompts:
    """`number` prompts for pictures of a base.

    They are the file's; without one, for a bundled tiny base, captions that are not among its training prompts;
    else the list that ships with the trainer. Repeated where they are fewer than the pictures. Raises
    ValueError for a bad file.
    """
    if file is None and (language := language_of(base)):
        source = f"held-out captions, none of them a training prompt of {base}"
        return Prompts(unseen_prompts(base, number), source, language)
    source = file and Path(file).name or "the trainer's default list, which LoRAs made without data.prompts learnt on"
    return Prompts(list(islice(cycle(prompts_in(file, number)), number)), source)
