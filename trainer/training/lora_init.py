"""Starting a run from a few-step LoRA instead of from nothing: `lora.init`."""

from __future__ import annotations

from pathlib import Path

import torch

from ...samplers.lora_file import read_header
from ..config.config import Config
from ..families import Base
from ..lora.adapter import NAME, Adapter
from ..lora.describe import broken_tensors
from ..lora.dora import is_dora
from ..lora.install import install, remarks
from .checks import check_start


@torch.no_grad()
def start_from(config: Config, base: Base, adapter: Adapter) -> str:
    """Give the adapter the weights of `lora.init`, at the strength that its recipe names; returns a sentence on it.

    Ranks above the file's begin without effect. Raises as `check_start`, and ValueError for modules that do not fit;
    layers that are not trained are refused before, by `check_loaded`.
    """
    recipe, header = check_start(config, base.facts), read_header(Path(config.lora.init))
    file = header.path
    if broken := broken_tensors(header):
        raise ValueError(
            f"{file.name}: {len(broken)} of its tensors hold numbers that are not finite, such as {broken[0]}. "
            "Get the file again, or start from another."
        )
    strength = recipe.strength if recipe else 1.0
    install(header, base, "start")
    try:
        taken = [layer for layer in adapter.layers.values() if "start" in layer.lora_A]
        for layer in taken:
            down, up = layer.lora_A["start"].weight, layer.lora_B["start"].weight
            layer.lora_A[NAME].weight[: len(down)] = down
            layer.lora_B[NAME].weight[:, : len(down)] = up * (strength * layer.scaling["start"] / layer.scaling[NAME])
        adapter.match_magnitudes()
        for layer in taken:
            if is_dora(layer, "start"):
                layer.lora_magnitude_vector[NAME].weight.copy_(layer.lora_magnitude_vector["start"].weight)
    finally:
        base.network.set_adapters(NAME)
        base.network.delete_adapters("start")
    notes = "".join(f" {line}" for line in remarks(header))
    return f"It starts as {config.lora.init} at strength {strength:g}: {len(taken)} modules.{notes}"
