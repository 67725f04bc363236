"""One distillation step, for every objective.

An objective chooses levels u > r >= s; the step builds the two points, jumps both to s, and measures the distance:

    x_u      the student's point: the path through a data latent x0 and noise eps, at u
    x_r      the target's point: one guided solver step of the teacher from x_u down to r
    student  J(x_u, u -> s), with gradient
    target   J(x_r, r -> s), without; x_r itself where r = s (the boundary condition, exactly)

J is the first-order jump with the network's own (x0, eps) (PCM, arXiv 2405.18407, Eq. 3). Shapes: points (B, C, h, w),
levels (B,) ticks. The networks run in the base's dtype, all step algebra in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..samplers import jump
from .adapter import Adapter
from .families import Base, Condition
from .generate import predict
from .objectives.pcm import PCM


@dataclass(frozen=True)
class Batch:
    """Latents x0 (B, C, h, w), noise like them, start ticks u (B,), CFG scales (B,), and the prompts' encodings."""

    x0: Tensor
    noise: Tensor
    start: Tensor
    guidance: Tensor
    condition: Condition


class Engine:
    """The networks of one run: a frozen base, its adapter, and the encoding of the empty prompt."""

    def __init__(self, base: Base, adapter: Adapter, objective: PCM, null: Condition):
        self.base, self.adapter, self.objective, self.null = base, adapter, objective, null

    def step(self, batch: Batch) -> Tensor:
        """(B,) losses, differentiable in the adapter's weights."""
        schedule, u = self.base.schedule, batch.start
        r, s = self.objective.neighbour(u), self.objective.target(u)
        x_u = jump(batch.x0, batch.noise, schedule.alpha(u), schedule.sigma(u))
        with torch.no_grad():
            x_r = self._teacher_step(x_u, u, r, batch)
            target = self._target(x_r, r, s, batch.condition)
        student = self._jump(x_u, u, s, batch.condition)
        return self.objective.distance(student, target)

    def _teacher_step(self, x_u: Tensor, u: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """One solver step with guidance g: conditional and unconditional in one batch, adapter off."""
        with self.adapter.off():
            both = {k: torch.cat([batch.condition[k], self._null_like(k, x_u)]) for k in self.null}
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
        x0, eps = predict(self.base, x, tick, condition)
        return jump(x0, eps, self.base.schedule.alpha(to), self.base.schedule.sigma(to))

    def _null_like(self, key: str, x: Tensor) -> Tensor:
        return self.null[key].expand(len(x), *self.null[key].shape[1:])
