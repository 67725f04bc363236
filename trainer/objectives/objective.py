"""The form of every objective: the choices that make one distillation step (`training/engine.py` carries it out).

A step begins with a clean latent x0 and noise eps. The objective chooses three levels of noise, u > r >= s:

    x_u      the student's point: the path alpha x0 + sigma eps, at u
    x_r      its neighbour on that path, cleaner: from x_u by the teacher's solver, or with the same x0 and eps at r
    student  J(x_u, u -> s), with gradient
    target   J(x_r, r -> s), without; where r = s it is x_r itself, which is the boundary condition
    loss     distance(student, target)

J is the network's own jump: its (x0, eps) at the start, put together again at s (PCM, arXiv 2405.18407, Eq.
3). The methods differ above all in s. It is 0 in consistency distillation (arXiv 2303.01469), the edge of u's
phase in PCM, anywhere below r in TCD (arXiv 2402.19159), and r itself in progressive distillation (arXiv
2202.00512).

Levels are ticks (see `samplers/schedule.py`): whole numbers from 0, the clean end, to T = 1000, where
sampling starts.

To add an objective, write a subclass in a file of its own and name it in `objectives/__init__.py`. `pcm.py`
is a short one to start from. Its fields are its settings: the section `objective` of a run's configuration
takes these and no others. `levels` and `distance` are all that it must say; every other method has a default,
and the classes at the end of this file are the choices that several objectives share.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ...samplers import PhaseGrid, Schedule, jump, normalcfg_guidance, x0_eps_from_output
from .distances import huber

# Whether an objective can have an adversarial loss beside its distance, or is nothing without one.
Adversarial = Literal["none", "optional", "required"]
# How the teacher gets from x_u to x_r (`training/engine.py` says what each does on x0).
Solver = Literal["ddim", "heun", "dpm++"]


class Section(BaseModel):
    """A section of a run's configuration: frozen, and strict, so that a mistyped key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Levels:
    """The levels of one step, ticks (B,): the student starts at u, its neighbour at r < u, both jump to s <= r."""

    u: Tensor
    r: Tensor
    s: Tensor


@dataclass(frozen=True)
class Jumps:
    """The two jumps of one step, as a distance compares them. All points are (B, C, h, w).

    x_u, x_r: where student and target start.
    student: J(x_u, u -> s), with gradient. target: J(x_r, r -> s), or x_r where r = s.
    prediction: what the network predicts: "epsilon", "v_prediction" or "flow".
    progress: share of the run that is done, in [0, 1).
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
    """One way to distil: settings as fields, choices as methods.

    A subclass sets `name`, by which a configuration asks for it, and the class variables where the defaults
    are wrong. Raises ValueError for a number of points that does not divide T.
    """

    name: str
    points: int = Field(40, description="points of the grid that it is trained on, or only sampled on; divides 1000")
    prompt_dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of samples without prompt; default: 0.1 where no guidance is distilled, nor in the LoRA of "
        "lora.init",
    )

    # Whether x_r comes from the teacher's solver; else it is the point at r of the data's own path.
    needs_teacher: ClassVar[bool] = True
    # Whether the network is told the level s that it jumps to, if it has an input for it.
    target_time: ClassVar[bool] = False
    # Whether the target takes a pass of the network; false where always r = s.
    target_network: ClassVar[bool] = True
    adversarial: ClassVar[Adversarial] = "none"
    # Whether it matches distributions (`matching.py`): prompts alone are its data, and a critic learns beside the LoRA.
    matching: ClassVar[bool] = False
    # Whether the distance falls as the student learns, so that a curve of it says something.
    loss_tells: ClassVar[bool] = True
    # The share of fresh noise that its LoRA is sampled with: TCD's gamma, 0 for none, 1 for all (LCM's way).
    gamma: ClassVar[float] = 1.0

    @model_validator(mode="after")
    def _check_grid(self):
        self.grid()
        return self

    def grid(self) -> PhaseGrid:
        """The grid that its LoRA is sampled on. Raises ValueError where `points` and phases make none."""
        return PhaseGrid(self.points, 1)

    @abstractmethod
    def levels(self, count: int, schedule: Schedule, progress: float, generator: torch.Generator) -> Levels:
        """Draw the levels of `count` samples, ticks (count,) each.

        schedule: for objectives whose papers draw noise levels in other units. progress: share of the run
        that is done, in [0, 1), for those with a curriculum. generator: the only source of chance, so that a
        run that is resumed draws the same.
        """

    @abstractmethod
    def distance(self, jumps: Jumps) -> Tensor:
        """The loss of each sample, (B,), differentiable in `jumps.student`."""

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """Starts u of `count` samples, ticks (count,): uniform on the solver points, as in most papers."""
        points = self.grid().start_ticks()
        return points[torch.randint(len(points), (count,), generator=generator)]

    def point_between(self, low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
        """Ticks (B,), each uniform on the points of the grid from `low` to `high`, both of them points too."""
        grid = self.grid()
        cell = grid.ticks // grid.points
        return low + cell * (torch.rand(high.shape, generator=generator) * ((high - low) // cell + 1)).long()

    # --- the networks

    def target_decay(self) -> float:
        """Decay of the averaged weights theta- that make the target; 0: the student's own weights make it."""
        return 0.0

    def stage(self, progress: float) -> int:
        """Number of the stage, from 0. At the start of each later one the student becomes the teacher."""
        return 0

    def stage_count(self) -> int:
        """How many stages of one length the run has."""
        return 1

    def averaged_teacher(self) -> bool:
        """Whether a later stage's teacher, and its student at first, are the run's averaged weights (train.ema)."""
        return False

    def measured_at(self, progress: float, last: float) -> float:
        """The share of the run that the held-out loss is measured as of. last: that of the last update.

        Always the last, so that figures of one run can be compared; but where a run has stages the teacher is the
        running one's, and so must the levels be.
        """
        return progress if self.stage(last) else last

    def teacher_solver(self) -> tuple[Solver, int]:
        """The teacher's solver, and the number of steps that it takes from u to r."""
        return "ddim", 1

    def clamp(self) -> float:
        """The least divisor in x0 = (x - sigma eps) / alpha, for student and target; 0: alpha itself."""
        return 0.0

    # --- guidance and prompts

    def guided(self) -> bool:
        """Whether the teacher's guidance is distilled into the LoRA, which is then sampled near CFG 1."""
        return False

    def draw_guidance(self, count: int, progress: float, generator: torch.Generator) -> Tensor | None:
        """The teacher's CFG scales g, (count,), in uncond + g (cond - uncond); None for a teacher without guidance."""
        return None

    def draw_dropped(self, count: int, generator: torch.Generator) -> Tensor:
        """Which samples lose their prompt, booleans (count,): a LoRA for use with CFG needs the empty one too."""
        # PCM's script drops 10 % where no guidance is distilled in; where it is, nobody asks for the empty
        # prompt later
        default = 0.0 if self.guided() else 0.1
        share = default if self.prompt_dropout is None else self.prompt_dropout
        return torch.rand(count, generator=generator) < share

    # --- the adversary

    def judged_at(self, levels: Levels, generator: torch.Generator) -> Tensor:
        """Levels to which a discriminator's inputs are noised, ticks (B,).

        Raises NotImplementedError for an objective without an adversarial loss.
        """
        raise NotImplementedError(f"{self.name} has no adversarial loss")

    # --- sampling

    def sampling(self) -> dict[str, Any]:
        """How a LoRA of this objective is sampled, as keyword arguments of `samplers.Recipe`."""
        grid = self.grid()
        return {
            "objective": self.name,
            "mode": "stochastic" if self.gamma else "deterministic",
            "gamma": self.gamma,
            "points": grid.points,
            "phases": grid.phases,
            **guidance_of(self.guided(), grid.phases),
        }

    # --- what a user should hear

    def notes(self, pictures: bool, started: bool) -> list[str]:
        """Sentences on where a run may disappoint.

        pictures: whether it learns on pictures of the user's. started: whether it goes on from a LoRA
        (`lora.init`).
        """
        if self.needs_teacher or pictures:
            return []
        return [f"{self.name} learns from pictures, and data.images is not set: it learns the teacher's own."]


def guidance_of(baked: bool, phases: int) -> dict[str, Any]:
    """A recipe's fields on guidance, for a LoRA of so many phases. baked: whether it has guidance in its weights."""
    best, low, high = (1.0, 1.0, 2.0) if baked else normalcfg_guidance(phases)
    return {
        "guidance_mode": "smallcfg" if baked else "normalcfg",
        "guidance": best,
        "guidance_min": low,
        "guidance_max": high,
        "negative_prompts": not baked,
    }


class Phased(Objective):
    """Objectives whose jumps end at the clean edge of the phase that they start in (arXiv 2405.18407, Sec. 3.1)."""

    phases: int = Field(4, description="phases, which is also the number of steps to sample with")

    def grid(self) -> PhaseGrid:
        return PhaseGrid(self.points, self.phases)

    def levels(self, count: int, schedule: Schedule, progress: float, generator: torch.Generator) -> Levels:
        u = self.start(count, generator)
        return Levels(u, self.grid().previous(u), self.grid().target(u))


class Distillation(Objective):
    """Objectives whose neighbour x_r is a step of the teacher, with its guidance or without."""

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
    """Objectives whose target is a jump of the student's own network, compared at s by pseudo-Huber."""

    huber_c: float = Field(1e-3, gt=0, description="where the pseudo-Huber distance turns from square to linear")
    target_ema: float = Field(
        0.0, ge=0, lt=1, description="decay of the averaged weights that make the target; 0: the student's own"
    )
    distance_in: Literal["point", "output"] = Field(
        "point",
        description="what the distance is taken of: the points where the jumps end, or these over what the student's "
        "output moves them by; then huber_c is in its units too",
    )

    def distance(self, jumps: Jumps) -> Tensor:
        return huber(*self.compared(jumps), self.huber_c)

    def compared(self, jumps: Jumps) -> tuple[Tensor, Tensor]:
        """Student and target as the distance compares them: points, or points in the units of the network's output."""
        if self.distance_in == "point":
            return jumps.student, jumps.target
        unit = per_output(jumps, self.clamp())
        return jumps.student / unit, jumps.target / unit

    def target_decay(self) -> float:
        return self.target_ema


def per_output(jumps: Jumps, min_alpha: float = 0.0) -> Tensor:
    """|d x_s / d output|: by how much the student's point at s moves when its network's output at u moves by 1.

    (B, 1, ...), as many dimensions as a point. A jump is linear in the output; min_alpha: the clamp of x0's divisor.
    """
    schedule, levels = jumps.schedule, jumps.levels
    level = schedule.alpha(levels.u), schedule.sigma(levels.u)
    ones = torch.ones(len(levels.u), *(1,) * (jumps.x_u.dim() - 1), device=jumps.x_u.device)
    x0, eps = x0_eps_from_output(ones, torch.zeros_like(ones), *level, jumps.prediction, min_alpha)
    return jump(x0, eps, schedule.alpha(levels.s), schedule.sigma(levels.s)).abs()


class FromNoise(Objective):
    """Objectives that draw levels at random, and the noisiest, where every sampling starts, nearly never."""

    noisiest_share: float = Field(
        0.0, ge=0, lt=1, description="share of the samples that start at the noisiest level; the others' is drawn"
    )

    def with_noisiest(self, values: Tensor, noisiest: float, generator: torch.Generator) -> Tensor:
        """The values drawn (B,), with `noisiest` in the place of that share of them."""
        if not self.noisiest_share:  # and nothing is drawn, so that other draws stay the same
            return values
        return torch.where(torch.rand(values.shape, generator=generator) < self.noisiest_share, noisiest, values)


class SelfConsistency(OwnTarget, Distillation):
    """Consistency distillation: x_r by a solver of the teacher, the student's own network at both ends."""

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
    """A recipe's fields for sampling as LCM's and TCD's own schedulers do: on this grid, rounded towards noise."""
    return {"sampling_points": points, "sampling_from_noise": True}
