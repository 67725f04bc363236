"""The samples that training never sees: decided by the seed and the cache alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .order import shuffled

# Fewer than LEAST samples are all needed for training; of more, at most one in SHARE is held out.
LEAST, SHARE = 20, 10
# Marks this shuffling's seed, in the place where those of the stream have a position from 0 on.
HELD_OUT = -1


@dataclass(frozen=True)
class HeldOut:
    """The samples that training never sees.

    samples: their numbers, ascending. known: how many of them have a caption that training sees too.
    """

    samples: NDArray = field(default_factory=lambda: np.empty(0, np.int64))
    known: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[int]:
        return iter(self.samples.tolist())

    def sentence(self, wanted: int, total: int) -> str:
        """How many of `total` samples are held out, where `wanted` of them should be; "" where none should."""
        if not wanted:
            return ""
        if not len(self):
            return f"None of the {total} samples is held out: that takes {LEAST} or more."
        known = f"; training sees the captions of {self.known} of them" if self.known else ""
        return f"{len(self)} of {total} samples are held out{known}."


def most_held_out(total: int, wanted: int) -> int:
    """How many of `total` samples are held out at most, where `wanted` of them should be."""
    return min(wanted, total // SHARE) if total >= LEAST else 0


def hold_out(prompts: NDArray, buckets: Sequence[NDArray], count: int, seed: int) -> HeldOut:
    """Hold out up to `count` samples, each with all others of its caption, so that training sees neither.

    prompts: (N,) a number for each sample, the same for all that share a caption. buckets: sample numbers by
    latent shape; none is emptied. A caption that too many samples share is not held out. Where the others give
    less than half of `count`, single samples make up for it.
    """
    total = len(prompts)
    count = most_held_out(total, count)
    if not count:
        return HeldOut()

    bucket = np.empty(total, np.int64)
    for number, samples in enumerate(buckets):
        bucket[samples] = number
    remaining = np.bincount(bucket)
    chosen: list[int] = []

    def take(samples: NDArray) -> None:
        """Hold these out, unless that would empty a bucket."""
        nonlocal remaining
        after = remaining - np.bincount(bucket[samples], minlength=len(remaining))
        if (after > 0).all():
            remaining = after
            chosen.extend(samples.tolist())

    different, times = np.unique(prompts, return_counts=True)
    for at in shuffled(len(different), seed, HELD_OUT):
        if times[at] <= count - len(chosen):
            take(np.flatnonzero(prompts == different[at]))
        if len(chosen) == count:
            break

    if len(chosen) < count / 2:
        for sample in shuffled(total, seed, HELD_OUT):
            if len(chosen) == count:
                break
            if sample not in chosen:
                take(np.array([sample]))

    samples = np.sort(np.array(chosen, np.int64))
    trained = np.ones(total, bool)
    trained[samples] = False
    return HeldOut(samples, int(np.isin(prompts[samples], prompts[trained]).sum()))
