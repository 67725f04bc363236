"""The phase grid: where a phased model is trained to land, and the levels it is sampled at.

A phased consistency model (PCM, arXiv 2405.18407, Sec. 3.1) cuts the way from noise to picture at edges

    0 = s_0 < s_1 < ... < s_M = T,

and is trained to map each point x_t of phase m, s_m < t <= s_(m+1), to the point x_(s_m) of the same solution
path. So M jumps from edge to edge make a picture, without fresh noise in between. With M = 1 this is an
ordinary consistency model.

`PhaseGrid` places the edges. Training asks it where to start and which edge to map to, sampling asks it for
the levels of n steps, so what was trained and what is sampled cannot differ. The jump itself is
`schedule.jump`, and the loop of jumps is `sampling.sample_phased`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from .schedule import TICKS


@dataclass(frozen=True)
class LevelPlan:
    """The levels of one run of a sampler.

    ticks: from the start down to the clean end 0, one more than there are steps; whole, but for a grid at given levels.
    denoise: the strength that the run really has, ticks[0] / T.
    notes: what differs from what the user set, as sentences; empty when nothing does.
    """

    ticks: tuple[float, ...]
    denoise: float
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.ticks) - 1


@dataclass(frozen=True)
class PhaseGrid:
    """N = `points` equally spaced solver points on T = `ticks` ticks, cut into M = `phases` phases.

    The solver points are those of the teacher's DDIM or Euler steps, T / N ticks apart (PCM, Sec. 3.1). Edge
    s_m, m in 0..M, is point floor(m * N / M); with `from_noise` the rounding is counted from the noisy end
    instead, which is how LCM's and the published SD3 scheduler count. With 40 points the edges of 1, 2, 4 and
    8 phases are exact. distilled: whether the model lands on the edges; a plain one goes from level to level.
    at: the ticks of the edges above the clean end, from noisy to clean, where they are given one by one; they need not
    be points, nor whole, and the noisiest may be below T.
    Raises ValueError when the points do not divide T (the grid would miss the noisy
    end) or are fewer than the phases, and for given edges that do not fall from T at most to above 0, a phase each.
    """

    points: int = 40
    phases: int = 4
    from_noise: bool = False
    ticks: int = TICKS
    distilled: bool = True
    at: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.points < 1 or self.ticks % self.points:
            divisors = [d for d in range(1, self.ticks + 1) if self.ticks % d == 0]
            nearest = sorted(divisors, key=lambda d: abs(d - self.points))[:3]
            raise ValueError(
                f"points = {self.points} does not divide {self.ticks}, so the grid would miss the noisiest level. "
                f"Nearest that do: {', '.join(map(str, sorted(nearest)))}."
            )
        if not 1 <= self.phases <= self.points:
            raise ValueError(f"phases must be between 1 and points = {self.points}; got {self.phases}.")
        if self.at is not None and (len(self.at) != self.phases or not falls(self.at, self.ticks)):
            raise ValueError(
                f"the levels {', '.join(f'{tick:g}' for tick in self.at) or '(none)'} are no edges of {self.phases} "
                f"phases: they have to be as many, and to fall from {self.ticks} at most to above 0."
            )

    @property
    def edges(self) -> tuple[float, ...]:
        """The edges s_0 = 0 to s_M, as M + 1 ticks; s_M is T, unless they are given (`at`)."""
        if self.at is not None:
            return (0, *reversed(self.at))
        return tuple(self._cut(m, self.phases) for m in range(self.phases + 1))

    @property
    def _width(self) -> int:
        """Ticks from one solver point to the next."""
        return self.ticks // self.points

    def _cut(self, i: int, parts: int, points: int | None = None) -> int:
        """Tick of cut i in 0..parts, where the cleanest `points` points (default: all) are divided into parts as even
        as whole points allow."""
        points = self.points if points is None else points
        if self.from_noise:
            return self._width * -(-i * points // parts)
        return self._width * (i * points // parts)

    def start_ticks(self) -> Tensor:
        """(N,) ticks of the solver points 1..N, from clean to noisy: where training samples start."""
        return torch.arange(1, self.points + 1) * self._width

    def previous(self, tick: Tensor) -> Tensor:
        """The neighbouring solver point, one step of the teacher cleaner; ticks of any shape."""
        return tick - self._width

    def nearest(self, tick: float) -> int:
        """The solver point nearest to a tick, or 0, the clean end."""
        return self._width * round(tick / self._width)

    def target(self, tick: Tensor) -> Tensor:
        """The edge s_m that training maps start ticks to (1..T, any shape): the highest edge below each.

        A start on an edge belongs to the phase that ends there, so it is mapped
        to the edge below and not to itself.
        """
        edges = torch.tensor(self.edges, device=tick.device)
        return edges[torch.searchsorted(edges, tick.contiguous()) - 1]

    def plan(self, steps: int | None = None, denoise: float = 1.0) -> LevelPlan:
        """Levels for `steps` steps (default: one per phase), starting at strength `denoise` in (0, 1].

        As many steps as phases: the edges. More: each phase is divided evenly, the noisiest first where they
        do not divide. Fewer: neighbouring phases are merged, the cleanest first. `denoise` < 1 keeps this
        grid and enters it at the nearest phase edge (plain models: the nearest level), so fewer steps are run, all of
        them trained. A one-phase model has been trained at all points: it starts at the nearest, and takes all its
        steps from there on.
        Raises ValueError for steps < 1, more steps than points, or denoise outside (0, 1].
        """
        steps = self.phases if steps is None else steps
        if not 1 <= steps <= self.points:
            raise ValueError(f"steps must be between 1 and {self.points}, the number of solver points; got {steps}.")
        if not 0 < denoise <= 1:
            raise ValueError(f"denoise must be above 0 and at most 1; got {denoise}.")

        if self.phases == 1 and self.distilled and self.at is None:
            return self._one_phase(steps, denoise)
        levels = self._levels(steps)
        entries = levels[1:] if self.phases == 1 else [tick for tick in levels[1:] if tick in self.edges]
        start = min(entries, key=lambda tick: (abs(tick - denoise * self.ticks), -tick))
        ticks = tuple(reversed(levels[: levels.index(start) + 1]))

        strength = start / self.ticks
        is_all = denoise == 1 and start == levels[-1]  # given levels may begin below pure noise
        if is_all or abs(strength - denoise) <= 1e-6:
            return LevelPlan(ticks, strength)
        kind = "level" if self.phases == 1 else "phase edge"
        note = (
            f"denoise {denoise:g} starts at the nearest {kind}, which is {strength:g}: "
            f"{len(ticks) - 1} of {steps} steps."
        )
        return LevelPlan(ticks, strength, (note,))

    def plan_at_most(self, steps: int, denoise: float = 1.0) -> LevelPlan:
        """`plan` for a number of steps from a widget, whose range is the same for every LoRA: where there are fewer
        levels than steps, all of them, and a note that says so."""
        plan = self.plan(min(steps, self.points), denoise)
        if steps <= self.points:
            return plan
        return replace(plan, notes=(f"{count_steps(self.points)} of {steps}: there are no more levels.", *plan.notes))

    def _one_phase(self, steps: int, denoise: float) -> LevelPlan:
        """`plan` with one phase: so many steps from the nearest point on, as in diffusers' LCMScheduler."""
        points = max(1, int(denoise * self.points + 0.5))
        taken = min(steps, points)
        ticks = tuple(self._cut(i, taken, points) for i in reversed(range(taken + 1)))

        strength = points / self.points
        notes = []
        if abs(strength - denoise) > 1e-6:
            notes.append(f"denoise {denoise:g} starts at the nearest level, which is {strength:g}.")
        if taken < steps:
            notes.append(f"{count_steps(taken)} of {steps}: there are no more levels below denoise {strength:g}.")
        return LevelPlan(ticks, strength, tuple(notes))

    def _levels(self, steps: int) -> list[float]:
        """Ticks of so many steps all the way, from the clean end 0 up to T."""
        if steps < self.phases:
            # Rounding up leaves the noisy phases whole. An error of eps moves the point that a jump lands on
            # by sigma_s - alpha_s sigma_t / alpha_t, which is least near the clean end (SD1.5: 6.9 from tick
            # 1000 to 500, 1.6 from 500 to 0), so there a jump across two phases costs least.
            return [self.edges[-(-i * self.phases // steps)] for i in range(steps + 1)]
        if self.phases == 1 and self.at is None:
            return [self._cut(i, steps) for i in range(steps + 1)]
        return self._subdivided(steps)

    def _subdivided(self, steps: int) -> list[float]:
        """Levels for more steps than phases, from clean to noisy, every edge among them."""
        parts_each, left_over = divmod(steps, self.phases)
        edges = self.edges

        # The steps left over go to the noisiest phases, of those wide enough to be cut once more.
        divisible = [m for m in range(self.phases) if self.at is not None or edges[m + 1] - edges[m] > parts_each]
        divided_more = divisible[len(divisible) - left_over :]

        levels = [0]
        for m in range(self.phases):
            low, high = edges[m], edges[m + 1]
            parts = parts_each + (m in divided_more)
            levels += [low + self._part(high - low, i, parts) for i in range(1, parts)] + [high]
        return levels

    def _part(self, width: float, i: int, parts: int) -> float:
        """The first i of so many even parts of a width in ticks, in whole ticks unless the edges are given."""
        return width * i // parts if self.at is None else width * i / parts


def falls(levels: Sequence[float], most: float) -> bool:
    """Whether levels fall from one to the next, from `most` at most to above 0."""
    return bool(levels) and most >= levels[0] and levels[-1] > 0 and all(a > b for a, b in pairwise(levels))


def count_steps(steps: int) -> str:
    """A number of steps in words for the user: "1 step", "4 steps"."""
    return "1 step" if steps == 1 else f"{steps} steps"
