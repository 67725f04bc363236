"""How a run tells the user its progress: the interface, and on stderr a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import Event, Thread

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from ..system.machine import peak_memory

WARM_UP = 3  # updates of a start, the slowest, that the rate goes by only until there are others
EVERY = 60.0  # seconds between two lines on the same thing, where there is no terminal


@dataclass(frozen=True)
class Status:
    """The state of a run after an update, for a progress display.

    loss: smoothed. samples_per_second, seconds_left: see `Pace`. peak_memory: GiB of the GPU, or without one of the
    process; 0 where the system does not tell.
    """

    step: int
    steps: int
    loss: float
    samples_per_second: float
    seconds_left: float
    peak_memory: float

    @property
    def facts(self) -> str:
        """Loss, rate and memory in words."""
        memory = f", {self.peak_memory:.1f} GiB" if self.peak_memory else ""
        return f"loss {self.loss:.4f}, {self.samples_per_second:.1f} samples/s{memory}"


class Pace:
    """Turns an update's numbers into a `Status`: a smoothed loss, and the rate since this start's first few updates, in
    which kernels are chosen and code may be compiled; all else that a run does on its way is in it.

    step: the last update before this start. samples: how many one update takes.
    """

    def __init__(self, step: int, samples: int):
        self.first, self.samples, self.loss = step, samples, float("nan")
        self.since, self.started = step, time.monotonic()  # what the rate is counted from

    def after(self, step: int, steps: int, loss: float) -> Status:
        """The status after update `step` of `steps`, which had this loss."""
        self.loss = loss if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss
        now = time.monotonic()
        rate = (step - self.since) * self.samples / max(now - self.started, 1e-6)
        left = (steps - step) * self.samples / rate
        if step == self.first + WARM_UP:
            self.since, self.started = step, now
        return Status(step, steps, self.loss, rate, left, peak_memory() or 0.0)


class Reporter:
    """The interface by which a run tells its progress. This one is silent; the command line draws a progress bar."""

    def say(self, text: str) -> None:
        """Take a sentence for the user."""

    def caching(self, what: str, done: int, total: int) -> None:
        """Take how many of `what` are cached."""

    def update(self, status: Status) -> None:
        """Take the state after an update."""

    def stage(self, what: str) -> AbstractContextManager[None]:
        """A block of the run that may take long, and does `what`, such as "loading the base"."""
        return nullcontext()


@dataclass(frozen=True)
class Progress:
    """What a program is told of a run: the thing that goes on, in words, and how far it is.

    what: "training", "evaluating", "caching latents", ..., or "note" for a sentence of the run's. done, total: of the
    thing's parts; 0 where they are not counted. status: of the run, where it trains.
    """

    what: str
    text: str
    done: int = 0
    total: int = 0
    status: Status | None = None


class Callback(Reporter):
    """A `Reporter` that hands each thing on to a function."""

    def __init__(self, function: Callable[[Progress], None]):
        self.function = function

    def say(self, text: str) -> None:
        self.function(Progress("note", text))

    def caching(self, what: str, done: int, total: int) -> None:
        self.function(Progress(f"caching {what}", f"{done} of {total} {what} cached", done, total))

    def update(self, status: Status) -> None:
        text = f"update {status.step} of {status.steps}: {status.facts}"
        self.function(Progress("training", text, status.step, status.steps, status))

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        self.function(Progress(what, what))
        yield


def progress_on_stderr() -> ProgressBar | ProgressLines:
    """A bar where stderr is a terminal, else lines; use as a context manager."""
    return ProgressBar() if sys.stderr.isatty() else ProgressLines()


class _Console(Console):
    """A console whose reader may leave (`| head`, a lost terminal): the text then goes nowhere, and the run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)


def _console() -> _Console:
    return _Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)


class ProgressBar(Reporter):
    """A `Reporter` over rich's progress bar; use as a context manager."""

    def __init__(self):
        self.console = _console()
        self.bar = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=self.console,
        )
        self.tasks: dict[str, TaskID] = {}
        self.started = False

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_) -> None:
        if self.started:
            self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def caching(self, what: str, done: int, total: int) -> None:
        self._advance(f"caching {what}", done, total)

    def update(self, status: Status) -> None:
        self._advance("training", status.step, status.steps, status.facts)

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        self._advance(what, 0, None)
        try:
            yield
        finally:
            self.bar.remove_task(self.tasks.pop(what))

    def _advance(self, name: str, done: int, total: int | None, facts: str = "") -> None:
        """Move a task's bar, which is added at its first mention."""
        if not self.started:
            self.started = True
            self.bar.start()  # not before: one that shows nothing still ends with an empty line
        if name not in self.tasks:
            self.tasks[name] = self.bar.add_task(name, total=total, completed=done, facts=facts)
        self.bar.update(self.tasks[name], completed=done, total=total, facts=facts)


class ProgressLines(Reporter):
    """A `Reporter` for logs, files and pipes: a line at the first update, at the last, and every minute between.

    A stage says that it goes on where nothing has been said for a minute. Use as a context manager.
    """

    def __init__(self):
        self.console = _console()
        self.last: dict[str, float] = {}  # when there was a line on each thing
        self.spoken = -math.inf  # when there was the last line

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *_) -> None: ...

    def say(self, text: str) -> None:
        self.spoken = time.monotonic()
        self.console.print(text, soft_wrap=True, markup=False)

    def caching(self, what: str, done: int, total: int) -> None:
        if self._due(what, first=False) or done == total:
            self.say(f"Caching {what}: {done} of {total}.")

    def update(self, status: Status) -> None:
        if self._due("training", first=True) or status.step == status.steps:
            left = f", {duration(status.seconds_left)} left" if status.step < status.steps else ""
            self.say(f"Update {status.step} of {status.steps}: {status.facts}{left}.")

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        ended, begun = Event(), time.monotonic()

        def remind() -> None:
            wait = EVERY
            while not ended.wait(wait):
                now = time.monotonic()
                wait = max(begun, self.spoken) + EVERY - now
                if wait <= 0:
                    self.say(f"Still {what}, for {duration(now - begun)} now.")
                    wait = EVERY

        reminder = Thread(target=remind, daemon=True)
        reminder.start()
        try:
            yield
        finally:
            ended.set()
            reminder.join()

    def _due(self, what: str, first: bool) -> bool:
        """Whether it is time for a line on this. first: whether the first time is."""
        now = time.monotonic()
        due = first if what not in self.last else now - self.last[what] >= EVERY
        if due or what not in self.last:
            self.last[what] = now
        return due


def roughly(seconds: float) -> str:
    """A time that is not known better than to a digit or two: "40 s", "12 min", "3.5 h", "12 days"."""
    for unit, size in (("s", 1), ("min", 60), ("h", 3600), ("days", 86400)):
        number = seconds / size
        if number < (48 if unit == "h" else 99.5) or unit == "days":
            break
    return f"{float(f'{number:.2g}'):g} {unit}" if seconds >= 1 else "a second"


def duration(seconds: float) -> str:
    """ "38 s", "5 min 12 s", "7 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
