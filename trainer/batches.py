"""What each forward pass of a run sees: samples in shuffled order, and every random draw, from (seed, samples seen,
rank) alone, so that a resumed run sees what it would have seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .adversarial import Judged
from .data.cache import LatentCache
from .engine import Batch
from .families import Base, Condition
from .objectives import Levels, Objective


class Batches:
    """The batches of one process: `size` samples each, `processes` of them side by side.

    updates, accumulation: of the whole run, and forward passes for each: an objective's curriculum goes by the updates.
    empty: the encoding of the empty prompt, which is what a dropped prompt becomes, whatever guidance subtracts.
    judged: whether an adversary needs its own levels and noise.
    """

    def __init__(
        self,
        cache: LatentCache,
        base: Base,
        objective: Objective,
        empty: Condition,
        *,
        size: int,
        updates: int,
        accumulation: int = 1,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        judged: bool = False,
    ):
        self.cache, self.base, self.objective, self.empty = cache, base, objective, empty
        self.size, self.updates, self.accumulation, self.judged = size, updates, accumulation, judged
        self.seed, self.rank, self.processes = seed, rank, processes
        self._epoch: int | None = None
        self._order: list[int] = []

    def at(self, number: int) -> tuple[list[int], Batch]:
        """The sample numbers and the batch of the run's forward pass `number`, from 0."""
        seen = number * self.size * self.processes
        samples = [self._shuffled(seen + self.rank * self.size + i) for i in range(self.size)]
        generator = torch.Generator().manual_seed(seed_of(self.seed, seen, self.rank))
        x0 = self.cache.latents(samples, generator)
        noise = torch.randn(x0.shape, generator=generator)
        progress = number // self.accumulation / self.updates
        levels = self.objective.levels(self.size, self.base.schedule, progress, generator)
        guidance = self.objective.draw_guidance(self.size, progress, generator)
        dropped = self.objective.draw_dropped(self.size, generator)
        judged = None
        if self.judged:
            tick = self.objective.judged_at(levels, generator)
            judged = Judged(self._move(tick), *self._move(torch.randn(2, *x0.shape, generator=generator)))
        guidance = None if guidance is None else self._move(guidance)
        condition = self.condition(samples, dropped)
        levels = Levels(*map(self._move, (levels.u, levels.r, levels.s)))
        return samples, Batch(self._move(x0), self._move(noise), levels, guidance, condition, progress, judged)

    def condition(self, samples: Sequence[int], dropped: Tensor | None = None) -> Condition:
        """The samples' prompt encodings, `empty` in place of dropped ones, and their true sizes where they count."""
        encodings = self.cache.encoding([self.cache.captions[i] for i in samples])
        condition = {k: self._move(v) for k, v in encodings.items()}
        if dropped is not None and dropped.any():
            for key, row in self.empty.items():
                condition[key][dropped.to(row.device)] = row[0]
        if self.base.knows_sizes:
            condition["time_ids"] = self._move(self.cache.sizes(samples))
        return condition

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.base.device, non_blocking=True)

    def _shuffled(self, position: int) -> int:
        """Sample number at a position of the endless, epoch-wise shuffled stream."""
        epoch, at = divmod(position, len(self.cache))
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, -1))
            self._epoch, self._order = epoch, torch.randperm(len(self.cache), generator=generator).tolist()
        return self._order[at]


def seed_of(*parts: int) -> int:
    """A 63-bit seed from integers."""
    return int(np.random.SeedSequence([p & 0xFFFFFFFFFFFFFFFF for p in parts]).generate_state(1, np.uint64)[0] >> 1)
