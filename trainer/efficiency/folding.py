"""A LoRA folded into its weights where that is cheaper: (W + s B A) x instead of W x + s B (A x).

The two are the same up to rounding. In a full-size network the factors beside a weight cost little; where
layers are not much wider than the rank they cost as much as the layer itself. Weights are folded in fp32
alone: what the factors add is often smaller than a weight's own last digit in bf16 or fp16, and would be lost
in the sum (see `half.py`).
"""

from __future__ import annotations

from functools import wraps
from math import prod

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..lora.adapter import CRITIC, NAME, Adapter
from ..lora.dora import by_row, factors, is_dora


def fold_where_cheaper(adapter: Adapter) -> None:
    """Let each layer of the adapter choose between the two in every pass, by how many multiplications they take.

    It chooses while an adapter that a run trains is on, and no other. Layers that are not plain (quantised
    ones, say) stay as they are.
    """
    for layer in adapter.layers.values():
        base = layer.get_base_layer()
        if type(base) in (nn.Linear, nn.Conv2d) and type(base.weight) is nn.Parameter:
            layer.forward = _folding(layer, base)


def _folding(layer: LoraLayer, base: nn.Linear | nn.Conv2d):
    """The layer's forward, folded where that is allowed and cheaper."""
    unfolded = layer.forward

    @wraps(unfolded)
    def forward(x: Tensor, *args, **kwargs) -> Tensor:
        alone = not layer.disable_adapters and layer.active_adapters in ([NAME], [CRITIC])
        if not alone or base.weight.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
            return unfolded(x, *args, **kwargs)

        (name,) = layer.active_adapters
        a, b = layer.lora_A[name].weight.flatten(1), layer.lora_B[name].weight.flatten(1)
        if not cheaper(_places(base, x), a.shape[1], len(b), len(a), torch.is_grad_enabled()):
            return unfolded(x, *args, **kwargs)

        weight = base.weight + layer.scaling[name] * (b @ a).view_as(base.weight)
        if is_dora(layer, name):
            weight = weight * by_row(factors(layer, name, weight), weight)
        if isinstance(base, nn.Linear):
            return F.linear(x, weight, base.bias)
        return base._conv_forward(x, weight, base.bias)

    return forward


def cheaper(places: int, inner: int, out: int, rank: int, with_gradient: bool) -> bool:
    """Whether folding takes fewer multiplications, for a weight (out, inner) that is applied to `places` vectors.

    Beside the weight, the factors take rank * (inner + out) for each vector, and with a gradient three times
    that: for the output, the input's gradient and their own. Folded, B A takes rank * out * inner once, with
    a gradient three times that, and the weight's gradient out * inner for each vector.
    """
    beside = places * rank * (inner + out)
    folded = rank * out * inner
    if with_gradient:
        beside = 3 * beside
        folded = 3 * folded + places * out * inner
    return folded < beside


def _places(base: nn.Linear | nn.Conv2d, x: Tensor) -> int:
    """How many vectors the weight is applied to: the input's rows, or a convolution's places in its output."""
    if isinstance(base, nn.Linear):
        return prod(x.shape[:-1])
    return x.shape[0] * prod(x.shape[2:]) // prod(base.stride)
