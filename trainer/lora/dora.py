"""DoRA (arXiv 2402.09353): a LoRA whose rows have lengths of their own, m (W + s B A) / |W + s B A| row by row.

PEFT trains and diffusers reads the magnitude m as the length that a row comes to. ComfyUI multiplies the same rows by
`dora_scale` / |W|, by the length that they have in the base, so that its magnitude is another number for the same
weight. Both take |W + s B A| for a constant, through which no gradient goes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # which takes seconds, and files of LoRAs need nothing of
    from peft.tuners.lora import LoraLayer


def lengths(weight: Tensor) -> Tensor:
    """(out,) lengths of the rows of a weight (out, in, *kernel), in fp32."""
    return weight.float().flatten(1).norm(dim=1)


def by_row(vector: Tensor, weight: Tensor) -> Tensor:
    """A vector with a number for each row as (out, 1, ...), to be multiplied with a weight (out, in, *kernel)."""
    return vector.reshape(-1, *[1] * (weight.ndim - 1))


def at_lengths(weight: Tensor, magnitude: Tensor) -> Tensor:
    """A weight (out, in, *kernel) whose rows are brought to these lengths, in any shape of (out) numbers."""
    return by_row(magnitude.to(weight).flatten() / lengths(weight), weight) * weight


def is_dora(layer: LoraLayer, name: str) -> bool:
    """Whether adapter `name` has magnitudes in this layer."""
    return name in layer.lora_magnitude_vector


def factors(layer: LoraLayer, name: str, weight: Tensor) -> Tensor:
    """(out,) by how much adapter `name` multiplies each row of weight = W + s B A; differentiable in the magnitudes."""
    return layer.lora_magnitude_vector[name].weight.flatten() / lengths(weight.detach())


@torch.no_grad()
def sum_of(layer: LoraLayer, name: str) -> Tensor:
    """W + s B A (out, in, *kernel) of a layer with adapter `name`, in fp32 and without magnitudes."""
    weight = layer.get_base_layer().weight
    a, b = (part[name].weight.float().flatten(1) for part in (layer.lora_A, layer.lora_B))
    return weight.to(a.device).float() + layer.scaling[name] * (b @ a).view(weight.shape)


@torch.no_grad()
def match_magnitudes(layer: LoraLayer, name: str) -> None:
    """Let the magnitudes be the lengths of the rows as they are, in fp32, so that they change nothing.

    Raises ValueError for a row of zeros, which has no direction.
    """
    rows = lengths(sum_of(layer, name))
    if not rows.is_meta and not rows.all():
        raise ValueError(f"{int((rows == 0).sum())} of its {len(rows)} rows are 0")
    magnitude = layer.lora_magnitude_vector[name].weight
    magnitude.data = rows.view(magnitude.shape)
