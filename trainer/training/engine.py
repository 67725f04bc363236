"""One distillation step, for every objective.

An objective chooses levels u > r >= s; the step builds the two points, jumps both to s, and measures the distance:

    x_u      the student's point: the path through a data latent x0 and noise eps, at u
    x_r      the target's point: the teacher's solver from x_u down to r, guided or not; or the data's own path at r
    student  J(x_u, u -> s), with gradient
    target   J(x_r, r -> s), without; x_r itself where r = s (the boundary condition, exactly)

J is the first-order jump with the network's own (x0, eps) (PCM, arXiv 2405.18407, Eq. 3). Shapes: points (B, C, h, w),
levels (B,) ticks. The networks run in the base's dtype, all step algebra in fp32. With an adversary, the same student
and target also give the losses of generator and discriminator.

There is one network. The teacher is the bare base, or in later stages the student that an earlier one left; the target
is made with the student's weights or their moving average.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...samplers import eps_of, extrapolated, jump
from ...samplers.schedule import rows
from ..families import Base, Condition
from ..families.generate import predict
from ..lora.adapter import Average, Learner
from ..objectives import Draws, Jumps, Levels, Objective
from ..system.clock import Clock
from .adversary import Adversary, Judged
from .opponent import Opponent


@dataclass(frozen=True)
class Batch:
    """What one forward pass sees of B samples.

    x0: latents (B, C, h, w); noise: like them. levels: u >= r >= s of each. guidance: CFG scales (B,), or None for a
    teacher without guidance. condition: the prompts' encodings. progress: share of the run that is done. judged: where
    the adversary judges, if there is one. draws: of an objective that matches distributions, whose levels are those of
    whole trajectories (B, K), and whose x0 is None: the noise is where they start. inner: the rows whose target takes a
    pass of the network (r > s); without it a GPU must wait until they are counted.
    """

    x0: Tensor | None
    noise: Tensor
    levels: Levels
    guidance: Tensor | None
    condition: Condition
    progress: float = 0.0
    judged: Judged | None = None
    draws: Draws | None = None
    inner: Tensor | None = None

    def pinned(self) -> Batch:
        """A copy from which a GPU can fetch while the host goes on."""
        return _each_tensor(self, Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """A copy on another device; from pinned memory without waiting."""
        return _each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))


def _each_tensor(value: Any, do: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return do(value)
    if isinstance(value, dict):
        return {key: _each_tensor(v, do) for key, v in value.items()}
    if is_dataclass(value):
        return replace(value, **{f.name: _each_tensor(getattr(value, f.name), do) for f in fields(value)})
    return value


@dataclass(frozen=True)
class Losses:
    """(B,) each: the distance; with an adversary the generator's loss and the discriminator's."""

    distance: Tensor
    generator: Tensor | None = None
    discriminator: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """The losses that there are, by what a plot calls them."""
        losses = {
            "loss": self.distance,
            "generator loss": self.generator,
            "discriminator loss": self.discriminator,
        }
        return {name: loss for name, loss in losses.items() if loss is not None}


class Engine:
    """The networks of one run: a frozen base, its adapter, what stands for no prompt, and perhaps an adversary."""

    def __init__(
        self,
        base: Base,
        adapter: Learner,
        objective: Objective,
        null: Condition,
        adversary: Adversary | None = None,
        clock: Clock | None = None,
    ):
        self.base = base
        self.adapter = adapter
        self.objective = objective
        self.null = null
        self.adversary = adversary
        self.average = Average(adapter, objective.target_decay()) if objective.target_decay() else None
        self.clock = clock or Clock()

        # Both halves of guidance in one pass: fewer launches on a GPU. A CPU takes 1.09 to 1.15 times as long for it as
        # for two passes, whose activations stay in its caches (tiny-sd15, 32 samples at 128 px).
        self.batched = base.device.type != "cpu"
        # The target's pass on all rows, though some are their own target: each size of batch would be compiled anew.
        self.whole_target = False
        self.earlier: dict[str, Tensor] = {}  # the adapter's weights that are the teacher's, after the first stage
        self.evaluations = 0  # samples that went through the network, one for each pass that it took them through

    @property
    def opponent(self) -> Opponent | None:
        """What learns beside the student."""
        return self.adversary

    def unrolled(self, batch: Batch) -> Batch:
        """What the passes of an update go by: the batch itself, where nothing is to be known of all of them first."""
        return batch

    def passes(self, batch: Batch) -> list[Callable[[], Losses]]:
        """The passes of the student that a batch takes, each to be followed by its backward pass."""
        return [partial(self.step, batch)]

    def step(self, batch: Batch) -> Losses:
        """The losses, differentiable in the adapter's weights (the discriminator's in the heads')."""
        student, target, distance = self._distance(batch)
        if self.adversary is None:
            return Losses(distance)
        with self.clock.part("discriminator"):
            generator, discriminator = self.adversary.losses(
                student, target, batch.levels.s, batch.judged, batch.condition
            )
            self.evaluations += 2 * len(student)
            return Losses(distance, generator, discriminator)

    @torch.no_grad()
    def distance(self, batch: Batch) -> Tensor:
        """(B,) the objective's distance alone."""
        return self._distance(batch)[2]

    def _distance(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Student's and target's points, and their distance (B,)."""
        u, r, s = batch.levels.u, batch.levels.r, batch.levels.s
        x_u = self._on_path(batch, u)

        # The two passes without gradient first, so that nothing of theirs is held beside the student's activations.
        with torch.no_grad():
            with self.clock.part("teacher"):
                x_r = self._teacher(x_u, u, r, batch) if self.objective.needs_teacher else self._on_path(batch, r)
            with self.clock.part("target"), self._target_weights():
                target = self._target(x_r, batch)
        # torch before 2.11 keeps autocast's copies of the weights from a block without gradients, and uses them again
        torch.clear_autocast_cache()

        with self.clock.part("student"):
            student = self._jump(x_u, u, s, batch.condition)
            jumps = Jumps(
                x_u, x_r, student, target, batch.levels, self.base.schedule, self.base.prediction, batch.progress
            )
            return student, target, self.objective.distance(jumps)

    def updated(self, step: int, before: float, after: float, average: Average | None = None) -> None:
        """Take in the weights after update `step` (from 1), which took the run from one share done to another.

        average: the run's, from which a later stage begins where the objective wants that.
        """
        if self.average:
            self.average.update(step)
        if self.opponent:
            self.opponent.updated(step)
        if self.objective.stage(after) != self.objective.stage(before):
            if average and self.objective.averaged_teacher():
                self.adapter.load(average.weights)
            self.earlier = self.adapter.copy()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint must keep besides the adapter, by group."""
        return {"target": self.average.weights if self.average else {}, "teacher": self.earlier}

    def load(self, groups: dict[str, dict[str, Tensor]]) -> None:
        """Put `state` back."""

        def weights(group: str) -> dict[str, Tensor]:
            # copied: a file's tensors lie anywhere in memory, and products of matrices round by where factors lie
            return {name: w.to(self.base.device, copy=True) for name, w in groups.get(group, {}).items()}

        if self.average:
            self.average.weights = weights("target")
        self.earlier = weights("teacher")

    def _on_path(self, batch: Batch, tick: Tensor) -> Tensor:
        """alpha x0 + sigma eps: the batch's own path through latent and noise, at ticks (B,)."""
        return jump(batch.x0, batch.noise, self.base.schedule.alpha(tick), self.base.schedule.sigma(tick))

    def _teacher_weights(self) -> AbstractContextManager:
        return self.adapter.using(self.earlier) if self.earlier else self.adapter.off()

    def _target_weights(self) -> AbstractContextManager:
        return self.adapter.using(self.average.weights) if self.average else nullcontext()

    def _teacher(self, x: Tensor, u: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """x (B, C, h, w) at ticks u, taken down to ticks r by the objective's solver, in equal steps of ticks.

        Every solver is the jump with some x0: ddim's is the network's, heun's the mean of both ends' (the trapezoid in
        alpha / sigma, along which x / sigma moves by x0), dpm++'s the one extrapolated from the step before.
        """
        solver, steps = self.objective.teacher_solver()
        tick = u
        earlier: tuple[Tensor, tuple[Tensor, Tensor]] | None = None  # x0 of the step before, and (alpha, sigma) there
        with self._teacher_weights():
            for left in reversed(range(steps)):
                lower = r + (u - r) * left // steps
                start, end = self._level(tick), self._level(lower)
                x0, eps = self._guided(x, tick, batch)

                along = x0
                if solver == "dpm++":
                    x0_before, level_before = earlier or (x0, start)
                    along = extrapolated(x0, x0_before, level_before, start, end)
                elif solver == "heun":
                    x0_at_end, _ = self._guided(jump(x0, eps, *end), lower, batch)
                    # at the clean end there is no noise to tell x0 by: the first half alone counts there
                    along = torch.where(rows(lower > 0, x), (x0 + x0_at_end) / 2, x0)
                eps = eps if along is x0 else eps_of(x, along, *start)

                # rows that have arrived, as those with u = r from the start, stay as they are
                x = torch.where(rows(lower < tick, x), jump(along, eps, *end), x)
                earlier = (x0, start)
                tick = lower
        return x

    def _guided(self, x: Tensor, tick: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's (x0, eps) at ticks (B,): uncond + g (cond - uncond) of each, where the batch has a g."""
        tick = tick.clamp(min=1)  # rows that have arrived at the clean end are not used
        if batch.guidance is None:
            return self._predict(x, tick, batch.condition)
        g = rows(batch.guidance, x)
        x0, eps = (uncond + g * (cond - uncond) for cond, uncond in self._halves(x, tick, batch))
        return x0, eps

    def _halves(self, x: Tensor, tick: Tensor, batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """x0 with and without the prompt, and eps so, of the network as it stands."""
        both = self.base.with_null(batch.condition, self.null)
        if self.batched:
            x0, eps = (half.chunk(2) for half in self._predict(torch.cat([x, x]), tick.repeat(2), both))
        else:
            halves = zip(*(v.chunk(2) for v in both.values()), strict=True)
            passes = (self._predict(x, tick, dict(zip(both, half, strict=True))) for half in halves)
            x0, eps = zip(*passes, strict=True)
        return tuple(x0), tuple(eps)

    def _level(self, tick: Tensor) -> tuple[Tensor, Tensor]:
        return self.base.schedule.alpha(tick), self.base.schedule.sigma(tick)

    def _target(self, x_r: Tensor, batch: Batch) -> Tensor:
        """J(x_r, r -> s); x_r itself in rows where r = s, which need no pass of the network."""
        r, s, inner = batch.levels.r, batch.levels.s, batch.inner
        if self.whole_target:
            return torch.where(rows(r > s, x_r), self._jump(x_r, r.clamp(min=1), s, batch.condition), x_r)
        inner = (r > s).nonzero().squeeze(1) if inner is None else inner
        if len(inner) == len(r):
            return self._jump(x_r, r, s, batch.condition)
        target = x_r.clone()
        if len(inner):
            condition = {k: v[inner] for k, v in batch.condition.items()}
            target[inner] = self._jump(x_r[inner], r[inner], s[inner], condition)
        return target

    def _jump(self, x: Tensor, tick: Tensor, to: Tensor, condition: Condition) -> Tensor:
        """J(x, tick -> to) = alpha_to x0 + sigma_to eps, with the network's own (x0, eps) in x: the phase jump."""
        if self.objective.target_time:
            condition = condition | self.base.target_time(to)
        x0, eps = self._predict(x, tick, condition, self.objective.clamp())
        return jump(x0, eps, *self._level(to))

    def _predict(self, x: Tensor, tick: Tensor, condition: Condition, min_alpha: float = 0.0) -> tuple[Tensor, Tensor]:
        """The network's (x0, eps) in points (B, C, h, w) at ticks (B,), counted."""
        self.evaluations += len(x)
        return predict(self.base, x, tick, condition, min_alpha)
