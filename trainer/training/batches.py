"""What each forward pass of a run sees, made ahead by a thread while the networks run.

Every random draw belongs to one sample's place in the run's endless stream, from (seed, place) alone. So a resumed run
sees what it would have seen, and an update sees the same samples, noise and levels however it is split into passes and
processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..data.held_out import HeldOut
from ..data.order import Order, seed_of
from ..data.store import LatentCache
from ..families import Base, Condition
from ..objectives import Draws, Levels, Objective
from .adversary import Judged
from .engine import Batch

T = TypeVar("T")
# noise, levels, guidance, whether the prompt is dropped, the judge's draws, those of a trajectory
Drawn = tuple[Tensor, Levels, Tensor | None, Tensor, Judged | None, Draws | None]
AHEAD = 2  # batches that wait for the networks
FIXED = -1  # stands in the seed of draws that belong to no place in the stream


@dataclass(frozen=True)
class Split:
    """How an update's samples are shared out: `size` a forward pass, `accumulation` passes, `processes` abreast."""

    size: int
    accumulation: int = 1
    processes: int = 1

    @property
    def update(self) -> int:
        """Samples of one update, all processes together."""
        return self.size * self.accumulation * self.processes

    def sentence(self) -> str:
        """How an update is made up, for people."""
        processes = f"{self.processes} process{'es' * (self.processes > 1)}"
        return f"{self.update} samples an update: {processes}, {self.accumulation} passes of {self.size} each"

    @classmethod
    def of_update(cls, samples: int, processes: int, most: int) -> Split:
        """An update of `samples` over this many processes, in passes of at most `most` samples, as few as there can be.

        Raises ValueError where the processes cannot share it evenly.
        """
        share, rest = divmod(samples, processes)
        if rest:
            able = ", ".join(str(n) for n in range(1, samples + 1) if samples % n == 0)
            raise ValueError(
                f"The run takes {samples} samples an update, which {processes} processes cannot share evenly. "
                f"Start one of these numbers: {able}; or use another output folder to start anew."
            )
        size = next(n for n in range(min(most, share), 0, -1) if share % n == 0)
        return cls(size, share // size, processes)


class Batches:
    """The batches of one process, on the CPU, in pinned memory where the base is on a GPU.

    split: of each update; rank: which of its processes this is. updates: of the whole run, which an objective's
    curriculum goes by. empty: the encoding of the empty prompt, which is what a dropped prompt becomes, whatever
    guidance subtracts. judged: whether an adversary needs its own levels and noise. held_out: samples that the stream
    never has. shape: of a latent (C, h, w), for a run without any.
    """

    def __init__(
        self,
        cache: LatentCache,
        base: Base,
        objective: Objective,
        empty: Condition,
        *,
        split: Split,
        updates: int,
        seed: int,
        rank: int = 0,
        judged: bool = False,
        held_out: HeldOut | None = None,
        shape: tuple[int, int, int] | None = None,
    ):
        self.cache = cache
        self.base = base
        self.objective = objective
        self.empty = empty
        self.split = split
        self.updates = updates
        self.judged = judged
        self.seed = seed
        self.rank = rank
        self.shape = shape
        self.held_out = held_out or HeldOut()
        buckets = [np.setdiff1d(bucket, self.held_out.samples) for bucket in cache.buckets]
        self.order = Order(buckets, split.update, seed)

    def at(self, number: int) -> tuple[list[int], Batch]:
        """The sample numbers and the batch of the run's forward pass `number`, from 0."""
        split = self.split
        first = (number * split.processes + self.rank) * split.size
        samples = self.order.samples(first, split.size)
        seeds = [seed_of(self.seed, first + i) for i in range(split.size)]
        return samples, self._batch(samples, seeds, number // split.accumulation / self.updates, self.judged)

    def fixed(self, samples: Sequence[int], draw: int, step: int = 0) -> Batch:
        """Samples of one shape as the last update would take them, or in a run with stages the one after update `step`,
        at the draws that belong to (seed, sample, draw); without a judge."""
        last = (self.updates - 1) / self.updates
        progress = self.objective.measured_at(min(step / self.updates, last), last)
        seeds = [seed_of(self.seed, sample, draw, FIXED) for sample in samples]
        return self._batch(samples, seeds, progress, judged=False)

    def _batch(self, samples: Sequence[int], seeds: Sequence[int], progress: float, judged: bool) -> Batch:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        draw = self._trajectory if self.objective.matching else self._draw
        x0 = None if self.objective.matching else self.cache.latents(samples, generators)
        shape = self.shape if x0 is None else x0.shape[1:]
        drawn = [draw(shape, progress, generator, judged) for generator in generators]
        noise, levels, guidance, dropped, judges, draws = (_stacked(column) for column in zip(*drawn, strict=True))
        batch = Batch(
            x0=x0,
            noise=noise,
            levels=levels,
            guidance=guidance,
            condition=self.condition(samples, dropped, seeds),
            progress=progress,
            judged=judges,
            draws=draws,
            inner=None if draws else (levels.r > levels.s).nonzero().squeeze(1),
        )
        return batch.pinned() if self.base.device.type == "cuda" else batch

    def _draw(self, shape: Sequence[int], progress: float, generator: torch.Generator, judged: bool) -> Drawn:
        """One sample's draws, each with a first dimension of 1.

        Their order is part of what a seed means: a draw that is left out, the judge's, must be the last.
        """
        objective = self.objective
        noise = torch.randn(1, *shape, generator=generator)
        levels = objective.levels(1, self.base.schedule, progress, generator)
        guidance = objective.draw_guidance(1, progress, generator)
        dropped = objective.draw_dropped(1, generator)
        judges = None
        if judged:
            judges = Judged(objective.judged_at(levels, generator), *torch.randn(2, 1, *shape, generator=generator))
        return noise, levels, guidance, dropped, judges, None

    def _trajectory(self, shape: Sequence[int], progress: float, generator: torch.Generator, judged: bool) -> Drawn:
        """`_draw` for a trajectory of an objective that matches distributions; the draws at its jumps come last."""
        noise, levels, guidance, dropped, *_ = self._draw(shape, progress, generator, judged=False)
        return noise, levels, guidance, dropped, None, self.objective.draws(levels, tuple(shape), generator)

    def condition(
        self, samples: Sequence[int], dropped: Tensor | None = None, seeds: Sequence[int] | None = None
    ) -> Condition:
        """The samples' prompt encodings, `empty` in place of dropped ones, and their true sizes where they count.

        seeds: draw one of a sample's several captions; without them it is the first.
        """
        captions = self.cache.captions
        visits = zip(samples, seeds or [0] * len(samples), strict=True)
        condition = self.cache.encoding([captions.drawn(sample, seed) for sample, seed in visits])
        if dropped is not None and dropped.any():
            for key, row in self.empty.items():
                condition[key][dropped] = row[0]
        if self.base.knows_sizes:
            condition["time_ids"] = self.cache.sizes(samples)
        return condition

    def ahead(self, first: int) -> Iterator[tuple[list[int], Batch]]:
        """`at` of every forward pass from `first` to the end of the run, made before it is asked for."""
        return made_ahead(self.at, range(first, self.updates * self.split.accumulation))


def made_ahead(make: Callable[[int], T], numbers: Iterable[int]) -> Iterator[T]:
    """make(n) for each number, by a thread that is up to AHEAD of them before; what it raises is raised here."""
    pool = ThreadPoolExecutor(1, "batches")
    numbers = iter(numbers)
    try:
        waiting = deque(pool.submit(make, n) for n in islice(numbers, AHEAD))
        while waiting:
            batch = waiting.popleft()
            # the next one is begun before this one is handed out, so that the thread never stands still
            waiting.extend(pool.submit(make, n) for n in islice(numbers, 1))
            yield batch.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _stacked(column: Sequence[Any]) -> Any:
    """Tensors, or the tensors of dataclasses, one after another; None for a column of nothing."""
    first = column[0]
    if first is None or isinstance(first, Tensor):
        return None if first is None else torch.cat(column)
    return replace(first, **{f.name: _stacked([getattr(row, f.name) for row in column]) for f in fields(first)})
