"""Which samples training never sees: decided by the seed and the cache alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .order import shuffled

# Fewer samples than this are all needed for training; of more, at most one in SHARE is held out.
LEAST, SHARE = 20, 10
HELD_OUT = -1  # in a seed, where positions of the stream are from 0 on


@dataclass(frozen=True)
class HeldOut:
    """samples: their numbers, ascending; known: how many of them have a caption that training sees too."""

    samples: NDArray = field(default_factory=lambda: np.empty(0, np.int64))
    known: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[int]:
        return iter(self.samples.tolist())

    def sentence(self, asked: int, there: int) -> str:
        """What became of `asked` held-out samples among those that are `there`; empty where none was asked for."""
        if not asked:
            return ""
        if not len(self):
            return f"None of the {there} samples is held out: that takes {LEAST} or more."
        known = f"; training sees the captions of {self.known} of them" if self.known else ""
        return f"{len(self)} of {there} samples are held out{known}."


def most_held_out(there: int, asked: int) -> int:
    """How many samples of those that are there can be held out."""
    return min(asked, there // SHARE) if there >= LEAST else 0


def hold_out(prompts: NDArray, buckets: Sequence[NDArray], count: int, seed: int) -> HeldOut:
    """Up to `count` samples, with all others of their captions, so that training sees neither.

    prompts: (N,) each sample's prompt, by number. buckets: sample numbers by latent shape; none is emptied.
    Captions that too many samples share are not held out whole. Where the others give less than half of `count`, single
    samples make up for it.
    """
    there = len(prompts)
    count = most_held_out(there, count)
    if not count:
        return HeldOut()
    bucket = np.empty(there, np.int64)
    for number, samples in enumerate(buckets):
        bucket[samples] = number
    left, taken = np.bincount(bucket), []

    def take(samples: NDArray) -> None:
        nonlocal left
        after = left - np.bincount(bucket[samples], minlength=len(left))
        if (after > 0).all():
            left = after
            taken.extend(samples.tolist())

    different, times = np.unique(prompts, return_counts=True)
    for at in shuffled(len(different), seed, HELD_OUT):
        if times[at] <= count - len(taken):
            take(np.flatnonzero(prompts == different[at]))
        if len(taken) == count:
            break
    if len(taken) < count / 2:
        for sample in shuffled(there, seed, HELD_OUT):
            if len(taken) == count:
                break
            if sample not in taken:
                take(np.array([sample]))
    samples = np.sort(np.array(taken, np.int64))
    trained = np.ones(there, bool)
    trained[samples] = False
    return HeldOut(samples, int(np.isin(prompts[samples], prompts[trained]).sum()))
