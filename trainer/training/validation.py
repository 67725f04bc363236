"""What a LoRA is worth while it is trained: its loss on held-out samples, and how near its few-step pictures come to
the teacher's, from the same prompts and noise.

All draws are fixed, so figures of one run can be compared, and a run that goes on gives those of one that never
stopped. No number is drawn from torch's own generator.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...samplers import Recipe
from ...samplers.phases import count_steps
from ..config.config import Config
from ..data.order import seed_of
from ..evaluation.contestants import distilled_guidance
from ..evaluation.metrics import paired_error
from ..evaluation.setting import TEACHER, Setting
from ..evaluation.trial import Trial
from ..lora.recipe import recipe_for
from ..reporting.log import LOSS, LogLine
from ..system.files import write_tensors
from ..system.processes import Processes
from ..system.saying import Say
from .batches import Batches
from .engine import Engine
from .spread import NOISES, compared, distance_at
from .state import Trained

# Draws of each held-out sample, and pictures at each number of steps.
DRAWS, PICTURES = 2, 16
TRIAL = -2  # stands in the seed of the pictures' noise
REFERENCE = "teacher.safetensors"


def error_at(steps: int) -> str:
    """The name of the paired error at this number of steps."""
    return f"paired error at {count_steps(steps)}"


def steps_of(config: Config, recipe: Recipe) -> tuple[int, ...]:
    """The numbers of steps that pictures are compared at: those asked for, as far as there are levels for them, and the
    recommended one."""
    numbers = {*config.validation.steps, recipe.steps}
    return tuple(sorted(n for n in numbers if n <= recipe.grid().points))


def reference_of(config: Config, recipe: Recipe) -> Setting:
    """The teacher as a LoRA of this recipe is to imitate it."""
    guidance = distilled_guidance(config.objective.model_dump(), recipe)
    return Setting(TEACHER, config.validation.teacher_steps, guidance or 1.0)


def passes_of(config: Config, recipe: Recipe | None, held_out: int, a_sample: int) -> tuple[int, int]:
    """Samples that pass through the network in one measurement, and once for the teacher's pictures.

    recipe: None without a teacher; a_sample: passes of a sample in training.
    """
    each = held_out * DRAWS * a_sample * config.objective.loss_tells
    if recipe is None:
        return each, 0
    each += PICTURES * sum(Setting("student", n, recipe.guidance).evaluations for n in steps_of(config, recipe))
    return each * (2 if config.train.ema else 1), PICTURES * reference_of(config, recipe).evaluations


@dataclass(frozen=True)
class Best:
    """The update whose weights had the lowest `value` of a `figure` so far; against: hash of what decides it beside
    them."""

    step: int
    figure: str
    value: float
    against: str


@dataclass(frozen=True)
class Measurement:
    """Figures by name, of the weights that would be exported and, where these are an average, of the plain ones too.

    improved: whether these are of trained weights that are the best so far.
    """

    figures: dict[str, float]
    plain: dict[str, float]
    improved: bool

    def sentence(self, step: int) -> str:
        """The figures in words, as those after update `step`."""
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
        return f"Measured at update {step}: {figures}{'; the best so far' if self.improved else ''}."


def verdict(measured: Sequence[LogLine], start: str, promised: Collection[str]) -> str:
    """A sentence where a run has come no nearer to the teacher than it began, "" elsewhere.

    measured: lines of the log, in their order. start: what it began with, for people. promised: names of the figures
    that a run is to better, as `Validation.promised` has them.
    """
    if not measured or measured[0]["step"] != 0 or measured[-1]["step"] == 0:
        return ""
    first, last = measured[0]["figures"], measured[-1]["figures"]
    errors = [name for name in promised if name in last and name in first]
    worse = [name for name in errors if not last[name] < first[name]]
    if not worse:
        return ""
    figures = ", ".join(f"{name} {last[name]:.4g} (at first {first[name]:.4g})" for name in worse)
    everywhere = " Do not use it: change train.lr, train more, or look at the data." if worse == errors else ""
    return f"The LoRA is no nearer to the teacher than {start}: {figures}.{everywhere}"


class Validation:
    """Measures one run. `best`: the best weights so far, which a checkpoint must keep; None before there are any.

    Where nothing is held out, the pictures are of prompts that training sees, and there is no held-out loss; where the
    objective has no teacher, there is that loss alone.
    """

    def __init__(
        self, config: Config, engine: Engine, batches: Batches, trained: Trained, processes: Processes, say: Say
    ):
        self.config = config
        self.engine = engine
        self.base = engine.base
        self.adapter = engine.adapter
        self.batches = batches
        self.trained = trained
        self.processes = processes
        self.say = say
        self.best: Best | None = None
        self.steps: tuple[int, ...] = ()
        if engine.objective.needs_teacher and not self.base.whole:
            self.recipe = recipe_for(config, self.base.facts)
            self.steps = steps_of(config, self.recipe)
        self.matching = engine.objective.matching
        self.nearness = distance_at if self.matching else error_at
        self.judged_by = self.nearness(self.recipe.steps) if self.steps else LOSS
        self.with_loss = bool(len(batches.held_out)) and engine.objective.loss_tells
        self.active = bool(config.validation.every and (self.steps or self.with_loss))

    @property
    def promised(self) -> list[str]:
        """The errors that a LoRA is to better: at its own number of steps and more. With fewer steps than phases it
        stops half-way, where the base without it is nearer."""
        return [self.nearness(steps) for steps in self.steps if steps >= self.recipe.steps]

    def sentence(self) -> str:
        """What is measured, and when; empty where nothing is to be."""
        every, held_out = self.config.validation.every, len(self.batches.held_out)
        if not every:
            return ""
        if not self.active:
            no_teacher = "and there is no teacher to compare pictures with"
            return f"Nothing is measured during the run: no sample is held out, {no_teacher}."
        parts = [f"the loss on {held_out} held-out samples"] if self.with_loss else []
        if self.steps:
            prompts = "held-out prompts" if held_out else "prompts that training sees too"
            numbers = ", ".join(map(str, self.steps))
            teacher = f"the teacher's {count_steps(self.reference.steps)} at CFG {self.reference.guidance:g}"
            what = "distance, diversity and recall" if self.matching else "the paired error"
            parts.append(f"{what} of {PICTURES} pictures of {prompts} against {teacher}, at {numbers} steps")
        return f"Measured at the start, every {every} updates and at the end: {'; '.join(parts)}."

    def due(self, step: int) -> bool:
        """Whether to measure after update `step`."""
        every, steps = self.config.validation.every, self.config.train.steps
        return self.active and (step % every == 0 or step == steps)

    def __call__(self, step: int) -> Measurement:
        """Measure the weights after update `step`, and remember the best.

        Where pictures are compared with the teacher's, update 0 is a candidate too: a run that made the base worse has
        no best LoRA. The loss alone is no such measure, as the target is the student's own.
        """
        figures = self._measure(self.trained.weights(), step)
        plain = self._measure(self.adapter.state(), step) if self.trained.average and step else {}
        value = figures[self.judged_by]
        before = self.best.value if self.best else math.inf
        improved = bool(self.config.validation.best and (step or self.steps) and value < before)
        if improved:
            self.best = Best(step, self.judged_by, value, self.against)
        return Measurement(figures, plain, improved and step > 0)

    def state(self) -> dict[str, Any] | None:
        """The best so far, for a checkpoint's facts."""
        return self.best and asdict(self.best)

    def load(self, state: dict[str, Any] | None, file: Path) -> None:
        """Put `state` back; file: where the best weights are. Without it, and where other settings make figures that
        cannot be compared, the next ones are the best."""
        self.best = Best(**state) if state else None
        if not self.best:
            return
        reason = "" if file.exists() or not self.best.step else "is gone"
        if self.active and (self.best.figure, self.best.against) != (self.judged_by, self.against):
            reason = "was measured against something else"
        if reason:
            self.say(f"{file.name} of update {self.best.step} {reason}: the best is looked for anew.")
            self.best = None

    @torch.no_grad()
    def _measure(self, weights: dict[str, Tensor], step: int) -> dict[str, float]:
        figures = {}
        with self.adapter.using(weights), torch.compiler.set_stance("force_eager"):
            if self.with_loss:
                figures[LOSS] = self._loss(step)
            for steps in self.steps:
                figures |= self._nearness(self._pictures(steps), steps)
        if not self.config.train.shard:
            return figures

        # every process has measured, and rounding differs: all must come to one verdict on which weights are the best
        values = torch.tensor(list(figures.values()), dtype=torch.float64, device=self.base.device)
        self.processes.mean([values], values.new_zeros(1))
        return dict(zip(figures, values.tolist(), strict=True))

    def _nearness(self, pictures: Tensor, steps: int) -> dict[str, float]:
        """How near pictures in this number of steps come to the teacher's: each to its own, or as sets."""
        if self.matching:
            return compared(pictures, self.teacher, steps)
        return {error_at(steps): paired_error(pictures, self.teacher)}

    def _loss(self, step: int) -> float:
        """The objective's own distance, over all held-out samples at `DRAWS` draws each."""
        held_out, size, device = set(self.batches.held_out), self.batches.split.size, self.base.device
        losses = []
        for bucket in self.batches.cache.buckets:
            samples = [n for n in bucket.tolist() if n in held_out]
            for draw in range(DRAWS):
                for start in range(0, len(samples), size):
                    batch = self.batches.fixed(samples[start : start + size], draw, step).to(device)
                    with self.processes.accelerator.autocast():
                        losses.append(self.engine.distance(batch).float())
        return torch.cat(losses).mean().item()

    def _pictures(self, steps: int) -> Tensor:
        """Latents of the LoRA as it stands, as its recipe says."""
        with self.processes.accelerator.autocast():
            return self.trial.latents(Setting("student", steps, self.recipe.guidance), self.base, self.recipe)

    @cached_property
    def prompts(self) -> list[str]:
        """One for each picture: held-out captions, else those that a preview shows, in turn. Where sets are compared,
        each for as many pictures as tell how much they differ."""
        cache, held_out = self.batches.cache, self.batches.held_out
        captions = (cache.captions[n] for n in held_out) if len(held_out) else islice(cache.prompts, 1, 1 + PICTURES)
        each = NOISES if self.matching else 1
        different = list(islice(dict.fromkeys(captions), PICTURES // each)) or [""]
        return [prompt for prompt in islice(cycle(different), PICTURES // each) for _ in range(each)]

    @cached_property
    def trial(self) -> Trial:
        condition = {k: v.to(self.base.device) for k, v in self.batches.cache.encoding(self.prompts).items()}
        seed = seed_of(self.config.train.seed, TRIAL)
        return Trial.on(self.base, condition, self.engine.null, seed, self.config.data.resolution)

    @property
    def reference(self) -> Setting:
        return reference_of(self.config, self.recipe)

    @cached_property
    def teacher(self) -> Tensor:
        """The reference's latents, from the run's folder where they are there."""
        path, fingerprint = self.config.run_folder / REFERENCE, {"fingerprint": self.against}
        if path.is_file():
            try:
                with safe_open(path, "pt") as file:
                    if file.metadata() == fingerprint:
                        return file.get_tensor("latents").clone()  # the file may be replaced
            except SafetensorError as error:
                self.say(f"{path.name} is damaged ({error}) and is made again.")
        # sets are compared across noises, so that nothing is near for being drawn from the same
        trial = self.trial.with_noise(self.trial.seed + 1) if self.matching else self.trial
        with self.processes.accelerator.autocast():
            latents = trial.latents(self.reference, self.base)
        if self.processes.first:
            try:
                write_tensors(path, {"latents": latents}, fingerprint)
            except OSError as error:  # a run that goes on makes them again
                self.say(f"{error}")
        return latents

    @cached_property
    def against(self) -> str:
        """Hash of all that decides the reference, or without one the held-out loss."""
        base, config, batches = self.base, self.config, self.batches
        content = [base.weights_hash, base.encoder_settings, base.prediction, base.schedule_settings, base.null]
        content += [config.base.dtype, config.base.quantize]
        if self.steps:
            content += [asdict(self.reference), self.prompts, self.trial.seed, list(self.trial.noise.shape)]
            content += ["other noise"] * self.matching
        else:
            content += [batches.cache.folder.name, list(batches.held_out), batches.seed, batches.updates]
            content.append(config.objective.model_dump(mode="json"))
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()
