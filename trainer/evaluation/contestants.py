"""Who is in a report: its LoRAs, the settings they are tried at, the teacher's at the same cost, and the prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, count, cycle, islice
from pathlib import Path
from typing import Any

from ...samplers import Recipe
from ..data.prompts import read_prompts
from ..families import Base
from ..lora.install import header_of_family, recipe_of
from ..tiny.bundled import bundled_folder, own_prompts
from ..tiny.scenes import Scene, held_out_scenes
from .trial import SOLVERS, TEACHER, TRAILING, Setting

GUIDANCE, TINY_GUIDANCE = 7.5, 4.0  # of the teacher, where no LoRA tells
READ = ("prediction", "snr", "shift")  # how a base is read, see `_reading`


@dataclass(frozen=True)
class Contestant:
    """A LoRA file, what it is called in the report, its recipe where it has one, and the CFG that it was distilled
    under where its header says."""

    file: Path
    name: str
    recipe: Recipe | None
    guidance: float | None

    def recipe_on(self, base: Base) -> Recipe:
        """Its recipe, else the plainest: DDIM's steps on trailing levels, CFG 1."""
        shift = getattr(base.schedule, "shift", None)
        facts = {"prediction": base.prediction, "zero_terminal_snr": base.zero_terminal_snr, "shift": shift}
        grid = {"points": 1000, "phases": 1, "steps": 4, "sampling_points": 1000, "sampling_from_noise": True}
        return self.recipe or Recipe(family=base.name, objective="unknown", **facts, **grid)


def find_contestants(files: list[Path], family: str, steps: list[int]) -> list[Contestant]:
    """The LoRAs, from their headers alone.

    Raises ValueError or FileNotFoundError for a file that is no LoRA, one of another family, one that cannot be sampled
    at these steps, and for two that need the base read in different ways.
    """
    found = []
    for file, name in zip(files, unique_names((file.stem for file in files), taken=[TEACHER]), strict=True):
        header = header_of_family(file, family)
        recipe = recipe_of(header)
        for n in steps:
            (recipe.grid() if recipe else TRAILING).plan(n)
        found.append(Contestant(file, name, recipe, distilled_guidance(_objective(header.metadata), recipe)))
    readings = [(c.name, _reading(c.recipe)) for c in found if c.recipe]
    if differ := [key for key in READ if len({told[key] for _, told in readings if key in told}) > 1]:
        ways = [(name, ", ".join(told[key] for key in differ if key in told)) for name, told in readings]
        told = "; ".join(f"{name}: {way}" for name, way in ways if way)
        raise ValueError(f"These LoRAs want the base read in different ways ({told}). Make a report for each.")
    return found


def _reading(recipe: Recipe) -> dict[str, str]:
    """What a recipe tells of its base, in words. A known file's "epsilon" is what it has by default, and tells nothing;
    a shift is told wherever there is one."""
    told = {} if recipe.shift is None else {"shift": f"shift {recipe.shift:g}"}
    if recipe.source == "header":
        snr = "zero terminal SNR" if recipe.zero_terminal_snr else "no zero terminal SNR"
        told |= {"prediction": recipe.prediction, "snr": snr}
    return told


def tells_most(contestants: list[Contestant]) -> Contestant:
    """The one to load the base by: the first with a recipe in its header, else the first with any, else the first."""
    return max(contestants, key=lambda c: 0 if c.recipe is None else 1 + (c.recipe.source == "header"))


def unique_names(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """The names, with a number where one is taken or was given before."""
    found, given = [], set(taken)
    for name in names:
        numbered = chain([name], (f"{name} ({n})" for n in count(2)))
        found.append(next(candidate for candidate in numbered if candidate not in given))
        given.add(found[-1])
    return found


def distilled_guidance(objective: Mapping[str, Any], recipe: Recipe | None) -> float | None:
    """Middle of the CFG range of the teacher's step, of an objective's settings; None where they have none. A
    normal-CFG LoRA is compared at its own."""
    if recipe and recipe.guidance_mode == "normalcfg":
        return recipe.guidance
    try:
        low, high = objective["guidance"]
        return (low + high) / 2
    except (KeyError, TypeError, ValueError):
        return None


def _objective(metadata: dict[str, str]) -> dict[str, Any]:
    """The settings of the objective that a header tells of."""
    try:
        return json.loads(metadata["pcm.config"])["objective"]
    except (KeyError, TypeError, ValueError):
        return {}


def teacher_guidance(contestants: list[Contestant], base: str) -> float:
    """The teacher's CFG where none is asked for: the first LoRA's that tells, else the usual one."""
    usual = TINY_GUIDANCE if bundled_folder(base) else GUIDANCE
    return next((c.guidance for c in contestants if c.guidance is not None), usual)


def teacher_settings(budgets: set[int], guidance: float) -> list[Setting]:
    """The teacher by each solver at no more than each number of evaluations, and without guidance at just as many."""
    cost = 1 if guidance == 1 else 2
    guided = [
        Setting(TEACHER, n // cost, guidance, solver=solver) for n in sorted(budgets) for solver in SOLVERS if n >= cost
    ]
    return list(dict.fromkeys([*guided, *(Setting(TEACHER, n, 1.0) for n in sorted(budgets))]))


@dataclass(frozen=True)
class Prompts:
    """A prompt for each picture, and where they are from. scenes: what they describe, for a bundled tiny base."""

    texts: list[str]
    source: str
    scenes: list[Scene] | None = None

    def as_dict(self) -> dict:
        return {"source": self.source, "different": len(set(self.texts)), "list": list(dict.fromkeys(self.texts))}


def choose_prompts(file: str | None, base: str, number: int) -> Prompts:
    """Prompts of the file; else, for a bundled tiny base, scenes that are not among its own prompts; else the list that
    ships with the trainer. Repeated where they are fewer than the pictures. Raises ValueError for a bad file."""
    if file is None and (own := own_prompts(base)):
        scenes = held_out_scenes(number, set(read_prompts(own)))
        return Prompts(
            [s.caption for s in scenes], f"held-out scenes, none of them a training prompt of {base}", scenes
        )
    source = file and Path(file).name or "the trainer's default list, which LoRAs made without data.prompts learnt on"
    return Prompts(list(islice(cycle(read_prompts(file)), number)), source)
