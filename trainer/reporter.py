"""How a run tells what it does."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Status:
    """What a progress display shows after an update."""

    step: int
    steps: int
    loss: float
    samples_per_second: float
    peak_memory: float


class Pace:
    """Turns an update's numbers into a `Status`: a smoothed loss, and the rate since the run was started."""

    def __init__(self, step: int, samples: int):
        self.first, self.samples, self.started, self.loss = step, samples, time.monotonic(), float("nan")

    def after(self, step: int, steps: int, loss: float) -> Status:
        self.loss = loss if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss
        rate = (step - self.first) * self.samples / max(time.monotonic() - self.started, 1e-6)
        memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        return Status(step, steps, self.loss, rate, memory)


class Reporter:
    """How a run tells what it does; the command line draws a progress bar over these."""

    def say(self, text: str) -> None: ...

    def caching(self, what: str, done: int, total: int) -> None: ...

    def update(self, status: Status) -> None: ...
