"""Which of a network's layers each module of a LoRA file is for, whatever the file calls it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from ...samplers.lora_file import LoraHeader
from ...samplers.lora_modules import LoraModule
from ...samplers.lora_names import split_key
from ...samplers.texts import brief
from ..families import Base
from ..tiny.single_file import diffusers_modules, has_swapped_halves
from .pair import Pair

# kohya's names of a UNet's blocks in the original layout
OTHER_LAYOUT = re.compile(r"^lora_unet_(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)_\d")
NETWORK = re.compile("^lora_(unet|transformer)_")


class Layer(NamedTuple):
    """A linear layer or convolution, and its path in the network; where PEFT has wrapped it, what is inside."""

    path: str
    layer: nn.Module


class LayerRows(NamedTuple):
    """The rows of a module that are for one layer, whose `name` is that of diffusers' layout in kohya's style.

    They are these `parts`, in this order, of `of` equal ones: all of them, unless the module is q, k and v in one, or
    has its halves the other way round.
    """

    name: str
    parts: tuple[int, ...] = (0,)
    of: int = 1

    def fits(self, module: LoraModule, weight_shape: tuple[int, ...]) -> bool:
        """Whether it has the shape of this weight, (out, in, *kernel)."""
        out, rest = divmod(weight_shape[0] * self.of, len(self.parts))
        return not rest and module.fits((out, *weight_shape[1:]))

    def pair(self, module: LoraModule, tensors: Mapping[str, Tensor], alpha: float | None) -> Pair:
        """The layer's factors, of a file's tensors; None for alpha stands for the rank, as every loader takes it."""
        down, up = (tensors[module.keys[part]] for part in ("down", "up"))
        alpha = float(len(down)) if alpha is None else alpha
        magnitude = tensors[module.keys["magnitude"]].flatten() if "magnitude" in module.keys else None
        if self.of == 1:
            return Pair(down, up, alpha, magnitude)
        up, magnitude = (rows if rows is None else self._rows_of(rows) for rows in (up, magnitude))
        # down is copied, as a file holds no tensor under two names; sd-scripts' split_qkv lays three LoRAs into one of
        # three times their rank
        return Pair(down.clone(), up, alpha, magnitude).without_unused_ranks()

    def _rows_of(self, rows: Tensor) -> Tensor:
        chunks = rows.chunk(self.of)
        return torch.cat([chunks[part] for part in self.parts])


class Target(NamedTuple):
    """A layer, the `module` that is for it by its name in the header, and the rows of that."""

    layer: Layer
    module: str
    rows: LayerRows


@dataclass(frozen=True)
class Targets:
    """A LoRA's `modules` for the network by their names in the header, the `layers` that they are for, and the names of
    those modules that are `unmatched` by any."""

    modules: dict[str, LoraModule]
    layers: list[Target]
    unmatched: list[str]

    def pairs(self, header: LoraHeader) -> Iterator[tuple[Layer, Pair]]:
        """Every layer and its factors, read from the file."""
        tensors, alphas = load_file(header.path), header.alphas()
        for layer, name, rows in self.layers:
            yield layer, rows.pair(self.modules[name], tensors, alphas.get(name))


def targets_of(header: LoraHeader, base: Base) -> Targets:
    """The layers of a base's network that a LoRA's modules are for, by their names and shapes.

    header: of plain modules alone (`check_plain`). Raises ValueError where two modules are for one layer, and as
    `rows_of`.
    """
    parts = rows_of(header, type(base), getattr(base.network.config, "layers_per_block", None))
    layers = {_name_in_header(type(base), layer.path): layer for layer in _layers(base.network)}
    modules, targets, unmatched = header.network, {}, []
    for name, module in modules.items():
        matched = [(layers[rows.name], rows) for rows in parts[name] if rows.name in layers]
        fitting = [rows.fits(module, tuple(layer.layer.weight.shape)) for layer, rows in matched]
        if len(matched) < len(parts[name]) or not all(fitting):
            unmatched.append(name)
            continue
        for layer, rows in matched:
            if other := targets.get(layer.path):
                names = f"{other.module} and {name}"
                raise ValueError(f"{header.path.name} has {layer.path} under two names, {names}. Get it again.")
            targets[layer.path] = Target(layer, name, rows)
    return Targets(modules, list(targets.values()), sorted(unmatched))


def rows_of(header: LoraHeader, family: type[Base], layers_per_block: int | None) -> dict[str, tuple[LayerRows, ...]]:
    """Module of the network -> its rows for each layer that it is for: all for one, but in SD3's original layout.

    header: of plain modules alone. layers_per_block: of the network. Raises as `_diffusers_names`, and ValueError for
    rows that cannot be shared out.
    """
    if family.fuses_qkv:
        parts = {name: _sd3_rows(name, module, family) for name, module in header.network.items()}
    else:
        names = _diffusers_names(header, family, layers_per_block)
        parts = {name: (LayerRows(names.get(name, name)),) for name in header.network}
    for name, (first, *_) in parts.items():
        out = header.network[name].shapes["up"][0]
        if out % first.of:
            raise ValueError(
                f"{header.path.name}: {name} has {out} rows, which are no {first.of} equal parts. Get it again."
            )
    return parts


def _sd3_rows(name: str, module: LoraModule, family: type[Base]) -> tuple[LayerRows, ...]:
    """A module's rows for each layer that it is for, by its name in either of SD3's layouts."""
    bare = NETWORK.sub("", name)
    paths = diffusers_modules(bare)
    if not paths:
        return (LayerRows(f"lora_{family.component}_{bare}"),)
    names = [_name_in_header(family, path) for path in paths]
    if len(names) > 1:
        return tuple(LayerRows(each, (part,), len(names)) for part, each in enumerate(names))
    out, width = module.shapes["up"][0], module.shapes["down"][1]
    if has_swapped_halves(paths[0], out, width):
        return (LayerRows(names[0], (1, 0), 2),)
    return (LayerRows(names[0]),)


def _diffusers_names(header: LoraHeader, family: type[Base], layers_per_block: int | None) -> dict[str, str]:
    """Module -> its name in diffusers' layout, by diffusers itself, for those of the network that are named in a UNet's
    original layout (input_blocks, ...).

    layers_per_block: of the network. Raises ValueError for names that diffusers cannot map.
    """
    names = [name for name in header.network if OTHER_LAYOUT.search(name)]
    if not names:
        return {}
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


def _name_in_header(family: type[Base], path: str) -> str:
    """What `LoraHeader.modules` calls one of the network's modules, whatever key style the file has."""
    return split_key(family.lora_key(path) + ".alpha")[0]
