"""A saved LoRA, reloaded through diffusers, against the weights that were meant to be in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..families import Base
from .adapter import NAME, Adapter
from .install import install


@dataclass(frozen=True)
class SelfTest:
    """modules: in the file; unmatched: how many of them diffusers did not take; weights_error: |file - meant| / |meant|
    over what all modules add to their weights; the output of the reloaded file against that of the weights meant to be
    in it: greatest and root-mean-square difference, and the LoRA's own effect and the output's size as root mean
    squares, for scale (a base in bf16 rounds its outputs more than a LoRA may change them)."""

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
    """Reload a saved LoRA through diffusers beside the adapter, and compare their outputs on one noisy point."""
    shape = base.latent_shape(base.default_resolution)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(base.device)
    tick = torch.tensor([base.schedule.ticks // 2], device=base.device)
    condition = {k: v[:1].to(base.device) for k, v in condition.items()}
    meant = base.denoise(x, tick, condition)
    with adapter.off():
        bare = base.denoise(x, tick, condition)
    modules, unmatched = install(path, base, "selftest")
    try:
        base.network.set_adapters("selftest")
        reloaded = base.denoise(x, tick, condition)
        weights_error = _weights_error(adapter, "selftest")
    finally:
        base.network.set_adapters(NAME)
        base.network.delete_adapters("selftest")
    difference = (reloaded - meant).abs()
    sizes = _rms(difference), _rms(meant - bare), _rms(meant)
    return SelfTest(modules, unmatched, weights_error, difference.max().item(), *sizes)


def _weights_error(adapter: Adapter, loaded: str) -> float:
    error, size = 0.0, 0.0
    for layer in (m for m in adapter.layers.values() if loaded in m.lora_A):
        meant, found = (layer.get_delta_weight(name).float() for name in (NAME, loaded))
        error += (found.to(meant.device) - meant).square().sum().item()  # offload keeps what is loaded in main memory
        size += meant.square().sum().item()
    return (error / size) ** 0.5 if size else 0.0


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
