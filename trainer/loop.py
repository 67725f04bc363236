"""The run: cache, then train, save, preview, and go on exactly where a killed run stopped."""

from __future__ import annotations

import json
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from .adapter import Adapter, Average
from .checkpoint import (
    load_latest_state,
    load_optimizer_tensors,
    optimizer_tensors,
    save_state,
    write_text,
)
from .config import Config
from .data.cache import LatentCache, build_cache
from .engine import Batch, Engine
from .export import DTYPES, export, recipe_for, self_test
from .families import Base, load_base
from .generate import generate
from .objectives import OBJECTIVES
from .previews import draw_grid, save_image


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
    """Train as configured and return the LoRA's path; the same call goes on where an earlier one stopped.

    Raises ValueError for bad input, `RunFailed` for a run that cannot go on (NaN, a failed self-test, an interrupt).
    """
    return Run(config, reporter or Reporter()).go()


class Run:
    """One run's parts, and the loop over them."""

    def __init__(self, config: Config, reporter: Reporter):
        self.config, self.reporter = config, reporter
        self.folder = config.run_folder
        _check_same_run(config)
        precision = {"fp32": "no"}.get(config.base.dtype, config.base.dtype)
        self.accelerator = Accelerator(mixed_precision=precision)
        self.base = self._load_base()
        self.cache = self._fill_cache()
        self.base.drop_encoders()
        self.adapter = Adapter(
            self.base.network, self.base.lora_targets, config.lora.rank, config.lora.alpha, config.train.seed
        )
        modules = len(self.adapter.layers)
        reporter.say(f"LoRA of rank {config.lora.rank}, alpha {config.lora.alpha:g} on {modules} modules.")
        if config.train.gradient_checkpointing:
            self.base.network.enable_gradient_checkpointing()
            self.base.network.train()
        self.names = list(self.adapter.named_parameters())
        self.optimizer = self.accelerator.prepare(_make_optimizer(config, self.adapter.parameters()))
        self.average = Average(self.adapter, config.train.ema) if config.train.ema else None
        o = config.objective
        objective = OBJECTIVES[o.name](config.grid(), o.guidance, o.huber_c)
        null = {k: v.to(self.base.device) for k, v in self.cache.null.items()}
        self.engine = Engine(self.base, self.adapter, objective, null)
        self.step = self._resume()
        self.stop_asked = False

    @property
    def lora_path(self) -> Path:
        return self.folder / f"{self.config.name}.safetensors"

    def go(self) -> Path:
        """Train to the end; on SIGINT or SIGTERM save and stop."""
        writer = self._tensorboard()
        handlers = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        started, at_start, seen_loss = time.monotonic(), self.step, float("nan")
        try:
            while self.step < self.config.train.steps:
                loss, norm = self._update()
                seen_loss = loss if math.isnan(seen_loss) else 0.95 * seen_loss + 0.05 * loss
                rate = (self.step - at_start) * self.samples_per_update / (time.monotonic() - started)
                memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
                self.reporter.update(Status(self.step, self.config.train.steps, seen_loss, rate, memory))
                if writer:
                    shown = {"loss": loss, "gradient norm": norm, "lr": self._lr(), "samples per second": rate}
                    for tag, value in shown.items():
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

    def _update(self) -> tuple[float, float]:
        """One optimizer update; returns its loss and gradient norm."""
        train = self.config.train
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        total, seen = 0.0, []
        for part in range(train.accumulation):
            numbers, batch = self._batch(part)
            seen += numbers
            with self.accelerator.autocast():
                losses = self.engine.step(batch)
            self._check_finite(losses, numbers)
            self.accelerator.backward(losses.mean() / train.accumulation)
            total += losses.mean().item() / train.accumulation
        self._share_gradients()
        norm = self.accelerator.clip_grad_norm_(self.adapter.parameters(), train.max_grad_norm).item()
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            raise RunFailed(self._not_finite("The gradient", seen))
        self.optimizer.step()
        self.step += 1
        if self.average:
            self.average.update(self.step)
        return total, norm

    def _batch(self, part: int) -> tuple[list[int], Batch]:
        """The samples of one forward pass; every draw depends only on (seed, samples seen, rank)."""
        config, rank, size = self.config, self.accelerator.process_index, self.config.train.batch_size
        seen = self.step * self.samples_per_update + part * size * self.accelerator.num_processes
        numbers = [self._shuffled(seen + rank * size + i) for i in range(size)]
        generator = torch.Generator().manual_seed(_seed(config.train.seed, seen, rank))
        x0 = self.cache.latents(numbers, generator)
        objective, device = self.engine.objective, self.base.device
        noise = torch.randn(x0.shape, generator=generator)
        start = objective.start(size, generator)
        guidance = objective.draw_guidance(size, generator)
        condition = self.cache.encoding([self.cache.captions[i] for i in numbers])
        move = lambda t: t.to(device, non_blocking=True)  # noqa: E731
        condition = {k: move(v) for k, v in condition.items()}
        return numbers, Batch(move(x0), move(noise), move(start), move(guidance), condition)

    def _shuffled(self, position: int) -> int:
        """Sample number at a position of the endless, epoch-wise shuffled stream."""
        epoch, at = divmod(position, len(self.cache))
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(_seed(self.config.train.seed, epoch, -1))
            self._epoch, self._order = epoch, torch.randperm(len(self.cache), generator=generator).tolist()
        return self._order[at]

    def _share_gradients(self) -> None:
        """Mean of the gradients over all processes: the adapter is all there is to share."""
        if self.accelerator.num_processes > 1:
            for parameter in self.adapter.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    def _lr(self) -> float:
        train = self.config.train
        warm = min(1.0, (self.step + 1) / (train.warmup + 1))
        falling = 0.5 * (1 + math.cos(math.pi * self.step / train.steps)) if train.lr_schedule == "cosine" else 1.0
        return train.lr * warm * falling

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
            self.preview(self.lora_path.with_suffix(".preview.png"), captions=False)
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
            "optimizer": optimizer_tensors(self.optimizer.optimizer, self.names),
            "average": self.average.weights if self.average else {},
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
        path = self.lora_path if final else self.folder / f"{self.config.name}-{self.step:07d}.safetensors"
        export(path, self.weights(), self.config, self.base, self.step, len(self.cache))
        with self.adapter.using(self.weights()):
            result = self_test(path, self.base, self.adapter, self.cache.encoding([""]))
        self.reporter.say(f"{path}: {result.sentence()}.")
        if not result.passed:
            raise RunFailed(
                f"The saved LoRA does not give the trained output when diffusers loads it ({result.sentence()}). "
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
        self.adapter.load(groups["adapter"])
        load_optimizer_tensors(self.optimizer.optimizer, groups.get("optimizer", {}), self.names)
        if self.average:
            self.average.weights = {n: w.to(self.base.device) for n, w in groups["average"].items()}
        if self.accelerator.scaler and facts["scaler"]:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.reporter.say(f"Going on from update {step} of {self.config.train.steps}.")
        return step

    def preview(self, path: Path, captions: bool = True) -> None:
        """A grid of the fixed prompts and seed at each of `preview.steps` steps."""
        settings = self.config.preview
        prompts = list(settings.prompts) or list(dict.fromkeys(self.cache.captions))[:4]
        shape = self.base.latent_shape(self.config.data.resolution)
        noise = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(settings.seed))
        condition = {k: v.to(self.base.device) for k, v in self.cache.encoding(prompts).items()}
        rows = []
        null, guidance, gamma = self.engine.null, settings.guidance, recipe_for(self.config, self.base).gamma
        with self.adapter.using(self.weights()), self.accelerator.autocast():
            for steps in settings.steps:
                ticks = self.config.grid().plan(steps).ticks
                latents = generate(self.base, condition, null, noise, ticks, guidance, gamma, settings.seed)
                rows.append((f"{steps} step{'s' * (steps > 1)}", self.base.decode(latents)))
        save_image(draw_grid(rows, prompts if captions else [""] * len(prompts)), path)

    def _load_base(self) -> Base:
        b = self.config.base
        self.reporter.say(f"Loading {b.path}.")
        base = load_base(
            b.path,
            family=b.family,
            dtype=DTYPES[b.dtype],
            device=self.accelerator.device,
            tokenizer=b.tokenizer,
            config=b.config,
            prediction=b.prediction,
        )
        base.latent_shape(self.config.data.resolution)
        return base

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


def _check_same_run(config: Config) -> None:
    """A run folder belongs to one configuration; raises ValueError that names what differs."""
    path = config.run_folder / "config.json"
    now = config.what_decides_the_weights()
    if path.is_file():
        then = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{k}: {a} then, {b} now" for k, a, b in _differences(then, now)]
        if changed and (config.run_folder / "checkpoints").is_dir():
            raise ValueError(
                f"{config.run_folder} holds a run with other settings ({'; '.join(changed)}). "
                "Use the same settings to go on, another output folder to start anew, or delete the folder."
            )
    write_text(path, json.dumps(now, indent=2) + "\n")


def _differences(a: dict, b: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    found = []
    for key in a.keys() | b.keys():
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found += _differences(x, y, f"{prefix}{key}.")
        elif x != y:
            found.append((prefix + key, x, y))
    return sorted(found)


def _make_optimizer(config: Config, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    options = {"lr": config.train.lr, "weight_decay": config.train.weight_decay}
    if config.train.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            wanted = "train.optimizer=adamw8bit needs bitsandbytes"
            raise ValueError(f"{wanted}: pip install bitsandbytes, or use adamw.") from error
        return AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options)


def _seed(*parts: int) -> int:
    """A 63-bit seed from integers."""
    return int(np.random.SeedSequence([p & 0xFFFFFFFFFFFFFFFF for p in parts]).generate_state(1, np.uint64)[0] >> 1)
