"""Marks the slow tests as they are collected, and holds the fast ones to it while they run."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.tiers import TRAINING_MODULE, traits_of_test

LIMIT = 5.0  # seconds of its own CPU time that a fast test may take
MODULES = 50  # that were imported while a test ran: from so many on, what it took is the libraries' time
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"}
ADVICE = (
    "This test is one of the fast ones, which `make check` runs, but it {fault}. {remedy} (tests/conftest.py tells how "
    "tests are sorted.)"
)
NAME_IT = "Call what does so by a name that tests/support/tiers.py reads, or add the name there: it is then a slow one."
REMEDIES = {"time": "Make it smaller, or split it.", "train": NAME_IT, "process": NAME_IT}


class Tiers:
    """A plugin of pytest: marks slow tests, and fails a fast one that turns out to be slow.

    judging: whether fast tests are held to it, as in a run that leaves the slow ones out. Where all are run, on however
    busy a machine, only what a test asserts counts.
    """

    def __init__(self, judging: bool):
        self.judging = judging
        self.watching, self.trainings, self.processes = False, 0, []
        sys.addaudithook(self._hear)

    # --- at collection

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if not is_foreign(item):
                for reason in traits_of_test(item).reasons():
                    item.add_marker(pytest.mark.slow(reason))

    # --- while a fast test runs

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._count_trainings()
        self.watching, self.trainings, self.processes = is_fast(item), 0, []
        try:
            return (yield)
        finally:
            self.watching = False

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef) -> Iterator[None]:
        """What several tests share is not laid to the first of them."""
        with self._paused(fixturedef.scope != "function"):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        clocks = time.process_time, time.monotonic
        began, known = [clock() for clock in clocks], len(sys.modules)
        result = yield
        # With threads a process' CPU time runs faster than the clock, and on a busy machine it runs slower.
        seconds = min(clock() - start for clock, start in zip(clocks, began, strict=True))
        if self.judging and is_fast(item):
            # The first test of a process to train loads libraries for all that come after it: its time is not its own.
            self._judge(seconds if len(sys.modules) - known < MODULES else 0.0)
        return result

    def _judge(self, seconds: float) -> None:
        """Fail the test that has just run, with a sentence, where it is none of the fast ones."""
        faults = {
            "process": self.processes and f"starts a process ({self.processes[0]})",
            "train": self.trainings > 1 and f"trains {self.trainings} times",
            "time": seconds > LIMIT and f"takes {seconds:.1f} s of CPU time, more than {LIMIT:g}",
        }
        for kind, fault in faults.items():
            if fault:
                pytest.fail(ADVICE.format(fault=fault, remedy=REMEDIES[kind]), pytrace=False)

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.watching and event in STARTS:
            program = os.fspath(arguments[0]) if arguments and isinstance(arguments[0], (str, bytes, Path)) else None
            # One that is not there is not started; `uname` is what Python's `platform` asks, once in a process.
            if program is None or (shutil.which(program) and Path(os.fsdecode(program)).name != "uname"):
                self.processes.append(f"{event} {program or ''}".strip())

    def _count_trainings(self) -> None:
        """Count the runs that come to be, once the module of the run has been imported."""
        run = getattr(sys.modules.get(TRAINING_MODULE), "Run", None)
        if run is None or hasattr(run.__init__, "counted"):
            return
        initialise = run.__init__

        @functools.wraps(initialise)
        def counted(*args, **kwargs):
            initialise(*args, **kwargs)
            self.trainings += self.watching

        counted.counted = True
        run.__init__ = counted

    @contextmanager
    def _paused(self, pause: bool) -> Iterator[None]:
        before, self.watching = self.watching, self.watching and not pause
        try:
            yield
        finally:
            self.watching = before


def is_foreign(item: pytest.Item) -> bool:
    """Whether a test needs a ComfyUI or a browser."""
    return any(item.get_closest_marker(kind) for kind in ("host", "web"))


def is_fast(item: pytest.Item) -> bool:
    return not is_foreign(item) and not item.get_closest_marker("slow")
