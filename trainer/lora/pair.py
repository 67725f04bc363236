"""The two factors of a LoRA on one layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .dora import at_lengths


@dataclass(frozen=True)
class Pair:
    """One module's factors as stored: down (rank, in, *kernel), up (out, rank, *1).

    To the module's weight (out, in, *kernel) it adds scale * up @ down, with scale = alpha / rank. magnitude: of a
    DoRA, the lengths (out,) that the rows of the sum are brought to.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight that it is for: (out, in, *kernel)."""
        return len(self.up), *self.down.shape[1:]

    def delta(self, weight: Tensor) -> Tensor:
        """What it adds to this weight, in fp32 on the weight's device."""
        down, up = (factor.to(weight.device, torch.float32).flatten(1) for factor in (self.down, self.up))
        added = self.scale * (up @ down).view(weight.shape)
        if self.magnitude is None:
            return added
        whole = weight.float() + added
        return at_lengths(whole, self.magnitude) - weight.float()

    def without_unused_ranks(self) -> Pair:
        """The same without the ranks whose part of up is 0; as it is where all of it is."""
        used = self.up.flatten(1).float().any(0)
        if used.all() or not used.any():
            return self
        rank = int(used.sum())
        return replace(self, down=self.down[used], up=self.up[:, used], alpha=self.alpha * rank / self.rank)


def check_sums(pairs: Iterable[Pair]) -> None:
    """Raise ValueError for a DoRA's among pairs whose factors alone are to be added up, approximated or written."""
    if any(pair.magnitude is not None for pair in pairs):
        raise ValueError(
            "A DoRA's magnitudes are in no sum of factors: what it adds hangs on the weights of its base. Bring it to "
            "a plain LoRA first, see pcm extract."
        )


def in_16_bits(dtype: torch.dtype) -> torch.dtype:
    """The precision in which factors of this one are computed with: fp16 holds all numbers of 8 bits, between which and
    other precisions torch knows no common one."""
    return torch.float16 if dtype.itemsize == 1 else dtype
