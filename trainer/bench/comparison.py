"""Both loops on the same work, in turn, so that a machine that grows slower or faster favours neither."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from ..config.config import Config
from ..families import Base
from ..reporting.progress import Reporter
from ..system.clock import Clock
from ..training.loop import Run
from ..training.settle import settle
from .measure import PASSES, alive_bytes, flops, passes_counted, peak_bytes
from .reference import Reference, check_reference
from .report import machine, peak_flops

ROUNDS = 10  # at most, in which the loops take turns
# Updates beside those that are timed: in one operations are counted, in one memory, and one is the host's alone.
COUNTED = 3


def bench(
    config: Config, *, updates: int = 20, warmup: int = 3, reference: bool = True, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Measure the updates of a run, and those of the reference loop beside them; nothing is kept of the run.

    updates, warmup: how many of each loop are timed, and how many come before. A run with an adversary is
    measured without it as well, where its objective can do without. Without data.cache and pictures the
    teacher makes two batches of latents. The result is JSON-ready: "machine", "settings", and for "plain" and
    "adversarial" each loop's figures (those of one update of the student; passes for each of its samples) and
    the ratios of ours to the reference's.

    Raises ValueError for an objective or a device that cannot be compared, and what a run raises.
    """
    device = PartialState().device
    if device.type not in ("cpu", "cuda") or PartialState().num_processes > 1:
        raise ValueError(
            f"pcm bench measures one process on a CPU or a CUDA device; here are {PartialState().num_processes} on "
            f"{device.type}. Start it without accelerate launch, on such a device."
        )
    if reference:
        check_reference(config)

    reporter = reporter or Reporter()
    config, settled = settle(config, device)
    for sentence in settled:
        reporter.say(sentence)
    results = {}
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # the cache's files are mapped
        for kind, run_config in _kinds(config, folder, updates + warmup + COUNTED).items():
            reporter.say(f"Measuring {kind} updates.")
            results[kind] = _compare(run_config, updates, warmup, reference, device, reporter)
    return {"machine": machine(), "settings": _settings(config, updates, warmup)} | results


@dataclass
class Loop:
    """One of the two loops, and its measurements.

    update: called for one update of the student. prepare: called with the number of the updates that follow,
    for work that is not the loop's own time. passes: samples by `PASSES`, over the warm-up. flops: operations
    of an update. peak: bytes of the tensors that it holds, at most. host: seconds for which an update keeps the host
    busy when the GPU has nothing else to do; None on a CPU. rounds: seconds of an update by part, in each round.
    """

    update: Callable[[], object]
    prepare: Callable[[int], object]
    clock: Clock
    bases: list[Base]
    learners: list[nn.Parameter]
    device: torch.device
    passes: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    peak: int = 0
    host: float | None = None
    rounds: list[dict[str, float]] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Seconds of an update, in each round."""
        return [sum(parts.values()) for parts in self.rounds]

    def examine(self, warmup: int, before: int) -> None:
        """Warm up, count passes meanwhile, then operations and bytes, and on a GPU the host's time.

        before: bytes that were held without this loop.
        """
        self.prepare(warmup + COUNTED)
        with passes_counted(self.bases) as self.passes:
            for _ in range(warmup):
                self.update()
        self.flops = flops(self.update)
        for parameter in self.learners:  # which an update starts without
            parameter.grad = None
        self.peak = alive_bytes(self.device) - before + peak_bytes(self.update, self.device)
        if self.clock.on_gpu:
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.update()
            self.host = time.perf_counter() - start

    def round(self, updates: int) -> None:
        """Time some updates."""
        self.prepare(updates)
        if self.clock.on_gpu:
            torch.cuda.synchronize()
        self.clock.reset()
        for _ in range(updates):
            self.update()
        self.rounds.append({name: s / updates for name, s in self.clock.seconds().items()})

    def figures(self, config: Config, warmup: int) -> dict[str, Any]:
        """The loop's figures in the result; times are those of the median round."""
        samples = config.train.batch_size * config.train.accumulation
        median = self.rounds[self.seconds.index(statistics.median_low(self.seconds))]
        rate = 1 / sum(median.values())
        able = peak_flops(self.device) if config.base.dtype != "fp32" else None  # operations per second
        return {
            "updates_per_second": rate,
            "samples_per_second": rate * samples,
            "passes_per_sample": {name: self.passes[name] / (warmup * samples) for name in PASSES},
            "flops_per_update": self.flops,
            "utilisation": able and self.flops * rate / able,
            "peak_bytes": self.peak,
            "host_seconds": self.host,
            "milliseconds": {name: 1000 * s for name, s in median.items()},
        }


def _kinds(config: Config, folder: str, updates: int) -> dict[str, Config]:
    """The runs to measure, by kind, in `folder`, of at least `updates` each.

    They are switched to do nothing beside training: no trackers, report, previews or validation.
    """
    train, data = config.train, config.data
    changes = {
        "train": train.model_copy(update={"trackers": (), "report": False, "steps": max(train.steps, updates)}),
        "preview": config.preview.model_copy(update={"every": 0}),
        "validation": config.validation.model_copy(update={"count": 0, "every": 0}),
    }
    if data.cache is None:
        count = data.count if data.images else min(data.count, 2 * train.batch_size)
        changes["data"] = data.model_copy(update={"cache": f"{folder}/cache", "count": count})

    kinds = {}
    if config.objective.adversarial != "required":
        kinds["plain"] = {"adversarial": config.adversarial.model_copy(update={"weight": 0.0})}
    if config.adversarial.weight:
        kinds["adversarial"] = {}
    return {
        kind: config.model_copy(update=changes | more | {"output": f"{folder}/{kind}"}) for kind, more in kinds.items()
    }


def _settings(config: Config, updates: int, warmup: int) -> dict[str, Any]:
    """The settings that figures depend on."""
    train = config.train
    return {
        "base": config.base.path,
        "dtype": config.base.dtype,
        "resolution": config.data.resolution,
        "objective": config.objective.name,
        "rank": config.lora.rank,
        "batch_size": train.batch_size,
        "accumulation": train.accumulation,
        "gradient_checkpointing": train.gradient_checkpointing,
        "optimizer": train.optimizer,
        "compile": train.compile,
        "quantize": config.base.quantize,
        "offload": train.offload,
        "updates": updates,
        "warmup": warmup,
    }


def _compare(
    config: Config, updates: int, warmup: int, reference: bool, device: torch.device, reporter: Reporter
) -> dict[str, Any]:
    """Measure one kind of updates: each loop's figures, and with the reference the ratios.

    Each loop is examined right after it is made, so that the bytes held by then and not before are its own.
    """
    before = alive_bytes(device)
    run = Run(config, reporter)
    learners = [p for group in run.trained.optimizer.param_groups for p in group["params"]]
    loops = {"ours": Loop(run.update, lambda _: None, run.clock, [run.base], learners, device)}
    loops["ours"].examine(warmup, before)

    if reference:
        before = alive_bytes(device)
        other = Reference(run)
        learners = [p for parameters in other.learners.values() for p in parameters]
        bases = [other.teacher, other.student]
        loops["reference"] = Loop(other.update, other.prepare, other.clock, bases, learners, device)
        loops["reference"].examine(warmup, before)

    rounds = min(ROUNDS, updates)
    sizes = [updates // rounds + (i < updates % rounds) for i in range(rounds)]
    for number, size in enumerate(sizes):
        # each goes first in every other round
        for loop in list(loops.values())[:: -1 if number % 2 else 1]:
            loop.round(size)
    run.updater.coming.close()
    figures = {name: loop.figures(config, warmup) for name, loop in loops.items()}
    return figures | ({"ratios": _ratios(figures, *loops.values())} if reference else {})


def _ratios(figures: dict[str, dict], ours: Loop, other: Loop) -> dict[str, float]:
    """Our figures over the reference's; for speed the median over the rounds, and the least and the greatest."""
    speed = [b / a for a, b in zip(ours.seconds, other.seconds, strict=True)]
    return {
        "updates_per_second": statistics.median(speed),
        "least": min(speed),
        "greatest": max(speed),
        "flops": ours.flops / other.flops,
        "peak_bytes": ours.peak / other.peak,
    }
