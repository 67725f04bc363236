"""Starting a run from a few-step LoRA instead of from nothing: `lora.init`."""

from __future__ import annotations

from pathlib import Path

import torch

from .adapter import NAME, Adapter
from .export import install
from .families import Base
from .inspection import header_of_family, recipe_of
from .objectives import Objective


@torch.no_grad()
def start_from(file: Path, base: Base, adapter: Adapter, objective: Objective) -> int:
    """Give the adapter a LoRA file's weights, times its alpha / rank; returns how many modules got some.

    Ranks above the file's begin without effect. Raises ValueError for a LoRA of another family, for modules that do not
    fit, for a greater rank than the adapter's, and for one whose recipe has other phases than this run's jumps.
    """
    recipe = recipe_of(header_of_family(file, base.name))
    phases = objective.grid().phases
    if recipe and recipe.phases != phases:
        raise ValueError(
            f"{file.name} was trained in {recipe.phases} phases of {recipe.points} points, and this run has {phases}: "
            f"it would unlearn its jumps. Set objective.phases={recipe.phases} and objective.points={recipe.points}; "
            "the objectives pcm and lcf have phases."
        )
    modules, unmatched = install(file, base, "start")
    try:
        taken = {name: layer for name, layer in adapter.layers.items() if "start" in layer.lora_A}
        if unmatched or len(taken) < modules:
            fitting = len(taken)
            raise ValueError(
                f"{file.name}: only {fitting} of its {modules} modules are among those that are trained here."
            )
        for layer in taken.values():
            down, up = layer.lora_A["start"].weight, layer.lora_B["start"].weight
            if len(down) > adapter.rank:
                told = f"{file.name} has rank {len(down)}, more than lora.rank = {adapter.rank}"
                raise ValueError(f"{told}. Set lora.rank={len(down)}.")
            layer.lora_A[NAME].weight[: len(down)] = down
            layer.lora_B[NAME].weight[:, : len(down)] = up * (layer.scaling["start"] / layer.scaling[NAME])
    finally:
        base.network.set_adapters(NAME)
        base.network.delete_adapters("start")
    return len(taken)
