"""One distillation step, for every objective.

An objective chooses levels u > r >= s; the step builds the two points, jumps both to s, and measures the distance:

    x_u      the student's point: the path through a data latent x0 and noise eps, at u
    x_r      the target's point: one solver step of the teacher, guided or not, from x_u down to r
    student  J(x_u, u -> s), with gradient
    target   J(x_r, r -> s), without; x_r itself where r = s (the boundary condition, exactly)

J is the first-order jump with the network's own (x0, eps) (PCM, arXiv 2405.18407, Eq. 3). Shapes: points (B, C, h, w),
levels (B,) ticks. The networks run in the base's dtype, all step algebra in fp32. With an adversary, the same student
and target also give the losses of generator and discriminator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..samplers import jump
from .adapter import Adapter
from .adversarial import Adversary, Judged
from .families import Base, Condition
from .generate import predict
from .objectives.pcm import PCM


@dataclass(frozen=True)
class Batch:
    """Latents x0 (B, C, h, w), noise like them, start ticks u (B,), CFG scales (B,) or None for a teacher without
    guidance, the prompts' encodings, and where the adversary judges, if there is one."""

    x0: Tensor
    noise: Tensor
    start: Tensor
    guidance: Tensor | None
    condition: Condition
    judged: Judged | None = None


@dataclass(frozen=True)
class Losses:
    """(B,) each: the distance; with an adversary the generator's loss and the discriminator's."""

    distance: Tensor
    generator: Tensor | None = None
    discriminator: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Those there are, by what a plot calls them."""
        all_of_them = {
            "loss": self.distance,
            "generator loss": self.generator,
            "discriminator loss": self.discriminator,
        }
        return {name: values for name, values in all_of_them.items() if values is not None}


class Engine:
    """The networks of one run: a frozen base, its adapter, what stands for no prompt, and perhaps an adversary."""

    def __init__(
        self, base: Base, adapter: Adapter, objective: PCM, null: Condition, adversary: Adversary | None = None
    ):
        self.base, self.adapter, self.objective, self.null = base, adapter, objective, null
        self.adversary = adversary

    def step(self, batch: Batch) -> Losses:
        """The losses, differentiable in the adapter's weights (the discriminator's in the heads')."""
        schedule, u = self.base.schedule, batch.start
        r, s = self.objective.neighbour(u), self.objective.target(u)
        x_u = jump(batch.x0, batch.noise, schedule.alpha(u), schedule.sigma(u))
        with torch.no_grad():
            x_r = self._teacher_step(x_u, u, r, batch)
            target = self._target(x_r, r, s, batch.condition)
        # torch before 2.11 keeps autocast's copies of the weights from a block without gradients, and uses them again
        torch.clear_autocast_cache()
        student = self._jump(x_u, u, s, batch.condition)
        distance = self.objective.distance(student, target)
        if self.adversary is None:
            return Losses(distance)
        return Losses(distance, *self.adversary.losses(student, target, s, batch.judged, batch.condition))

    def _teacher_step(self, x_u: Tensor, u: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """One solver step, adapter off; with guidance, conditional and unconditional in one batch."""
        with self.adapter.off():
            if batch.guidance is None:
                x0, eps = predict(self.base, x_u, u, batch.condition)
            else:
                both = self.base.with_null(batch.condition, self.null)
                x0, eps = predict(self.base, x_u.repeat(2, 1, 1, 1), u.repeat(2), both)
                g = batch.guidance.view(-1, 1, 1, 1)
                x0, eps = (un + g * (c - un) for c, un in (x0.chunk(2), eps.chunk(2)))
        return jump(x0, eps, self.base.schedule.alpha(r), self.base.schedule.sigma(r))

    def _target(self, x_r: Tensor, r: Tensor, s: Tensor, condition: Condition) -> Tensor:
        inside = (r > s).nonzero().squeeze(1)
        target = x_r.clone()
        if len(inside):
            rows = {k: v[inside] for k, v in condition.items()}
            target[inside] = self._jump(x_r[inside], r[inside], s[inside], rows)
        return target

    def _jump(self, x: Tensor, tick: Tensor, to: Tensor, condition: Condition) -> Tensor:
        x0, eps = predict(self.base, x, tick, condition, self.objective.min_alpha)
        return jump(x0, eps, self.base.schedule.alpha(to), self.base.schedule.sigma(to))
