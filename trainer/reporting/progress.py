"""How a run tells the user its progress: the interface, and the command line's progress bar on stderr."""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..system.machine import GIB


@dataclass(frozen=True)
class Status:
    """The state of a run after an update, for a progress display.

    loss: smoothed. peak_memory: GiB of the GPU, 0 without one.
    """

    step: int
    steps: int
    loss: float
    samples_per_second: float
    peak_memory: float


class Pace:
    """Turns an update's numbers into a `Status`: a smoothed loss, and the rate since the run was started.

    step: the last update before this start. samples: how many one update takes.
    """

    def __init__(self, step: int, samples: int):
        self.first, self.samples, self.started, self.loss = step, samples, time.monotonic(), float("nan")

    def after(self, step: int, steps: int, loss: float) -> Status:
        """The status after update `step` of `steps`, which had this loss."""
        self.loss = loss if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss
        rate = (step - self.first) * self.samples / max(time.monotonic() - self.started, 1e-6)
        memory = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
        return Status(step, steps, self.loss, rate, memory)


class Reporter:
    """The interface by which a run tells its progress. This one is silent; the command line draws a progress bar."""

    def say(self, text: str) -> None:
        """Take a sentence for the user."""

    def caching(self, what: str, done: int, total: int) -> None:
        """Take how many of `what` are cached."""

    def update(self, status: Status) -> None:
        """Take the state after an update."""


class _Console(Console):
    """A console whose reader may leave (`| head`, a lost terminal): the text then goes nowhere, and the run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)


class ProgressBar(Reporter):
    """A `Reporter` over rich's progress bar; use as a context manager."""

    def __init__(self):
        self.console = _Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=self.console,
        )
        self.tasks: dict[str, int] = {}

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_) -> None:
        if self.tasks:
            self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def caching(self, what: str, done: int, total: int) -> None:
        self._advance(f"caching {what}", done, total)

    def update(self, status: Status) -> None:
        facts = f"loss {status.loss:.4f}, {status.samples_per_second:.1f} samples/s"
        if status.peak_memory:
            facts += f", {status.peak_memory:.1f} GiB"
        self._advance("training", status.step, status.steps, facts)

    def _advance(self, name: str, done: int, total: int, facts: str = "") -> None:
        """Move a task's bar, which is added at its first mention."""
        if not self.tasks:
            self.bar.start()  # not before: one that shows nothing still ends with an empty line
        if name not in self.tasks:
            self.tasks[name] = self.bar.add_task(name, total=total, completed=done, facts=facts)
        self.bar.update(self.tasks[name], completed=done, total=total, facts=facts)
