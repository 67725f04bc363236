"""A training loop built like PCM's published scripts, which ours is measured against.

Two whole networks, a frozen teacher and a student with the LoRA, in fp32 under autocast (SD3's student in
base.dtype, and its teacher too where there is no discriminator); pictures and prompts encoded in every
iteration; the teacher's conditional and unconditional passes apart; the target's pass on all rows; AdamW, and
the loss read on the host after every iteration. A discriminator learns in the even iterations and the student
in the odd ones, and in both everything is computed, so that an update of the student takes two.

Where the scripts waste without need, this loop does not: the discriminator has our heads (the scripts' for
SD1.5 hold 664 million parameters and run the whole body), frozen weights take no gradient, and pictures are
read and drawn beforehand, as their data workers do. The mathematics is ours, so that on one batch both loops
learn the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import relu

from ...samplers import jump, renoise
from ..config.config import Config
from ..families import Base, load_base
from ..families.base import DTYPES
from ..families.generate import predict
from ..lora.adapter import Adapter
from ..lora.merged import merge_into
from ..objectives import Jumps
from ..system.clock import Clock
from ..training.adversary import BETAS, WEIGHT_DECAY, mean_of
from ..training.engine import Batch
from ..training.loop import Run

ENCODED = 8  # pictures that the VAE encodes at a time


@dataclass(frozen=True)
class Inputs:
    """A batch as data workers hand it on.

    pixels: (B, 3, H, W) in [-1, 1] on the CPU. captions: "" where the prompt is dropped. draws: the step's
    levels, noise and guidance.
    """

    pixels: Tensor
    captions: list[str]
    draws: Batch


class Reference:
    """The loop, on the data and the draws of one of our runs, which must be one that `check_reference` lets pass."""

    def __init__(self, run: Run):
        self.run, self.config = run, run.config
        self.objective = self.config.objective
        self.device = run.base.device
        self.clock = Clock(self.device)
        self.teacher, self.student = _load(self.config, self.device)
        self.null = self.teacher.null_condition(self.teacher.encode_prompts([""]))

        train, lora = self.config.train, self.config.lora
        self.adapter = Adapter(
            self.student.network,
            self.student.lora_targets,
            lora.rank,
            lora.alpha,
            train.seed,
            ranks=lora.ranks,
            dora=lora.dora,
        )
        if train.gradient_checkpointing:
            self.student.network.enable_gradient_checkpointing()
            self.student.network.train()

        # what learns, in the order of the iterations that make one update
        self.learners = {"student": self.adapter.parameters()}
        self.optimizers = {"student": self._adamw("student", lr=train.lr, weight_decay=train.weight_decay)}
        if run.engine.adversary:
            self.heads = deepcopy(run.engine.adversary.heads)
            self.learners = {"discriminator": list(self.heads.parameters()), **self.learners}
            self.optimizers["discriminator"] = self._adamw(
                "discriminator", lr=self.config.adversarial.lr, weight_decay=WEIGHT_DECAY, betas=BETAS
            )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.base.dtype == "fp16")
        self.pictures: dict[int, Tensor] = {}
        self.drawn = 0
        self.inputs: Iterator[Inputs] = iter(())
        self.loss = float("nan")

    def prepare(self, updates: int) -> None:
        """Draw the inputs of this many updates, which is not the loop's own time."""
        count = updates * len(self.learners) * self.config.train.accumulation
        self.inputs = iter([self._draw() for _ in range(count)])

    def update(self) -> None:
        """One update of the student, on inputs that were prepared."""
        for learns in self.learners:
            self._iteration(learns)

    def encoded(self, inputs: Inputs) -> Batch:
        """The inputs as a batch on the device, with latents and prompts encoded now."""
        draws = inputs.draws.to(self.device)
        with torch.no_grad():
            latents = [self.teacher.encode_images(part) for part in inputs.pixels.split(ENCODED)]
            x0 = torch.cat([mean if std is None else mean + std * torch.randn_like(std) for mean, std in latents])
            condition = draws.condition | self.teacher.encode_prompts(inputs.captions)
        return replace(draws, x0=x0, condition=condition)

    def losses(self, batch: Batch, learns: str = "student") -> Tensor:
        """(B,) the losses that one iteration minimises, of the student or the discriminator."""
        u, r, s = batch.levels.u, batch.levels.r, batch.levels.s
        x_u = jump(batch.x0, batch.noise, *self._level(u))
        with self.clock.part("student"):
            student = self._jump(x_u, u, s, batch)
        with torch.no_grad():
            with self.clock.part("teacher"):
                x_r = self._solver_step(x_u, u, r, batch)
            with self.clock.part("target"):
                inside = (r > s).view(-1, 1, 1, 1)
                target = torch.where(inside, self._jump(x_r, r.clamp(min=1), s, batch), x_r)
        if learns == "discriminator":
            with self.clock.part("discriminator"), torch.no_grad():
                fake, real = self._features(student, batch, True), self._features(target, batch, False)
            with self.clock.part("discriminator"):
                return _hinge(1 + x for x in self.heads(fake)) + _hinge(1 - x for x in self.heads(real))
        jumps = Jumps(x_u, x_r, student, target, batch.levels, self.student.schedule, self.student.prediction, 0.0)
        distance = self.objective.distance(jumps)
        if len(self.learners) == 1:
            return distance
        with self.clock.part("discriminator"):
            generator = _hinge(1 - x for x in self.heads(self._features(student, batch, True)))
        return distance + self.config.adversarial.weight * generator

    def _draw(self) -> Inputs:
        """The next inputs: our run's batch, with its latents decoded to pictures once, and prompts dropped anew."""
        numbers, draws = self.run.batches.at(self.drawn)
        self.drawn += 1
        for n, latent in zip(numbers, draws.x0, strict=True):
            if n not in self.pictures:
                self.pictures[n] = self.run.base.decode(latent[None])[0].mul(255).round().byte()
        pixels = torch.stack([self.pictures[n] for n in numbers]).float() / 127.5 - 1
        dropped = self.objective.draw_dropped(len(numbers), torch.Generator().manual_seed(self.drawn))
        captions = ["" if no else self.run.cache.captions[n] for n, no in zip(numbers, dropped.tolist(), strict=True)]
        return Inputs(pixels, captions, draws)

    def _iteration(self, learns: str) -> None:
        """One step of one optimizer, over as many inputs as gradients are accumulated from."""
        parameters, optimizer = self.learners[learns], self.optimizers[learns]
        parts = self.config.train.accumulation
        if len(self.learners) > 1:
            self.heads.requires_grad_(learns == "discriminator")
        for _ in range(parts):
            inputs = next(self.inputs)
            with self.clock.part("data"):
                batch = self.encoded(inputs)
            with self.run.processes.accelerator.autocast():
                loss = self.losses(batch, learns).mean() / parts
            with self.clock.part("backward"):
                self.scaler.scale(loss).backward()
        with self.clock.part("optimizer"):
            self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, self.config.train.max_grad_norm)
            self.scaler.step(optimizer)
            self.scaler.update()
            optimizer.zero_grad()
        self.loss = loss.item()

    def _adamw(self, learner: str, **settings) -> torch.optim.Optimizer:
        if self.config.train.optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(self.learners[learner], **settings)
        return torch.optim.AdamW(self.learners[learner], **settings)

    def _solver_step(self, x: Tensor, u: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """x at ticks u taken to ticks r by the teacher's DDIM step, the passes of its guidance apart."""
        x0, eps = predict(self.teacher, x, u, batch.condition)
        if batch.guidance is not None:
            null = {name: row.expand_as(batch.condition[name]) for name, row in self.null.items()}
            x0_null, eps_null = predict(self.teacher, x, u, batch.condition | null)
            g = batch.guidance.view(-1, 1, 1, 1)
            x0, eps = x0_null + g * (x0 - x0_null), eps_null + g * (eps - eps_null)
        return jump(x0, eps, *self._level(r))

    def _jump(self, x: Tensor, tick: Tensor, to: Tensor, batch: Batch) -> Tensor:
        """x at these ticks taken to the others by the student."""
        return jump(*predict(self.student, x, tick, batch.condition, self.objective.clamp()), *self._level(to))

    def _features(self, x: Tensor, batch: Batch, fake: bool) -> list[Tensor]:
        """The teacher's features of a student's, or a target's, points, noised to the levels that are judged."""
        judged = batch.judged
        noise = judged.student_noise if fake else judged.target_noise
        point = renoise(x, noise, *self._level(batch.levels.s), *self._level(judged.tick))
        return self.teacher.features(point, judged.tick, batch.condition)

    def _level(self, tick: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at these ticks."""
        return self.teacher.schedule.alpha(tick), self.teacher.schedule.sigma(tick)


def check_reference(config: Config) -> None:
    """Raise ValueError for an objective that the published scripts do not have."""
    if config.objective.name != "pcm":
        raise ValueError(
            f"The reference loop is that of PCM's published scripts, and objective.name is {config.objective.name}. "
            "Use --no-reference, or objective.name=pcm."
        )


def _load(config: Config, device: torch.device) -> tuple[Base, Base]:
    """(teacher, student): two copies of the base, of which the teacher has the encoders."""
    low, full = DTYPES[config.base.dtype], torch.float32

    def load(dtype: torch.dtype) -> Base:
        base = load_base(config.base.path, dtype=dtype, device=device, **config.base.reading())
        merge_into(base, config.base.loras)
        return base

    teacher = load(full)
    low_student = teacher.published_in_low_precision
    if low_student and not config.adversarial.weight:
        teacher.network.to(low)
    for encoder in teacher.text_encoders:
        encoder.to(low)

    # fp16 overflows in SDXL's VAE
    teacher.vae.to(full if low == full else torch.bfloat16)
    student = load(low if low_student else full)
    student.drop_encoders()
    student.vae = None
    return teacher, student


def _hinge(margins: Iterable[Tensor]) -> Tensor:
    """(B,) the hinge loss of margins, averaged over the heads."""
    return mean_of([relu(margin) for margin in margins])
