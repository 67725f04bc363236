"""The run: cache, then train, save, preview, and go on exactly where a killed run stopped."""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor

from . import whole
from .adapter import Average, learner
from .adversarial import BETAS, WEIGHT_DECAY, Adversary
from .batches import Batches
from .checkpoint import (
    check_same_run,
    load_latest_state,
    load_optimizer_tensors,
    optimizer_tensors,
    save_state,
)
from .config import Config
from .data.cache import LatentCache, build_cache
from .engine import Engine, Losses
from .export import DTYPES, export, recipe_for, self_test
from .families import Base, load_base
from .initial import check_start, start_from
from .previews import preview_grid, save_image


class RunFailed(RuntimeError):
    """The run could not be finished; the message says why, what is kept, and what to do."""


@dataclass(frozen=True)
class Status:
    """What a progress display shows after an update."""

    step: int
    steps: int
    loss: float
    samples_per_second: float
    peak_memory: float


class Reporter:
    """How a run tells what it does; the command line draws a progress bar over these."""

    def say(self, text: str) -> None: ...

    def caching(self, what: str, done: int, total: int) -> None: ...

    def update(self, status: Status) -> None: ...


def train(config: Config, reporter: Reporter | None = None) -> Path:
    """Train as configured and return the path of what was made: a LoRA's file, or the folder of a network that was
    trained whole. The same call goes on where an earlier one stopped.

    Raises ValueError for bad input, `RunFailed` for a run that cannot go on (NaN, a failed self-test, an interrupt).
    """
    return Run(config, reporter or Reporter()).go()


class Run:
    """One run's parts, and the loop over them."""

    def __init__(self, config: Config, reporter: Reporter):
        self.config, self.reporter = config, reporter
        self.folder = config.run_folder
        precision = {"fp32": "no"}.get(config.base.dtype, config.base.dtype)
        # the other processes wait while the first one caches, which may take hours
        patience = InitProcessGroupKwargs(timeout=timedelta(days=2))
        self.accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[patience])
        if self.accelerator.is_main_process:
            check_same_run(self.folder, config.what_decides_the_weights())
        self.base = self._load_base()
        self.cache = self._fill_cache()
        self.base.drop_encoders()
        lora = config.lora
        self.adapter = learner(self.base.network, type(self.base), lora.rank, lora.alpha, config.train.seed)
        reporter.say(self.adapter.sentence())
        if config.lora.init:
            reporter.say(start_from(config, self.base, self.adapter))
        if config.train.gradient_checkpointing:
            self.adapter.checkpoint_gradients()
        self.average = Average(self.adapter, config.train.ema) if config.train.ema else None
        self.batches, self.engine = self._make_parts()
        self.optimizer = self.accelerator.prepare(_make_optimizer(config, self._learners()))
        self.step = self._resume()
        self.stop_asked = False

    @property
    def lora_path(self) -> Path:
        return self._file(self.config.name)

    def _file(self, name: str) -> Path:
        """Where a LoRA, or a network that is trained whole, is saved under this name."""
        return self.folder / (name if self.base.whole else f"{name}.safetensors")

    def go(self) -> Path:
        """Train to the end; on SIGINT or SIGTERM save and stop."""
        writer = self._tensorboard()
        handlers = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        started, at_start, seen_loss = time.monotonic(), self.step, float("nan")
        try:
            while self.step < self.config.train.steps:
                shown = self._update()
                loss = shown["loss"]
                seen_loss = loss if math.isnan(seen_loss) else 0.95 * seen_loss + 0.05 * loss
                rate = (self.step - at_start) * self.samples_per_update / (time.monotonic() - started)
                memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
                self.reporter.update(Status(self.step, self.config.train.steps, seen_loss, rate, memory))
                if writer:
                    for tag, value in (shown | {"samples per second": rate}).items():
                        writer.add_scalar(tag, value, self.step)
                self._between_updates()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if writer:
                writer.close()
        return self._finish()

    @property
    def samples_per_update(self) -> int:
        return self.config.train.batch_size * self.config.train.accumulation * self.accelerator.num_processes

    def _update(self) -> dict[str, float]:
        """One optimizer update of the adapter, and of the heads where there are any; returns what to plot of it."""
        train = self.config.train
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * self._lr_factor()
        shown, seen = Counter(), []
        for part in range(train.accumulation):
            numbers, batch = self.batches.at(self.step * train.accumulation + part)
            seen += numbers
            with self.accelerator.autocast():
                losses = self.engine.step(batch)
            total = self._total(losses)
            self._check_finite(total, numbers)
            self.accelerator.backward(total.mean() / train.accumulation)
            shown.update({k: v.mean().item() / train.accumulation for k, v in losses.named().items()})
        self._share_gradients()
        self.accelerator.unscale_gradients()
        for name, parameters in self._learners().items():
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), train.max_grad_norm).item()
            if not math.isfinite(norm) and self.accelerator.scaler is None:
                raise RunFailed(self._not_finite("The gradient", seen))
            shown[f"gradient norm of the {name}"] = norm
        self.optimizer.step()
        self.step += 1
        if self.average:
            self.average.update(self.step)
        self.engine.updated(self.step, (self.step - 1) / train.steps, self.step / train.steps)
        return {**shown, "lr": train.lr * self._lr_factor()}

    def _total(self, losses: Losses) -> Tensor:
        """(B,) what is minimised: each part reaches its own weights alone, so one backward pass serves all."""
        if losses.generator is None:
            return losses.distance
        return losses.distance + self.config.adversarial.weight * losses.generator + losses.discriminator

    def _share_gradients(self) -> None:
        """Mean of the gradients over all processes: the learners are all there is to share."""
        if self.accelerator.num_processes > 1:
            for parameter in (p for learner in self._learners().values() for p in learner.values()):
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    def _lr_factor(self) -> float:
        """Warm-up and schedule, the same for every learner."""
        train = self.config.train
        warm = min(1.0, (self.step + 1) / (train.warmup + 1))
        falling = 0.5 * (1 + math.cos(math.pi * self.step / train.steps)) if train.lr_schedule == "cosine" else 1.0
        return warm * falling

    def _check_finite(self, losses: Tensor, numbers: list[int]) -> None:
        if not losses.isfinite().all():
            bad = [numbers[i] for i in (~losses.isfinite()).nonzero().flatten().tolist()]
            raise RunFailed(self._not_finite("The loss", bad))

    def _not_finite(self, what: str, numbers: list[int]) -> str:
        captions = "; ".join(f"{n}: {self.cache.captions[n]!r}" for n in numbers[:4])
        folder = self.folder / "checkpoints"
        kept = f"The last checkpoint is kept in {folder}" if folder.is_dir() else "No checkpoint was due yet"
        return (
            f"{what} is not finite at update {self.step + 1}, samples {captions}. {kept}. "
            "Lower train.lr, use base.dtype=bf16 or fp32, or remove these samples."
        )

    def _between_updates(self) -> None:
        config, last = self.config, self.step == self.config.train.steps
        if not last and self.step % config.train.save_every == 0:
            self._save(export_too=True)
        if config.preview.every and self.step % config.preview.every == 0 and not last:
            self.preview(self.folder / "previews" / f"step-{self.step:07d}.png")
        if self.stop_asked and not last:
            self._save(export_too=False)
            where = f"Stopped at update {self.step} of {config.train.steps}"
            raise RunFailed(f"{where}; all is saved. The same command goes on from here.")

    def _finish(self) -> Path:
        self._save(export_too=True)
        if self.config.preview.every:
            self.preview(self.folder / "previews" / f"step-{self.step:07d}.png")
            self.preview(self.folder / f"{self.config.name}.preview.png", captions=False)
        return self.lora_path

    def weights(self) -> dict[str, Tensor]:
        """What is exported: the average where there is one."""
        return {n: w.cpu() for n, w in self.average.weights.items()} if self.average else self.adapter.state()

    def _save(self, export_too: bool) -> None:
        """Checkpoint, LoRA and self-test, on the first process."""
        if not self.accelerator.is_main_process:
            return
        groups = {
            "adapter": self.adapter.state(),
            "optimizer": optimizer_tensors(self.optimizer.optimizer, self._names()),
            "average": self.average.weights if self.average else {},
            "discriminator": self._learners().get("discriminator", {}),
            **self.engine.state(),
        }
        scaler = self.accelerator.scaler
        facts = {
            "scaler": scaler.state_dict() if scaler else None,
            "processes": self.accelerator.num_processes,
            "cache": self.cache.folder.name,
        }
        save_state(self.folder / "checkpoints", self.step, groups, facts, self.config.train.keep_checkpoints)
        if not export_too:
            return
        final = self.step == self.config.train.steps
        path = self.lora_path if final else self._file(f"{self.config.name}-{self.step:07d}")
        write, test = (whole.export, whole.self_test) if self.base.whole else (export, self_test)
        write(path, self.weights(), self.config, self.base, self.step, len(self.cache))
        with self.adapter.using(self.weights()):
            result = test(path, self.base, self.adapter, self.cache.encoding([""]))
        self.reporter.say(f"{path}: {result.sentence()}.")
        if not result.passed:
            raise RunFailed(
                f"What was saved does not give the trained output when diffusers loads it ({result.sentence()}). "
                f"The checkpoint in {self.folder / 'checkpoints'} is good; please report this with the versions that "
                "pcm doctor prints."
            )

    def _resume(self) -> int:
        found = load_latest_state(self.folder / "checkpoints")
        if found is None:
            return 0
        step, groups, facts = found
        if facts["cache"] != self.cache.folder.name:
            raise ValueError(
                f"{self.folder} holds a run on other data: the base, the pictures or the captions have changed since. "
                "Restore them to go on, use another output folder to start anew, or delete the folder."
            )
        then, now = facts["processes"], self.accelerator.num_processes
        if then != now:
            raise ValueError(
                f"{self.folder} holds a run of {then} processes, and there are {now} now, which would draw other "
                "samples. Start as many again, or use another output folder."
            )
        self.adapter.load(groups["adapter"])
        load_optimizer_tensors(self.optimizer.optimizer, groups.get("optimizer", {}), self._names())
        if self.engine.adversary:
            self._resume_heads(groups.get("discriminator", {}))
        if self.average:
            self.average.weights = {n: w.to(self.base.device) for n, w in groups["average"].items()}
        self.engine.load(groups)
        if self.accelerator.scaler and facts["scaler"]:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.reporter.say(f"Going on from update {step} of {self.config.train.steps}.")
        return step

    def _resume_heads(self, saved: dict[str, Tensor]) -> None:
        heads = self._learners()["discriminator"]
        missing = sorted(heads.keys() ^ saved.keys())
        if missing:
            raise ValueError(
                f"The checkpoint in {self.folder / 'checkpoints'} lacks the discriminator of this adversarial run "
                f"({len(missing)} tensors differ, such as {missing[0]}); without it the run would not go on as it was. "
                "Use another output folder to start anew, or delete the folder."
            )
        with torch.no_grad():
            for name, parameter in heads.items():
                parameter.copy_(saved[name])

    def preview(self, path: Path, captions: bool = True) -> None:
        """Draw the run's fixed grid with the weights that would be saved, by the first process."""
        if not self.accelerator.is_main_process:
            return
        with self.adapter.using(self.weights()), self.accelerator.autocast():
            image = preview_grid(self.config, self.base, self.cache, self.engine.null, captions)
        save_image(image, path)

    def _load_base(self) -> Base:
        b = self.config.base
        self.reporter.say(f"Loading {b.path}.")
        options = b.model_dump(exclude={"path", "dtype"}, exclude_none=True)
        base = load_base(b.path, dtype=DTYPES[b.dtype], device=self.accelerator.device, **options)
        base.latent_shape(self.config.data.resolution)
        # what cannot be trained, or sampled, is said before anything is cached
        if base.whole:
            whole.check_whole(self.config)
        else:
            recipe_for(self.config, base)
        if self.config.lora.init:
            check_start(self.config, base)
        for note in self.config.notes():
            self.reporter.say(note)
        return base

    def _make_parts(self) -> tuple[Batches, Engine]:
        """Batches and engine, once the base is seen to predict what it is said to on this run's own data."""
        config, base, a = self.config, self.base, self.config.adversarial
        empty = {k: v.to(base.device) for k, v in self.cache.encoding([""]).items()}
        null = base.null_condition(empty)
        processes = {"rank": self.accelerator.process_index, "processes": self.accelerator.num_processes}
        train = config.train
        draws = {"size": train.batch_size, "updates": train.steps, "accumulation": train.accumulation}
        draws |= {"seed": train.seed, "judged": a.weight > 0}
        batches = Batches(self.cache, base, config.objective, empty, **draws, **processes)
        some = range(min(8, len(self.cache)))
        x0 = self.cache.latents(some, torch.Generator().manual_seed(0)).to(base.device)
        condition = batches.condition(some)
        if not base.whole:
            with self.adapter.off(), self.accelerator.autocast():
                base.check_prediction(x0, condition)
        adversary = None
        if a.weight:
            adversary = Adversary(base, self.adapter, null, config.data.resolution, a.width, config.train.seed)
        return batches, Engine(base, self.adapter, config.objective, null, adversary)

    def _learners(self) -> dict[str, dict[str, torch.nn.Parameter]]:
        """What is trained, by name: the adapter's weights, and those of the discriminator's heads."""
        learners = {"adapter": self.adapter.named_parameters()}
        if self.engine.adversary:
            learners["discriminator"] = dict(self.engine.adversary.heads.named_parameters())
        return learners

    def _names(self) -> list[str]:
        """The learners' parameters in the optimizer's order."""
        return [name for learner in self._learners().values() for name in learner]

    def _fill_cache(self) -> LatentCache:
        with self.accelerator.main_process_first():
            cache = build_cache(self.config, self.base, self.reporter.caching)
        for line in cache.skipped:
            self.reporter.say(f"Left out {line}.")
        self.reporter.say(f"{len(cache)} samples in {cache.folder}, {len(cache.skipped)} left out.")
        return cache

    def _tensorboard(self):
        if not (self.config.train.tensorboard and self.accelerator.is_main_process):
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.reporter.say("No TensorBoard logs: pip install tensorboard, or set train.tensorboard=false.")
            return None
        return SummaryWriter(self.folder / "logs", purge_step=self.step + 1)

    def _ask_to_stop(self, *_) -> None:
        self.reporter.say("Stopping after this update.")
        self.stop_asked = True


def _make_optimizer(config: Config, learners: dict[str, dict[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
    """One optimizer with a group for each learner, so that fp16's one gradient scaler serves both."""
    own = {
        "adapter": {"lr": config.train.lr, "weight_decay": config.train.weight_decay},
        "discriminator": {"lr": config.adversarial.lr, "weight_decay": WEIGHT_DECAY, "betas": BETAS},
    }
    groups = [{"params": list(p.values()), "full_lr": own[n]["lr"], **own[n]} for n, p in learners.items()]
    if config.train.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            wanted = "train.optimizer=adamw8bit needs bitsandbytes"
            raise ValueError(f"{wanted}: pip install bitsandbytes, or use adamw.") from error
        return AdamW8bit(groups)
    return torch.optim.AdamW(groups)
