"""What a run shows of itself: lines where nobody has a terminal, a bar where there is one."""

import io
import sys
import time
from types import SimpleNamespace

import pytest

from phased_consistency.trainer.reporting import progress
from phased_consistency.trainer.reporting.progress import (
    Pace,
    ProgressBar,
    ProgressLines,
    Status,
    progress_on_stderr,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on only when it is told."""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def lines(capsys):
    """The lines so far on a stderr that is no terminal, as a function."""
    text = []

    def so_far():
        text.append(capsys.readouterr().err)
        return "".join(text).splitlines()

    return so_far


def run(reporter, clock, updates, seconds):
    pace = Pace(0, 4)
    for step in range(1, updates + 1):
        clock[0] += seconds
        reporter.update(pace.after(step, updates, 0.5))


def test_without_a_terminal_there_is_a_line_every_minute(lines, clock, monkeypatch):
    monkeypatch.setattr(progress, "peak_memory", lambda: 10.24)
    with progress_on_stderr() as reporter:
        assert isinstance(reporter, ProgressLines)
        run(reporter, clock, updates=100, seconds=2.0)
    assert lines() == [
        "Update 1 of 100: loss 0.5000, 2.0 samples/s, 10.2 GiB, 3 min 18 s left.",
        "Update 31 of 100: loss 0.5000, 2.0 samples/s, 10.2 GiB, 2 min 18 s left.",
        "Update 61 of 100: loss 0.5000, 2.0 samples/s, 10.2 GiB, 1 min 18 s left.",
        "Update 91 of 100: loss 0.5000, 2.0 samples/s, 10.2 GiB, 18 s left.",
        "Update 100 of 100: loss 0.5000, 2.0 samples/s, 10.2 GiB.",
    ]


def test_the_first_updates_count_until_there_are_others(clock):
    """A minute each, in which code is compiled, then a second."""
    pace = Pace(10, 4)
    for step in range(11, 14):
        clock[0] += 60
        assert pace.after(step, 110, 0.5).seconds_left == pytest.approx(60 * (110 - step))
    clock[0] += 1
    status = pace.after(14, 110, 0.5)
    assert status.seconds_left == pytest.approx(96) and status.samples_per_second == pytest.approx(4)


def test_caching_says_that_it_goes_on_and_that_it_is_done(lines, clock):
    reporter = ProgressLines()
    for done in range(0, 101, 10):
        reporter.caching("pictures", done, 100)
        clock[0] += 25
    assert lines() == [f"Caching pictures: {done} of 100." for done in (30, 60, 90, 100)]


def test_a_long_stage_says_that_it_goes_on(lines, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.01)
    reporter = ProgressLines()
    with reporter.stage("loading the base"):
        while len(lines()) < 2:
            time.sleep(0.001)
    count = len(lines())
    time.sleep(0.03)
    assert set(lines()) == {"Still loading the base, for 0 s now."} and len(lines()) == count


def test_a_stage_is_silent_while_others_speak(lines, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.2)
    reporter = ProgressLines()
    with reporter.stage("filling the cache"):
        for done in range(60):
            reporter.say(f"{done}")
            time.sleep(0.005)
    assert lines() == [f"{done}" for done in range(60)]


def test_a_short_stage_says_nothing_and_an_error_in_it_goes_on(lines):
    with pytest.raises(ValueError, match="no base"), ProgressLines().stage("loading the base"):
        raise ValueError("no base")
    assert lines() == []


def test_in_a_terminal_there_is_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_on_stderr() as reporter:
        assert isinstance(reporter, ProgressBar)
        with reporter.stage("loading the base"):
            reporter.say("Loading.")
        reporter.update(Status(3, 4, 0.25, 1.5, 60.0, 2.0))
    shown = sys.stderr.getvalue()
    assert "Loading." in shown and "loading the base" in shown and "loss 0.2500, 1.5 samples/s, 2.0 GiB" in shown
