"""The phase grid: where a phased model is trained to land, and the levels it is sampled at.

One object serves both. Training asks it for the points, and for each point's target edge; sampling asks it for the
levels of n steps. So what was trained and what is sampled cannot differ (arXiv 2405.18407, Sec. 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .schedule import TICKS


@dataclass(frozen=True)
class LevelPlan:
    """Levels to sample at.

    ticks: from the start down to the clean end 0, one more than there are steps.
    denoise: the strength this really is, ticks[0] / T.
    notes: what differs from what was asked for, as sentences for the user; empty when nothing does.
    """

    ticks: tuple[int, ...]
    denoise: float
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.ticks) - 1


@dataclass(frozen=True)
class PhaseGrid:
    """`points` equally spaced solver points on T ticks, cut into `phases` phases.

    Edge j (0..M) is point floor(j * N / M); with `from_noise` the rounding is counted from the noisy end instead, which
    is how LCM's and the published SD3 scheduler count. With 40 points the edges of 1, 2, 4 and 8 phases are exact.
    Raises ValueError when the points do not divide T (the grid would miss the noisy end) or are fewer than the phases.
    """

    points: int = 40
    phases: int = 4
    from_noise: bool = False
    ticks: int = TICKS

    def __post_init__(self):
        if self.points < 1 or self.ticks % self.points:
            near = sorted(
                (d for d in range(1, self.ticks + 1) if self.ticks % d == 0), key=lambda d: abs(d - self.points)
            )
            raise ValueError(
                f"points = {self.points} does not divide {self.ticks}, so the grid would miss the noisiest level. "
                f"Nearest that do: {', '.join(map(str, sorted(near[:3])))}."
            )
        if not 1 <= self.phases <= self.points:
            raise ValueError(f"phases must be between 1 and points = {self.points}; got {self.phases}.")

    @property
    def edges(self) -> tuple[int, ...]:
        """Edge ticks from 0 up to T, M + 1 of them."""
        return tuple(self._point(j, self.phases) for j in range(self.phases + 1))

    def _point(self, j: int, parts: int) -> int:
        """Tick of the j-th of `parts` equal cuts, on the grid."""
        width = self.ticks // self.points
        return width * (-(-j * self.points // parts) if self.from_noise else j * self.points // parts)

    def start_ticks(self) -> Tensor:
        """(N,) ticks of the solver points 1..N, from clean to noisy: where training samples start."""
        return torch.arange(1, self.points + 1) * (self.ticks // self.points)

    def previous(self, tick: Tensor) -> Tensor:
        """The neighbouring solver point, one teacher step cleaner."""
        return tick - self.ticks // self.points

    def nearest(self, tick: float) -> int:
        """The solver point nearest to a tick, or 0, the clean end."""
        width = self.ticks // self.points
        return width * round(tick / width)

    def target(self, tick: Tensor) -> Tensor:
        """The edge that a start tick (1..T, any shape) is mapped to: the highest edge below it."""
        edges = torch.tensor(self.edges, device=tick.device)
        return edges[torch.searchsorted(edges, tick.contiguous()) - 1]

    def plan(self, steps: int | None = None, denoise: float = 1.0) -> LevelPlan:
        """Levels for `steps` steps (default: one per phase), starting at strength `denoise` in (0, 1].

        As many steps as phases: the edges. More: each phase is divided evenly, the noisiest first where they do not
        divide. Fewer: neighbouring phases are merged, the cleanest first. `denoise` < 1 keeps this grid and enters it
        at the nearest phase edge (one-phase models: the nearest level), so fewer steps are run, all of them trained.
        Raises ValueError for steps < 1, more steps than points, or denoise outside (0, 1].
        """
        steps = self.phases if steps is None else steps
        if not 1 <= steps <= self.points:
            raise ValueError(f"steps must be between 1 and {self.points}, the number of solver points; got {steps}.")
        if not 0 < denoise <= 1:
            raise ValueError(f"denoise must be above 0 and at most 1; got {denoise}.")
        notes = []
        if steps < self.phases:
            levels = [self.edges[-(-j * self.phases // steps)] for j in range(steps + 1)]
        elif self.phases == 1:
            levels = [self._point(j, steps) for j in range(steps + 1)]
        else:
            levels = self._subdivided(steps)
        entries = levels[1:] if self.phases == 1 else [tick for tick in levels[1:] if tick in self.edges]
        start = min(entries, key=lambda tick: (abs(tick - denoise * self.ticks), -tick))
        ticks = tuple(reversed(levels[: levels.index(start) + 1]))
        actual = start / self.ticks
        if abs(actual - denoise) > 1e-6:
            notes.append(
                f"denoise {denoise:g} starts at the nearest {'level' if self.phases == 1 else 'phase edge'}, "
                f"which is {actual:g}: {len(ticks) - 1} of {steps} steps."
            )
        return LevelPlan(ticks, actual, tuple(notes))

    def _subdivided(self, steps: int) -> list[int]:
        each, extra = divmod(steps, self.phases)
        edges, levels = self.edges, [0]
        wide_enough = [j for j in range(self.phases) if edges[j + 1] - edges[j] > each]
        longer = wide_enough[len(wide_enough) - extra :]
        for j in range(self.phases):
            low, high = edges[j], edges[j + 1]
            parts = each + (j in longer)
            levels += [low + (high - low) * i // parts for i in range(1, parts + 1)]
        return levels


def count_steps(steps: int) -> str:
    """A number of steps in words for the user: "1 step", "4 steps"."""
    return "1 step" if steps == 1 else f"{steps} steps"
