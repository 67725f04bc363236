"""Runs that train a network whole, from nothing: the folder that they write, and its test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.config import Config
from ..families import Base, load_base
from ..families.generate import probe
from ..lora.adapter import Learner
from ..lora.write import origin


def export(
    path: Path,
    weights: dict[str, Tensor],
    config: Config,
    base: Base,
    step: int,
    samples: int,
    changes: Sequence[dict[str, Any]] = (),
) -> None:
    """Write the network as a diffusers folder, which `load_base` reads; its header says what it was made by."""
    base.save(path, weights, origin(config, step, changes) | {"pcm.samples": str(samples)})


@dataclass(frozen=True)
class Reloaded:
    """The output of a folder that was read again, against that of the weights meant to be in it."""

    weights: int
    max_difference: float
    rms_output: float

    @property
    def passed(self) -> bool:
        return self.max_difference <= 1e-4 * self.rms_output and math.isfinite(self.rms_output)

    def sentence(self) -> str:
        return (
            f"{self.weights:,} weights, max difference {self.max_difference:.2g} when read again "
            f"(output rms {self.rms_output:.2g})"
        )


@torch.no_grad()
def self_test(path: Path, base: Base, learner: Learner, condition: dict[str, Tensor]) -> Reloaded:
    """Read a saved folder again, and compare its output with the network's own on one noisy point."""
    again = load_base(str(path), device=base.device)
    x, tick = probe(base)
    condition = {k: v[:1].to(base.device) for k, v in condition.items()}
    meant, reloaded = (one.denoise(x, tick, condition) for one in (base, again))
    return Reloaded(
        weights=sum(p.numel() for p in learner.parameters()),
        max_difference=(reloaded - meant).abs().max().item(),
        rms_output=meant.square().mean().sqrt().item(),
    )
