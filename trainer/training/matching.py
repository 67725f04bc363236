"""One update of distribution matching: the student's trajectory from noise, the critic's updates on it, the student's.

    unrolled          the student's own samples: from noise through its jumps, without gradient
    opponent_passes   the critic's loss at each landing, at levels and noise of its own
    passes            the student's loss at each jump, started where its trajectory came through

What the objective's loss is made of is in `objectives/matching.py`. All jumps of a trajectory are trained in one
update, so that its unrolling is paid once, and jump by jump, so that the memory is that of one. The critic's updates
see the same landings, since the student does not move while they are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...samplers import jump, renoise
from ..families import Base, Condition
from ..lora.adapter import Adapter
from ..objectives import Criticised, Jumps, Levels, Matched, Matching
from ..system.clock import Clock
from .critic import Critic
from .engine import Batch, Engine, Losses


@dataclass(frozen=True)
class Unrolled:
    """The student's trajectories of a batch, without gradient: by jump, the start, the student's x0 there and where it
    landed, (B, C, h, w) each."""

    batch: Batch
    starts: list[Tensor]
    x0: list[Tensor]
    landings: list[Tensor]


class MatchingEngine(Engine):
    """The networks of a run that matches distributions: the base, the student's adapter and the critic's."""

    objective: Matching

    def __init__(
        self,
        base: Base,
        adapter: Adapter,
        objective: Matching,
        null: Condition,
        critic: Critic,
        clock: Clock | None = None,
    ):
        super().__init__(base, adapter, objective, null, clock=clock)
        self.critic = critic

    @property
    def opponent(self) -> Critic:
        return self.critic

    @torch.no_grad()
    def unrolled(self, batch: Batch) -> Unrolled:
        """The student's own samples: from noise through the starts of its jumps, as it is sampled."""
        starts, predicted, landings = [], [], []
        x = batch.noise  # all of it, as samplers start (`samplers/editing.py:noised`)
        with self.clock.part("trajectory"):
            for k in range(self.objective.jumps):
                u, s = batch.levels.u[:, k], batch.levels.s[:, k]
                x0, eps = self._predict(x, u, batch.condition)
                starts.append(x)
                predicted.append(x0)
                landings.append(jump(x0, eps, *self._level(s)))
                if k + 1 < self.objective.jumps:
                    x = self._next_start(x0, eps, k, batch)
        return Unrolled(batch, starts, predicted, landings)

    def _next_start(self, x0: Tensor, eps: Tensor, k: int, batch: Batch) -> Tensor:
        """Where jump k + 1 starts: on the line through x0 and eps, or with fresh noise on x0."""
        level = self._level(batch.levels.u[:, k + 1])
        fresh = batch.draws.fresh
        return jump(x0, eps if fresh is None else fresh[:, k], *level)

    def opponent_passes(self, unrolled: Unrolled, number: int) -> list[Callable[[], Tensor]]:
        """The critic's losses (B,) in its update `number` of those before the student's, a pass for each landing."""
        return [partial(self._criticised, unrolled, k, number) for k in range(self.objective.jumps)]

    def _criticised(self, unrolled: Unrolled, k: int, number: int) -> Tensor:
        batch = unrolled.batch
        s, tick = batch.levels.s[:, k], batch.draws.tick[:, k, 1 + number]
        noise = batch.draws.noise[:, k, 1 + number]
        point = renoise(unrolled.landings[k], noise, *self._level(s), *self._level(tick))
        with self.clock.part("critic"), self.critic.learning():
            prediction, _ = self._predict(point, tick, batch.condition)
        seen = Criticised(prediction, unrolled.x0[k], point, noise, s, tick, self.base.schedule)
        return self.objective.critic_loss(seen) / self.objective.jumps

    def passes(self, unrolled: Unrolled) -> list[Callable[[], Losses]]:
        """The student's losses, a pass for each of its jumps; the first may be an anchor's."""
        matched = [partial(self._matched, unrolled, k) for k in range(self.objective.jumps)]
        return [partial(self._anchored, unrolled), *matched[1:]] if self.objective.anchor else matched

    def step(self, batch: Batch) -> Losses:
        """The losses of all jumps together, differentiable in the student's weights."""
        losses = [run().distance for run in self.passes(self.unrolled(batch))]
        return Losses(torch.stack(losses).sum(0))

    def _distance(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        unrolled = self.unrolled(batch)
        distance = torch.stack([run().distance for run in self.passes(unrolled)]).sum(0)
        return unrolled.landings[-1], unrolled.landings[-1], distance

    def _matched(self, unrolled: Unrolled, k: int) -> Losses:
        """The loss of jump k, over the number of jumps."""
        batch = unrolled.batch
        u, s = batch.levels.u[:, k], batch.levels.s[:, k]
        fake, real, push, tick = self._scores(unrolled, k)
        torch.clear_autocast_cache()  # see `Engine._distance`
        with self.clock.part("student"):
            x0, _ = self._predict(unrolled.starts[k], u, batch.condition)
            matched = Matched(x0, u, s, tick, fake, real, push, self.base.schedule)
            return Losses(self.objective.loss(matched) / self.objective.jumps)

    @torch.no_grad()
    def _scores(self, unrolled: Unrolled, k: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The critic's x0 and the teacher's at landing k, re-noised to the ticks that come last; before them what
        guidance adds to the teacher's x0 at scale 2, None without.

        The student has not moved since its trajectory was unrolled, so that its landing is known before its own pass.
        """
        batch, draws = unrolled.batch, unrolled.batch.draws
        tick = draws.tick[:, k, 0]
        point = self._renoised(unrolled, k, tick, draws.noise[:, k, 0])
        with self.clock.part("critic"), self.critic.asked():
            fake, _ = self._predict(point, tick, batch.condition)

        with self.clock.part("teacher"), self._teacher_weights():
            if self.objective.matched_scale == 1:
                return fake, self._predict(point, tick, batch.condition)[0], None, tick
            if draws.guided_tick is None:
                (real, plain), _ = self._halves(point, tick, batch)
                return fake, real, real - plain, tick
            real, _ = self._predict(point, tick, batch.condition)
            guided_tick = draws.guided_tick[:, k]
            guided_point = self._renoised(unrolled, k, guided_tick, draws.guided_noise[:, k])
            (with_prompt, without), _ = self._halves(guided_point, guided_tick, batch)
            return fake, real, with_prompt - without, tick

    def _renoised(self, unrolled: Unrolled, k: int, tick: Tensor, noise: Tensor) -> Tensor:
        s = unrolled.batch.levels.s[:, k]
        return renoise(unrolled.landings[k], noise, *self._level(s), *self._level(tick))

    def _anchored(self, unrolled: Unrolled) -> Losses:
        """The first jump's loss against the teacher's own trajectory from the same noise, over the number of jumps."""
        batch = unrolled.batch
        levels = batch.levels
        u, s = levels.u[:, 0], levels.s[:, 0]
        x = unrolled.starts[0]
        with torch.no_grad(), self.clock.part("teacher"):
            target = self._teacher(x, u, s, batch)
        torch.clear_autocast_cache()  # see `Engine._distance`
        with self.clock.part("student"):
            student = self._jump(x, u, s, batch.condition)
            jumps = Jumps(
                x, target, student, target, Levels(u, s, s), self.base.schedule, self.base.prediction, batch.progress
            )
            return Losses(self.objective.distance(jumps) / self.objective.jumps)
