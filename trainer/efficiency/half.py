"""A base in 16 bits that is run in 16 bits, without autocast: what its layers hand on stays as small as it is.

Autocast takes every norm to fp32 and leaves its result so; a product after it casts it back, and PEFT casts once more
for the factors of the LoRA. Here norms round their own results, which is the rounding that the next product would do,
and the LoRA's factors, which stay fp32, are cast for each product and added in the sum that a product ends with.
"""

from __future__ import annotations

from functools import wraps

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..lora.adapter import NAME, Adapter
from ..lora.dora import factors, is_dora, sum_of


def run_in_half(adapter: Adapter) -> None:
    """Let an adapter's network run in its own 16 bits, whatever autocast is on around it."""
    network = adapter.network
    network.forward = _without_autocast(network)
    add_in_one_product(adapter)


def add_in_one_product(adapter: Adapter) -> None:
    """Let each layer of the adapter add its part to the base layer's result in one product, in the base's dtype.

    It does so while no other adapter is on.
    """
    for layer in adapter.layers.values():
        layer.forward = _adding(layer)


def _without_autocast(network: nn.Module):
    """The network's forward with autocast off."""
    run = network.forward

    @wraps(run)
    def forward(*args, **kwargs):
        with torch.autocast(next(network.parameters()).device.type, enabled=False):
            return run(*args, **kwargs)

    return forward


def _adding(layer: LoraLayer):
    """The layer's forward: base(x) + s B A x, with the factors cast to what the base answers in."""
    by_peft, base = layer.forward, layer.get_base_layer()

    @wraps(by_peft)
    def forward(x: Tensor, *args, **kwargs) -> Tensor:
        alone = layer.active_adapters == [NAME] and not layer.merged
        if not alone or args or kwargs:
            return by_peft(x, *args, **kwargs)
        if layer.disable_adapters:
            return base(x)

        x = x.to(base.weight.dtype)
        y = base(x)
        down, up, strength = layer.lora_A[NAME], layer.lora_B[NAME], layer.scaling[NAME]
        a, b = down.weight.to(y.dtype), up.weight.to(y.dtype)
        h = F.linear(x, a) if isinstance(down, nn.Linear) else down._conv_forward(x, a, None)
        if isinstance(strength, Tensor):  # the number by which compiled code is switched
            h, strength = h * strength, 1.0
        if isinstance(up, nn.Linear):
            z = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), b.t(), alpha=strength).view(y.shape)
        else:
            z = torch.add(y, up._conv_forward(h, b, None), alpha=strength)
        return _at_magnitudes(layer, base, z) if is_dora(layer, NAME) else z

    return forward


def _at_magnitudes(layer: LoraLayer, base: nn.Linear | nn.Conv2d, z: Tensor) -> Tensor:
    """What a DoRA makes of z = base(x) + s B A x: each row of the weight times its factor, and the bias as it is.

    As what is added to z: a factor so near to 1 would lose most of its digits in 16 bits.
    """
    change = (factors(layer, NAME, sum_of(layer, NAME)) - 1).to(z.dtype)
    sides = (1, -1) + (1,) * (z.ndim - 2) if isinstance(base, nn.Conv2d) else (-1,)
    without_bias = z if base.bias is None else z - base.bias.view(sides)
    return torch.addcmul(z, without_bias, change.view(sides))
