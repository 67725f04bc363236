"""The order of samples: from (seed, position) alone, so that a resumed run sees what it would have seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray


class Order:
    """The endless shuffled stream of sample numbers over one or several buckets.

    buckets: sample numbers by latent shape. group: how many samples one update of all processes together
    takes; they are all of one bucket. seed: decides all that is shuffled. Raises ValueError for an empty
    bucket.

    Each bucket is an endless stream of its own, shuffled anew at every pass, so nothing is left out at the
    end of a pass. Groups come in rounds, in which every bucket gets groups in proportion to its samples, in
    shuffled order. So which bucket a group has, and how often that one came before, is known at any position
    without going through those before it.
    """

    def __init__(self, buckets: Sequence[NDArray], group: int, seed: int):
        self.buckets, self.group, self.seed = [np.asarray(b, np.int32) for b in buckets], group, seed
        self._counts = np.array([len(b) for b in buckets], np.int64)
        if not len(self._counts) or not self._counts.all():
            raise ValueError(f"There are {len(buckets)} buckets of {self._counts.tolist()} samples: none may be empty.")
        self._counts_in_round = self._counts // np.gcd.reduce(self._counts)
        # The last shuffles, each with the number of the round or pass that it is of. An entry is replaced as
        # one, so that threads see whole ones.
        self._rounds: tuple[int, NDArray, NDArray] | None = None
        self._passes: dict[int, tuple[int, NDArray]] = {}

    def samples(self, position: int, count: int) -> list[int]:
        """`count` sample numbers from a position of the stream on."""
        numbers: list[int] = []
        while len(numbers) < count:
            group, at = divmod(position + len(numbers), self.group)
            bucket, before = self._bucket(group)
            some = min(self.group - at, count - len(numbers))
            numbers += self._from_bucket(bucket, before * self.group + at, some)
        return numbers

    def _bucket(self, group: int) -> tuple[int, int]:
        """The bucket of a group, and how many groups before it had the same."""
        if len(self.buckets) == 1:
            return 0, group
        number, at = divmod(group, int(self._counts_in_round.sum()))
        last = self._rounds
        if last is None or last[0] != number:
            labels = np.repeat(np.arange(len(self.buckets), dtype=np.int32), self._counts_in_round)
            labels = labels[shuffled(len(labels), self.seed, number, -1 - len(self.buckets))]
            # sorted by bucket, each group's place less where its bucket starts is how many of the same are before it
            before = np.empty(len(labels), np.int32)
            starts = np.repeat(self._counts_in_round.cumsum() - self._counts_in_round, self._counts_in_round)
            before[np.argsort(labels, kind="stable")] = np.arange(len(labels)) - starts
            last = self._rounds = number, labels, before
        bucket = int(last[1][at])
        return bucket, number * int(self._counts_in_round[bucket]) + int(last[2][at])

    def _from_bucket(self, bucket: int, position: int, count: int) -> list[int]:
        """At most `count` samples, at least 1, of a bucket's own stream: as many as are left of the pass."""
        number, at = divmod(position, int(self._counts[bucket]))
        last = self._passes.get(bucket)
        if last is None or last[0] != number:
            order = self.buckets[bucket][shuffled(len(self.buckets[bucket]), self.seed, number, -1 - bucket)]
            last = self._passes[bucket] = number, order
        return last[1][at : at + count].tolist()


def shuffled(count: int, *seed: int) -> NDArray:
    """(count,) the numbers from 0 to count - 1, in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed_of(*seed))
    return torch.randperm(count, generator=generator).numpy()


def seed_of(*parts: int) -> int:
    """A 63-bit seed from integers."""
    sequence = np.random.SeedSequence([p & 0xFFFFFFFFFFFFFFFF for p in parts])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1
