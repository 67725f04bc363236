"""Which of a network's layers each module of a LoRA file is for, whatever the file calls it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ...samplers.lora_file import LoraHeader
from ...samplers.lora_modules import LoraModule
from ...samplers.lora_names import split_key
from ...samplers.texts import brief
from ..families import Base

# kohya's names of SDXL's and SD3's blocks in the original layout
OTHER_LAYOUT = re.compile(
    r"^lora_(unet|transformer)_(input_blocks|middle_block|output_blocks|joint_blocks|time_embed|label_emb|out)_\d"
)


class Layer(NamedTuple):
    """A linear layer or convolution, and its path in the network; where PEFT has wrapped it, what is inside."""

    path: str
    layer: nn.Module


@dataclass(frozen=True)
class Targets:
    """A LoRA's `modules` for the network by their names in the header, the `layers` that they are for, by the same
    names, and the names of those `unmatched` by any."""

    modules: dict[str, LoraModule]
    layers: dict[str, Layer]
    unmatched: list[str]


def targets_of(header: LoraHeader, base: Base) -> Targets:
    """The layers of a base's network that a LoRA's modules are for, by their names and shapes.

    Raises ValueError where two modules are for one layer, and as `diffusers_names`.
    """
    names = diffusers_names(header, type(base), getattr(base.network.config, "layers_per_block", None))
    layers = {_name_in_header(base, layer.path): layer for layer in _layers(base.network)}
    modules = header.network
    placed = {
        name: layers[wanted]
        for name, module in modules.items()
        if (wanted := names.get(name, name)) in layers and module.fits(tuple(layers[wanted].layer.weight.shape))
    }
    owners: dict[str, str] = {}
    for name, layer in placed.items():
        if (other := owners.setdefault(layer.path, name)) != name:
            raise ValueError(f"{header.path.name} has {layer.path} under two names, {other} and {name}. Get it again.")
    return Targets(modules, placed, sorted(modules.keys() - placed.keys()))


def diffusers_names(header: LoraHeader, family: type[Base], layers_per_block: int | None) -> dict[str, str]:
    """Module -> its name in diffusers' layout, by diffusers itself, for those of the network that are named in the
    original layout (input_blocks, ...).

    layers_per_block: of the network. Raises ValueError for SD3's original layout, which has q, k and v in one, and for
    names that diffusers cannot map.
    """
    names = [name for name in header.network if OTHER_LAYOUT.search(name)]
    if not names:
        return {}
    if family.fuses_qkv:
        raise ValueError(f"{header.path.name} has q, k and v in one, such as {names[0]}. Get it with diffusers' names.")
    # a mark in place of each half: the names alone are asked for
    marks = {f"{name}.{half}.weight": torch.empty(1) for name in names for half in ("lora_down", "lora_up")}
    owners = {id(mark): key.partition(".")[0] for key, mark in marks.items()}
    config = type("Config", (), {"layers_per_block": layers_per_block})
    try:
        renamed, _ = family.pipeline.lora_state_dict(dict(marks), unet_config=config)
    except (LookupError, ValueError, TypeError) as error:
        raise ValueError(
            f"{header.path.name} has names in the original layout, such as {names[0]}, that diffusers cannot map "
            f"({brief(error)}). Get it with diffusers' names."
        ) from error
    return {owners[id(mark)]: split_key(key)[0] for key, mark in renamed.items()}


def _layers(network: nn.Module) -> list[Layer]:
    """Every linear layer and convolution of a network; none of those that PEFT has added."""
    wrapped = {path: module for path, module in network.named_modules() if isinstance(module, LoraLayer)}
    inside = tuple(f"{path}." for path in wrapped)
    plain = {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not path.startswith(inside)
    }
    return [Layer(path, module) for path, module in plain.items() if path not in wrapped] + [
        Layer(path, module.get_base_layer()) for path, module in wrapped.items()
    ]


def _name_in_header(base: Base, path: str) -> str:
    """What `LoraHeader.modules` calls one of the network's modules, whatever key style the file has."""
    return split_key(base.lora_key(path) + ".alpha")[0]
