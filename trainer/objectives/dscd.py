"""Tangent-normalised consistency without JVP: the discrete form of sCM (arXiv 2410.11081, Sec. 4.1 and App. E)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...samplers import Schedule
from ...samplers.schedule import rows
from .distances import nearest_ticks
from .objective import Distillation, FromNoise, Jumps, Levels


class DSCD(FromNoise, Distillation):
    """Lognormal levels, neighbour an angle `delta` cleaner, and the student's own F pushed along the tangent there.

    On the circle x = cos(a) x0 + sin(a) eps, a jump to x0 is f = cos(a) x - sin(a) F. With f at both ends of
    the teacher's step the tangent is a difference: df/da = (f(x_u) - f(x_r)) / sin(a_u - a_r). The loss is
    |F - sg(F) - g|^2 with g = cos(a) df/da, brought to about unit size: g / (|g| + c). Its value says nothing
    about progress, only its gradient counts. `warmup` is the share of the run in which the tangent turns from
    the teacher's velocity alone to the whole (the paper's r).
    """

    name: Literal["dscd"] = Field(
        "dscd", description="tangent-normalised consistency: jumps to x0, learnt along the normalised tangent"
    )
    p_mean: float = Field(-0.1, description="mean of log(sigma / alpha); the paper's -0.8 is for data of spread 0.5")
    p_std: float = Field(1.6, gt=0, description="spread of log(sigma / alpha)")
    delta: float = Field(
        0.05, gt=0, le=0.5, description="angle between the levels, in radians; bf16 wants 0.02 or more"
    )
    tangent_c: float = Field(0.1, gt=0, description="c of the tangent's normalisation")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the run over which the tangent's second part fades in")
    cos_power: float = Field(
        1.0, ge=0, description="networks that predict eps: power of cos(a) by which their step is scaled; 0: not at all"
    )

    loss_tells: ClassVar[bool] = False

    def levels(self, count: int, schedule: Schedule, progress: float, generator: torch.Generator) -> Levels:
        sigma = (self.p_mean + self.p_std * torch.randn(count, generator=generator)).exp()
        u = self.with_noisiest(nearest_ticks(schedule, sigma), schedule.ticks, generator)
        a_r = angle(schedule, u) - self.delta
        r = torch.where(a_r > 0, nearest_ticks(schedule, a_r.tan()), 0)
        return Levels(u, torch.minimum(r, u - 1), torch.zeros_like(u))

    def distance(self, jumps: Jumps) -> Tensor:
        """Mean over a sample's elements of |F - sg(F) - g|^2; student and target are both x0 here, as s = 0.

        F and the points are taken on the circle, whatever path the schedule has.
        """
        a = _angles(jumps, jumps.levels.u)
        a_r = _angles(jumps, jumps.levels.r)
        with torch.no_grad():
            g = self._normalised(a.cos() * self._tangent(jumps, a, a_r))

        # f = cos(a) x - sin(a) F at a fixed x, so that F changes by -1 / sin(a) of what f does
        change_of_f = -(jumps.student - jumps.student.detach()) / a.sin()  # F - sg(F)
        # an eps-network's output moves cos(a) times as far as F; measured in its units, by the power 1, its gradient
        # goes with cos(a) and none grows with 1 / cos(a); by another power with cos(a)^(2 power - 1)
        unit = a.cos() ** self.cos_power if jumps.prediction == "epsilon" else 1.0
        return (unit * (change_of_f - g)).square().flatten(1).mean(1)

    def notes(self, pictures: bool, started: bool) -> list[str]:
        level = "The loss of dscd is the size of a normalised step and stays level: look at the paired error instead."
        return [*super().notes(pictures, started), level]

    def _tangent(self, jumps: Jumps, a: Tensor, a_r: Tensor) -> Tensor:
        """df/da as a difference over the teacher's step, the part of it by the student's change of F faded in.

        a, a_r: the angles of both ends, (B, 1, 1, 1).
        """
        x_u = _on_circle(jumps.x_u, jumps.schedule, jumps.levels.u)
        x_r = _on_circle(jumps.x_r, jumps.schedule, jumps.levels.r)
        d = a - a_r

        velocity = (d.cos() * x_u - x_r) / d.sin()  # the teacher's F: x_r = cos(d) x_u - sin(d) F
        f_teacher = a.cos() * x_u - a.sin() * velocity
        towards_teacher = a_r.cos() * (jumps.student.detach() - f_teacher) / a.sin()

        whole = (jumps.student.detach() - jumps.target) / d.sin()
        # the paper's r: the student begins by imitating the teacher's velocity, as its own F is not right yet
        share = min(1.0, jumps.progress / self.warmup) if self.warmup else 1.0
        return towards_teacher + share * (whole - towards_teacher)

    def _normalised(self, g: Tensor) -> Tensor:
        """g / (|g| + c) for each sample, |g| its root mean square."""
        return g / (g.square().mean(tuple(range(1, g.ndim)), keepdim=True).sqrt() + self.tangent_c)


def angle(schedule: Schedule, tick: Tensor) -> Tensor:
    """The angle a of ticks on the circle, in [0, pi / 2]: tan(a) = sigma / alpha."""
    return torch.atan2(schedule.sigma(tick), schedule.alpha(tick))


def _angles(jumps: Jumps, tick: Tensor) -> Tensor:
    """`angle` of ticks (B,), to be multiplied with points: (B, 1, 1, 1)."""
    return rows(angle(jumps.schedule, tick), jumps.x_u).to(jumps.x_u)


def _on_circle(x: Tensor, schedule: Schedule, tick: Tensor) -> Tensor:
    """Points of the schedule's path on the circle, where alpha^2 + sigma^2 = 1; VP's lie there already."""
    size = torch.hypot(schedule.alpha(tick), schedule.sigma(tick))
    return x / rows(size, x).to(x)
