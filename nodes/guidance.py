"""The node that has CFG on chosen steps only, and the schedule that it puts on a model for every sampler."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..samplers import Recipe
from ..samplers.recipe import SLACK
from . import inputs
from .host import menu_of, show, speaking, warned
from .lora_on_model import model_family, recipe_for, shift_of

KEY = "pcm_cfg_schedule"
TAMERS = ("nodes_apg", "nodes_cfg", "nodes_mahiro", "nodes_tcfg")  # core's nodes that hold a high CFG down
CFG_FUNCTIONS = ("sampler_pre_cfg_function", "sampler_post_cfg_function")  # lists in a model's options


@dataclass(frozen=True)
class CFGSchedule:
    """CFG `cfg` on the steps `first` to `last`, counted from 1, and 1 on the others.

    ends: for each step of the plan, the sigma that it lies above. A step is known by its sigma alone, since
    the wrapper is called with no count, and any sampler may run the model, with levels of its own.
    notes: of that plan.
    """

    cfg: float
    first: int
    last: int
    ends: tuple[float, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe, steps: int, cfg: float, first: int, last: int) -> CFGSchedule:
        """The schedule on the levels of a recipe in so many steps; 0 for `last` is the last one.

        Raises ValueError for steps that there are not.
        """
        plan = recipe.grid().plan_at_most(steps)
        steps = plan.steps
        ticks = torch.tensor(plan.ticks)
        last = last or steps
        if not 1 <= first <= last <= steps:
            raise ValueError(
                f"from_step is {first} and to_step {last}, of {steps} steps: the first may be 1 to {steps}, the last "
                f"from there to {steps}, such as 1 and 1 for the first step alone; to_step 0 is the last one."
            )
        # A step starts at the end of the one before. SLACK keeps a
        # scheduler's rounding from moving it across.
        ends = recipe.schedule().k_sigma(ticks[1:] + SLACK)
        return cls(cfg, first, last, tuple(ends.tolist()), plan.notes)

    def at(self, sigma: float) -> float:
        """The CFG for a model evaluation at this sigma of the host's convention."""
        step = 1 + sum(sigma <= end for end in self.ends[:-1])
        return self.cfg if self.first <= step <= self.last else 1.0

    @property
    def steps(self) -> int:
        return len(self.ends)

    @property
    def guided(self) -> int:
        """Number of steps that have the CFG."""
        return self.last - self.first + 1

    @property
    def text(self) -> str:
        """The schedule in words: "CFG 2 on step 1 of 4, else 1"."""
        steps = f"step {self.first}" if self.guided == 1 else f"steps {self.first} to {self.last}"
        rest = ", else 1" if self.guided < self.steps else ""
        return f"CFG {self.cfg:g} on {steps} of {self.steps}{rest}"

    @property
    def evaluations(self) -> int:
        """Evaluations of the model for one picture: at CFG 1 the host leaves the negative prompt's out."""
        return self.steps + self.guided * (self.cfg != 1)

    def __call__(self, executor: Callable[..., Tensor], x: Tensor, sigma: Tensor, *rest: Any, **more: Any) -> Tensor:
        """Predict with this level's CFG, as a PREDICT_NOISE wrapper of the host.

        That wrapper, and none further in, comes before the host chooses which prompts to evaluate by its CFG.
        Raises ValueError where that needs a negative prompt, and the guider has none, or several CFGs.
        """
        guider = executor.class_obj
        cfg = self.at(float(sigma.flatten()[0]))

        # core's DualModelGuider has loaded no second model where its own CFG is 1.
        other_kind = cfg_of(guider) is None or getattr(guider, "uncond_inner", guider) is None
        if cfg != 1 and (other_kind or guider.conds.get("negative") is None):
            lacks = "has another kind of CFG" if other_kind else "has no negative prompt"
            raise ValueError(
                f"PCM CFG schedule asks for {self.text}, but {type(guider).__name__} {lacks}: use CFGGuider, or take "
                "PCM CFG schedule out."
            )

        # The guider outlives the run: its own CFG is put back, whatever happens.
        own_cfg = guider.cfg
        guider.cfg = cfg
        try:
            return executor(x, sigma, *rest, **more)
        finally:
            guider.cfg = own_cfg


def schedule_in(model: Any) -> CFGSchedule | None:
    """The CFG schedule that a host MODEL follows, the last of several; None without one."""
    return next(reversed(model.get_wrappers(WrappersMP.PREDICT_NOISE, KEY)), None)


def cfg_of(guider: Any) -> float | None:
    """The CFG of a host GUIDER; None where it has not one number: core's DualCFGGuider has two."""
    return guider.cfg if isinstance(guider.cfg, int | float) and not hasattr(guider, "cfg1") else None


def cfg_to_judge(model: Any, recipe: Recipe, cfg: float | None) -> float:
    """The CFG that `Recipe.warnings` is to judge: that of the schedule in a host MODEL, if any, else `cfg`.

    Where neither is CFG as the recipe means it, the recipe's own, which earns no warning: where it is None
    (`cfg_of`), and where the model tames a high CFG (`is_tamed`).
    """
    schedule = schedule_in(model)
    cfg = schedule.cfg if schedule else cfg
    return recipe.guidance if cfg is None or is_tamed(model) else cfg


def is_tamed(model: Any) -> bool:
    """Whether a node holds a high CFG down in a host MODEL, as core's RescaleCFG, APG, Mahiro, CFGNorm,
    CFGZeroStar and TCFG do."""
    options = model.model_options
    functions = [function for kind in CFG_FUNCTIONS for function in options.get(kind, [])]
    # the host names the module of a file by its path
    modules = [re.split(r"[./\\]", getattr(function, "__module__", ""))[-1] for function in functions]
    return "sampler_cfg_function" in options or any(module in TAMERS for module in modules)


def guides_at_one(model: Any) -> bool:
    """Whether the negative prompt is evaluated at CFG 1 too, as NAG, SAG and the like have it."""
    return bool(model.model_options.get("disable_cfg1_optimization"))


class PCMCFGSchedule(io.ComfyNode):
    """PCM CFG schedule: CFG on chosen steps only."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return speaking(
            node_id="PCMCFGSchedule",
            display_name="PCM CFG schedule",
            category=menu_of("CFGGuider"),
            description="CFG on chosen steps only, and none on the others, which then take half the time. Every "
            "sampler after it follows, whatever CFG is set there.",
            search_aliases=["pcm", "phased consistency", "cfg schedule", "dynamic cfg", "guidance interval", "faster"],
            inputs=[
                inputs.model(),
                inputs.recipe(),
                inputs.cfg(),
                inputs.steps(),
                io.Int.Input(
                    "from_step",
                    default=1,
                    min=1,
                    max=100,
                    tooltip="The first step with CFG. Step 1 is the noisiest, which decides on the composition.",
                ),
                io.Int.Input(
                    "to_step",
                    default=1,
                    min=0,
                    max=100,
                    tooltip="The last step with CFG. 0: the last of all, where the finest detail is drawn.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the schedule, for any sampler with CFG.")
            ],
        )

    @classmethod
    def execute(
        cls, model, cfg: float, steps: int, from_step: int, to_step: int, recipe: Recipe | None = None
    ) -> io.NodeOutput:
        recipe = recipe_for(cls, model, recipe)
        steps = steps or recipe.steps
        cfg = cfg or recipe.guidance
        schedule = CFGSchedule.of(recipe, steps, cfg, from_step, to_step)

        # One schedule a model: on top of another, this one takes its place
        # instead of both being followed in turn.
        model = model.clone()
        model.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, KEY)
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, schedule)

        warnings = recipe.warnings(steps, cfg_to_judge(model, recipe, cfg), model_family(model), shift_of(model))
        if cfg == 1:
            warnings.insert(0, "CFG 1 guides nothing: set cfg above 1.")
        lines = [*warned(warnings), *schedule.notes]
        steps = schedule.steps
        if cfg != 1 and schedule.guided < steps and recipe.guidance_min > 1:
            lines.append(f"The other steps are at CFG 1, below the LoRA's {recipe.guidance_min:g}.")
        lines.append(
            f"{schedule.text}: {2 * steps} evaluations, since another node wants the negative prompt at CFG 1 too."
            if guides_at_one(model)
            else f"{schedule.text}: {schedule.evaluations} evaluations; with CFG on all {2 * steps}, with none {steps}."
        )
        return io.NodeOutput(model, ui=show(cls, lines))
