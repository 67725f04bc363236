"""What every objective is: a row of choices for one distillation step, which `engine` takes.

An objective's fields are its settings, the `objective` section of a run's configuration; a setting that it does not
have is an error there. What it decides: the levels u > r >= s of a step, where x_r comes from (the teacher's solver, or
the data itself), which weights the target is made with, and the distance between student and target.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ...samplers import PhaseGrid, Schedule, normalcfg_guidance
from .distances import huber

# None, optional, or nothing without it: the adversarial loss of an objective.
Adversarial = Literal["none", "optional", "required"]
Solver = Literal["ddim", "heun", "dpm++"]


class Section(BaseModel):
    """Frozen settings, strict about their keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Levels:
    """Ticks (B,) of one step: the student starts at u, its neighbour on the path is at r < u, both jump to s <= r."""

    u: Tensor
    r: Tensor
    s: Tensor


@dataclass(frozen=True)
class Pair:
    """Both sides of one step, as a distance compares them; points (B, C, h, w).

    x_u, x_r: where student and target start. student: J(x_u, u -> s); target: J(x_r, r -> s), or x_r where r = s.
    prediction: what the network predicts. progress: share of the run that is done, in [0, 1).
    """

    x_u: Tensor
    x_r: Tensor
    student: Tensor
    target: Tensor
    levels: Levels
    schedule: Schedule
    prediction: str
    progress: float


class Objective(Section):
    """One row: settings as fields, choices as methods. Subclasses set `name` and the class variables."""

    name: str
    points: int = Field(40, description="points of the grid that it is trained on, or only sampled on; divides 1000")
    prompt_dropout: float | None = Field(
        None, ge=0, lt=1, description="share of samples without prompt; default: 0.1 where no guidance is distilled"
    )

    # Whether x_r is the teacher's; else it is the data's own path at r.
    needs_teacher: ClassVar[bool] = True
    # Whether the network is told the level that it jumps to, if it has an input for it.
    target_time: ClassVar[bool] = False
    # Whether the target takes a pass of the network; where r = s it is x_r itself.
    target_network: ClassVar[bool] = True
    adversarial: ClassVar[Adversarial] = "none"
    # The share of fresh noise that its LoRA is sampled with (TCD's gamma).
    gamma: ClassVar[float] = 1.0

    @model_validator(mode="after")
    def _check_grid(self):
        self.grid()
        return self

    def grid(self) -> PhaseGrid:
        """The grid that its LoRA is sampled on. Raises ValueError when there is no such grid."""
        return PhaseGrid(self.points, 1)

    @abstractmethod
    def levels(self, count: int, schedule: Schedule, progress: float, generator: torch.Generator) -> Levels:
        """Ticks (count,) of a batch's steps, when `progress` (0 to 1) of the run is done."""

    @abstractmethod
    def distance(self, pair: Pair) -> Tensor:
        """(B,) losses, differentiable in `pair.student`."""

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """(B,) ticks, uniform on the solver points: where most of the family starts a step."""
        points = self.grid().start_ticks()
        return points[torch.randint(len(points), (count,), generator=generator)]

    # --- the networks

    def target_decay(self) -> float:
        """Decay of the averaged weights that make the target; 0: the student's own."""
        return 0.0

    def stage(self, progress: float) -> int:
        """Number of the stage, from 0; at the start of each later one the student becomes the teacher."""
        return 0

    def teacher_solver(self) -> tuple[Solver, int]:
        """The teacher's solver from u to r, and in how many steps it gets there."""
        return "ddim", 1

    def clamp(self) -> float:
        """The least divisor of the student's and the target's x0 (see `x0_eps_from_output`); 0: alpha itself."""
        return 0.0

    # --- guidance and prompts

    def guided(self) -> bool:
        """Whether guidance is distilled in, so that the LoRA is sampled near CFG 1."""
        return False

    def draw_guidance(self, count: int, progress: float, generator: torch.Generator) -> Tensor | None:
        """(B,) CFG scales of the teacher's steps; None without guidance."""
        return None

    def draw_dropped(self, count: int, generator: torch.Generator) -> Tensor:
        """(B,) booleans: which samples lose their prompt."""
        default = 0.0 if self.guided() else 0.1
        share = default if self.prompt_dropout is None else self.prompt_dropout
        return torch.rand(count, generator=generator) < share

    # --- the adversary

    def judged_at(self, levels: Levels, generator: torch.Generator) -> Tensor:
        """(B,) ticks that a discriminator's inputs are noised to, for objectives that have an adversarial loss."""
        raise NotImplementedError(f"{self.name} has no adversarial loss")

    # --- sampling

    def sampling(self) -> dict[str, Any]:
        """What the recipe says of this objective, as keyword arguments of `Recipe`."""
        grid = self.grid()
        return {
            "objective": self.name,
            "mode": "stochastic" if self.gamma else "deterministic",
            "gamma": self.gamma,
            "points": grid.points,
            "phases": grid.phases,
            **guidance_of(self.guided(), grid.phases),
        }

    # --- what a user should hear of it

    def notes(self, pictures: bool, started: bool) -> list[str]:
        """Sentences on a run with its own pictures or without, from a LoRA or from nothing, where it may disappoint."""
        if self.needs_teacher or pictures:
            return []
        return [f"{self.name} learns from pictures, and data.images is not set: it learns the teacher's own."]


def guidance_of(baked: bool, phases: int) -> dict[str, Any]:
    """A recipe's fields on guidance, for a LoRA that has it in its weights or not."""
    best, low, high = (1.0, 1.0, 2.0) if baked else normalcfg_guidance(phases)
    return {
        "guidance_mode": "smallcfg" if baked else "normalcfg",
        "guidance": best,
        "guidance_min": low,
        "guidance_max": high,
        "negative_prompts": not baked,
    }


class Phased(Objective):
    """Objectives whose jumps end at the clean edge of the start's phase."""

    phases: int = Field(4, description="phases, which is also the number of steps to sample with")

    def grid(self) -> PhaseGrid:
        return PhaseGrid(self.points, self.phases)

    def levels(self, count: int, schedule: Schedule, progress: float, generator: torch.Generator) -> Levels:
        u = self.start(count, generator)
        return Levels(u, self.grid().previous(u), self.grid().target(u))


class Distillation(Objective):
    """Objectives whose neighbour x_r is the teacher's, with or without its guidance."""

    guidance_mode: Literal["smallcfg", "normalcfg"] = Field(
        "smallcfg",
        description="smallcfg: the teacher's guidance is distilled in, sample near CFG 1; normalcfg: it is not, sample "
        "with CFG and negative prompts as usual, with 4 steps or more",
    )
    guidance: tuple[float, float] = Field(
        (5.0, 6.0), description="smallcfg: CFG range of the teacher's step, drawn per sample"
    )

    @model_validator(mode="after")
    def _check_guidance(self):
        low, high = self.guidance
        if not 1 <= low <= high:
            raise ValueError(f"objective.guidance must be [low, high] with 1 <= low <= high; got [{low:g}, {high:g}]")
        return self

    def guided(self) -> bool:
        return self.guidance_mode == "smallcfg"

    def draw_guidance(self, count: int, progress: float, generator: torch.Generator) -> Tensor | None:
        if not self.guided():
            return None
        low, high = self.guidance
        return low + (high - low) * torch.rand(count, generator=generator)


class OwnTarget(Objective):
    """Objectives whose target is the student's own jump from x_r, compared at s by the pseudo-Huber of each element."""

    huber_c: float = Field(1e-3, gt=0, description="where the pseudo-Huber distance turns from square to linear")
    target_ema: float = Field(
        0.0, ge=0, lt=1, description="decay of the averaged weights that make the target; 0: the student's own"
    )

    def distance(self, pair: Pair) -> Tensor:
        return huber(pair.student, pair.target, self.huber_c)

    def target_decay(self) -> float:
        return self.target_ema


class SelfConsistency(OwnTarget, Distillation):
    """Those of them where x_r is the teacher's, by a solver of one's choice."""

    solver: Solver = Field(
        "ddim",
        description="the teacher's solver; heun takes two evaluations a step, dpm++ (2M) needs solver_steps >= 2",
    )
    solver_steps: int = Field(1, ge=1, le=100, description="steps of the teacher's solver from x_u to x_r")

    @model_validator(mode="after")
    def _check_solver(self):
        if self.solver == "dpm++" and self.solver_steps == 1:
            raise ValueError(
                "objective.solver dpm++ is a multistep method, whose first step is ddim's; got solver_steps = 1. "
                "Set objective.solver_steps=2 or more, or objective.solver=ddim"
            )
        return self

    def teacher_solver(self) -> tuple[Solver, int]:
        return self.solver, self.solver_steps


def counted_from_noise(points: int) -> dict[str, Any]:
    """For a recipe: levels as LCM's and TCD's schedulers take them from the grid, rounded towards noise."""
    return {"sampling_points": points, "sampling_from_noise": True}
