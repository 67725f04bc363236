"""The bundled narrow autoencoders as a TAESD of the one size that hosts build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

WIDTH = 64  # TAESD's channels
BLOCKS = {"encoder": (1, 3, 3, 3), "decoder": (3, 3, 3, 1)}  # TAESD's blocks in each stage
# the tensors of one block -> their shapes
BLOCK = {
    f"conv.{i}.{leaf}": size for i in (0, 2, 4) for leaf, size in (("weight", (WIDTH, WIDTH, 3, 3)), ("bias", WIDTH))
}


def full_size(weights: Mapping[str, Tensor], encoder: Sequence[int], decoder: Sequence[int]) -> dict[str, Tensor]:
    """The weights, by diffusers' names, of an `AutoencoderTiny` of TAESD's size that does what a smaller one does.

    Channels beyond the smaller one's are zero, and so are the blocks that it lacks. A block of zeros passes
    its input
    on: it is relu(input + 0), and stands after a block, whose ReLU leaves nothing below zero. encoder,
    decoder: the smaller one's blocks in each stage.
    """
    width = len(weights["encoder.layers.0.weight"])
    widened: dict[str, Tensor] = {}
    for side, blocks in (("encoder", encoder), ("decoder", decoder)):
        convs, stages = layers_of(side, blocks)
        new_convs, new_stages = layers_of(side, BLOCKS[side])
        positions = dict(zip(convs, new_convs, strict=True))
        for stage, new_stage in zip(stages, new_stages, strict=True):
            positions |= dict(zip(stage, new_stage, strict=False))
            for layer in new_stage[len(stage) :]:
                zeros = {f"{side}.layers.{layer}.{name}": size for name, size in BLOCK.items()}
                widened |= {name: weights["encoder.layers.0.weight"].new_zeros(size) for name, size in zeros.items()}
        for name, weight in weights.items():
            if name.startswith(side):
                _, _, layer, rest = name.split(".", 3)
                widened[f"{side}.layers.{positions[int(layer)]}.{rest}"] = _widened(weight, width)
    return widened


def layers_of(side: str, blocks: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """The layers' numbers in an `AutoencoderTiny`: its single convolutions, and the blocks of each stage."""
    kinds = ["conv"]
    for stage, count in enumerate(blocks):
        if side == "encoder":
            kinds += [*([stage] * count), "conv"]
        else:
            kinds += [*(["relu"] if stage == 0 else []), *([stage] * count)]
            kinds += ["conv"] if stage == len(blocks) - 1 else ["upsample", "conv"]
    stages = [[i for i, kind in enumerate(kinds) if kind == stage] for stage in range(len(blocks))]
    return [i for i, kind in enumerate(kinds) if kind == "conv"], stages


def _widened(weight: Tensor, width: int) -> Tensor:
    """The weight with zeros up to TAESD's channels, along the axes that have the narrow one's number of them."""
    ends = [0, 0] * max(weight.ndim - 2, 0)  # F.pad counts from the last axis
    for size in reversed(weight.shape[:2]):
        ends += [0, WIDTH - size if size == width else 0]
    return F.pad(weight, ends)
