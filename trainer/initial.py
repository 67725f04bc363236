"""Starting a run from a few-step LoRA instead of from nothing: `lora.init`."""

from __future__ import annotations

from pathlib import Path

import torch

from ..samplers import Recipe
from ..samplers.lora_file import read_header
from .adapter import NAME, Adapter
from .config import Config
from .export import install
from .families import Base
from .inspection import broken_tensors, header_of_family, recipe_of


def check_start(config: Config, base: Base) -> Recipe | None:
    """The recipe of the LoRA in `lora.init`, or None for one that has none.

    Of the base it asks name, prediction and schedule, no weights. Raises FileNotFoundError, or ValueError for a LoRA of
    another family, prediction or shift, for a greater rank than the run's, and for one whose jumps end elsewhere.
    """
    header = header_of_family(Path(config.lora.init), base.name)
    recipe, file = recipe_of(header), header.path.name
    rank = max((module.rank for module in header.modules.values()), default=0)
    if rank > config.lora.rank:
        raise ValueError(f"{file} has rank {rank}, more than lora.rank = {config.lora.rank}. Set lora.rank={rank}.")
    if recipe is None:
        return None
    shift = base.schedule.shift if base.prediction == "flow" else None
    if recipe.source == "header" and (recipe.prediction, recipe.shift) != (base.prediction, shift):
        raise ValueError(
            f"{file} was made for a base with {_reading(recipe.prediction, recipe.shift)}, and this one has "
            f"{_reading(base.prediction, shift)}. Use its own base, or set base.prediction or base.shift."
        )
    edges = recipe.grid(trained=True).edges
    if edges != config.grid().edges:
        points = f" and objective.points={recipe.points}" if recipe.source == "header" else ""
        raise ValueError(
            f"{file} jumps to the ticks {_joined(edges)}, and this run to {_joined(config.grid().edges)}: it would "
            f"unlearn them. Set objective.phases={recipe.phases}{points}; the objectives pcm and lcf have phases."
        )
    return recipe


@torch.no_grad()
def start_from(config: Config, base: Base, adapter: Adapter) -> str:
    """Give the adapter the weights of `lora.init`, at the strength that its recipe names; returns a sentence on it.

    Ranks above the file's begin without effect. Raises as `check_start`, and ValueError for modules that do not fit.
    """
    file, recipe = Path(config.lora.init), check_start(config, base)
    if broken := broken_tensors(read_header(file)):
        told = f"{len(broken)} of its tensors hold numbers that are not finite, such as {broken[0]}"
        raise ValueError(f"{file.name}: {told}. Get the file again, or start from another.")
    strength = recipe.strength if recipe else 1.0
    modules, unmatched = install(file, base, "start")
    try:
        taken = [layer for layer in adapter.layers.values() if "start" in layer.lora_A]
        if unmatched or len(taken) < modules:
            told = f"only {len(taken)} of its {modules} modules are among those that are trained here"
            raise ValueError(f"{file.name}: {told}. Use a LoRA that was made for this kind of base.")
        for layer in taken:
            down, up = layer.lora_A["start"].weight, layer.lora_B["start"].weight
            layer.lora_A[NAME].weight[: len(down)] = down
            layer.lora_B[NAME].weight[:, : len(down)] = up * (strength * layer.scaling["start"] / layer.scaling[NAME])
    finally:
        base.network.set_adapters(NAME)
        base.network.delete_adapters("start")
    return f"It starts as {file} at strength {strength:g}: {len(taken)} modules."


def _joined(ticks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ticks))


def _reading(prediction: str, shift: float | None) -> str:
    return prediction + ("" if shift is None else f", shift {shift:g}")
