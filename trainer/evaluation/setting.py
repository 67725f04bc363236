"""One way to make pictures: who makes them, in how many steps, under which guidance, by which solver."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...samplers import PhaseGrid, Recipe
from ...samplers.phases import count_steps
from ...samplers.schedule import TICKS

TEACHER = "teacher"
# The teacher's solvers, each with one evaluation of the network a step.
SOLVERS = {"ddim": "DDIM", "euler": "Euler", "dpm++": "DPM-Solver++(2M)"}
TRAILING = PhaseGrid(points=1000, phases=1, from_noise=True)


@dataclass(frozen=True)
class Setting:
    """A way to make pictures: the teacher (every adapter off) by one of its solvers, or the installed LoRA.

    name: "teacher", or what the LoRA is to be called. untrained: draw as this LoRA does, with its adapter off, which
    is what one that had learnt nothing would give. guidance: CFG scale, 1 for none. gamma: how much of
    each step's noise is fresh, 0 (deterministic) to 1 (stochastic); None: the recipe's, and the teacher's is
    0. solver: a key of `SOLVERS`, of the teacher alone: a LoRA's step is its phase jump. Raises ValueError
    for an unknown solver, for a LoRA with another than the default, for a solver with a gamma, and for a teacher that
    is untrained.
    """

    name: str
    steps: int
    guidance: float
    gamma: float | None = None
    solver: str = "ddim"
    untrained: bool = False

    def __post_init__(self):
        if self.solver not in SOLVERS:
            raise ValueError(f"solver is {self.solver!r}; available: {', '.join(SOLVERS)}.")
        if self.solver != "ddim" and (self.name != TEACHER or self.gamma):
            raise ValueError(
                f"solver {self.solver!r} is the teacher's, without a gamma; got {self.name!r} with gamma {self.gamma}. "
                "Leave the solver out."
            )
        if self.untrained and self.name == TEACHER:
            raise ValueError("The teacher learns nothing; untrained is for a LoRA's setting. Leave it out.")

    @property
    def evaluations(self) -> int:
        """Evaluations of the network that one picture costs: guidance needs two a step."""
        return self.steps * (1 if self.guidance == 1 else 2)

    @property
    def who(self) -> str:
        """Who makes the pictures: "teacher, Euler", or the LoRA's name and the gamma that is not its recipe's."""
        if self.name == TEACHER:
            return f"{self.name}, {SOLVERS[self.solver]}"
        name = f"untrained, as {self.name}" if self.untrained else self.name
        return name if self.gamma is None else f"{name}, gamma {self.gamma:g}"

    @property
    def label(self) -> str:
        """The setting in two lines, to stand beside a row of pictures."""
        return f"{self.who}\n{count_steps(self.steps)}, CFG {self.guidance:g}"

    def ticks(self, recipe: Recipe | None) -> tuple[int, ...]:
        """The ticks of its steps, falling to 0: the LoRA's phase edges, or the teacher's levels.

        DDIM and DPM-Solver++ take trailing levels. DDIM and Euler are one map, so Euler takes the levels that
        it is mostly used with: evenly spaced from the noisiest tick to the first, then the clean end (arXiv
        2305.08891, Table 2, calls it linspace; the host's scheduler "normal").
        """
        if self.name != TEACHER:
            return recipe.grid().plan(self.steps).ticks
        if self.solver == "euler":
            return (*torch.linspace(TICKS, 1, self.steps).round().int().tolist(), 0)
        return TRAILING.plan(self.steps).ticks

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with who makes the pictures and what one costs."""
        return {"who": self.who} | asdict(self) | {"evaluations": self.evaluations}

    def way(self, recipe: Recipe | None) -> tuple:
        """All that decides the pictures beside the weights: two untrained settings of one way draw the same."""
        gamma, min_alpha = (0.0, 0.0) if self.name == TEACHER else (recipe.gamma, recipe.min_alpha)
        gamma = gamma if self.gamma is None else self.gamma
        return self.solver, self.ticks(recipe), self.guidance, gamma, min_alpha
