"""A saved LoRA, reloaded through diffusers, against the weights that were meant to be in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..families import Base
from ..families.generate import probe
from .adapter import NAME, Adapter
from .dora import at_lengths, is_dora, sum_of
from .install import install_by_diffusers

RELOADED = "selftest"  # what the file is called in the network while it is tried


@dataclass(frozen=True)
class SelfTest:
    """How a reloaded file compares with what was meant to be in it.

    modules: in the file. unmatched: how many of them diffusers did not take. weights_error: |file - meant| / |meant|
    over what all modules add to their weights. max_difference, rms_difference: between the outputs of the two, greatest
    and root mean square. rms_effect, rms_output: the LoRA's own effect and the output's size, for scale: a base in bf16
    rounds its outputs more than a LoRA may change them.
    """

    modules: int
    unmatched: int
    weights_error: float
    max_difference: float
    rms_difference: float
    rms_effect: float
    rms_output: float

    @property
    def passed(self) -> bool:
        return self.unmatched == 0 and self.weights_error <= 0.02 and math.isfinite(self.max_difference)

    def sentence(self) -> str:
        return (
            f"{self.unmatched} keys unmatched of {self.modules} modules, weights off by {self.weights_error:.2g} of "
            f"their size, max difference {self.max_difference:.2g} "
            f"(output rms {self.rms_output:.2g}, LoRA's effect {self.rms_effect:.2g})"
        )


@torch.no_grad()
def self_test(path: Path, base: Base, adapter: Adapter, condition: dict[str, Tensor]) -> SelfTest:
    """Reload a saved LoRA through diffusers beside the adapter, and compare their outputs on one noisy point.

    condition: a prompt's encoding (1, ...), of which the first is taken.
    """
    x, tick = probe(base)
    condition = {k: v[:1].to(base.device) for k, v in condition.items()}
    meant = base.denoise(x, tick, condition)
    with adapter.off():
        bare = base.denoise(x, tick, condition)

    modules, unmatched = install_by_diffusers(path, base, RELOADED)
    try:
        base.network.set_adapters(RELOADED)
        reloaded = base.denoise(x, tick, condition)
        weights_error = _weights_error(adapter)
    finally:
        adapter.activate()
        base.network.delete_adapters(RELOADED)

    difference = (reloaded - meant).abs()
    return SelfTest(
        modules=modules,
        unmatched=unmatched,
        weights_error=weights_error,
        max_difference=difference.max().item(),
        rms_difference=_rms(difference),
        rms_effect=_rms(meant - bare),
        rms_output=_rms(meant),
    )


def _weights_error(adapter: Adapter) -> float:
    """|reloaded - meant| / |meant| over the weights of all modules that the file has."""
    error, size = 0.0, 0.0
    for layer in adapter.layers.values():
        if RELOADED not in layer.lora_A:
            continue
        meant, reloaded = (_added(layer, name) for name in (NAME, RELOADED))
        # with offload, what diffusers loads lies in main memory while the adapter is on the device
        error += (reloaded.to(meant.device) - meant).square().sum().item()
        size += meant.square().sum().item()
    return (error / size) ** 0.5 if size else 0.0


def _added(layer: LoraLayer, name: str) -> Tensor:
    """What an adapter adds to the layer's weight, in fp32.

    A DoRA's magnitudes are taken in the dtype of the reloaded ones, the base's own: what diffusers rounds in 16 bits is
    no fault of the file.
    """
    if not is_dora(layer, name):
        return layer.get_delta_weight(name).float()
    weight = sum_of(layer, name)
    dtype = layer.lora_magnitude_vector[RELOADED].weight.dtype if is_dora(layer, RELOADED) else torch.float32
    magnitude = layer.lora_magnitude_vector[name].weight.to(dtype)
    return at_lengths(weight, magnitude) - layer.get_base_layer().weight.to(weight.device).float()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
