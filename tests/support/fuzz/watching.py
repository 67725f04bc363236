"""What is seen of one call: how it ended, its memory, how long it took, and what it did that reading never does."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_SECONDS = 30
MOST_GROWTH = 3 << 29  # bytes of one call: a picture of the most pixels that Pillow decodes, on white
# Beyond this an allocation fails at once, instead of taking what the machine has.
ADDRESSES = 8 << 30
# Audit events of code run, programs started, connections, and files changed.
RUNS = (
    "exec",
    "compile",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.startfile",
    "subprocess.",
    "socket.",
)
RUNS += ("pickle.", "marshal.", "shutil.", "webbrowser.", "urllib.Request", "code.", "ctypes.dlopen", "cpython.run_")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
REFUSALS = (ValueError, OSError, RuntimeError)
RAW = (UnicodeError, NotImplementedError, RecursionError)  # of those, the interpreter's own words


class TooSlow(BaseException):
    """Raised in a call that takes longer than `MOST_SECONDS`."""


@dataclass
class Report:
    """What was seen of a target. bad: (mutator, what was wrong) of each call that ended otherwise than it may."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    growth: int = 0
    seconds: float = 0.0
    events: int = 0
    said: Counter = field(default_factory=Counter)
    bad: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, told: dict[str, Any]) -> Report:
        """From its `vars`, by way of JSON."""
        return cls(**told | {"said": Counter(told["said"]), "bad": [tuple(entry) for entry in told["bad"]]})

    def __add__(self, other: Report) -> Report:
        most = {"growth": max(self.growth, other.growth), "seconds": max(self.seconds, other.seconds)}
        summed = ("inputs", "accepted", "refused", "events", "said", "bad")
        return Report(**most, **{name: getattr(self, name) + getattr(other, name) for name in summed})

    def row(self, name: str) -> list:
        """A table's."""
        counts = [self.inputs, self.accepted, self.refused, len(self.bad)]
        return [name, *counts, round(self.growth / 1e6), f"{self.seconds:.1f}", self.events]


class Watch:
    """An audit hook, which stays: give it a process of its own. folder: where writing is allowed."""

    def __init__(self, folder: Path):
        self.folder, self.on, self.seen = str(folder.resolve()), False, []
        sys.addaudithook(self)
        signal.signal(signal.SIGALRM, self._too_slow)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, resource.RLIM_INFINITY))

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            if not (isinstance(flags, int) and flags & WRITES) or isinstance(path, int) or self._inside(path):
                return
        elif event.startswith(CHANGES):
            if self._inside(arguments[0]):
                return
        elif not event.startswith(RUNS) or _importing():
            return
        self.seen.append(f"{event} {arguments!r:.80}")

    def _inside(self, path: Any) -> bool:
        return os.path.realpath(os.fsdecode(path)).startswith(self.folder)

    def _too_slow(self, *_) -> None:
        raise TooSlow

    def call(self, work: Callable[[], Any]) -> tuple[Any, BaseException | None, int, list[str]]:
        """(answer, what was raised, growth in bytes at its highest, what it did that reading never does)."""
        answer = error = None
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest is then what it is now
        self.seen, self.on = [], True
        signal.alarm(MOST_SECONDS)
        try:
            answer = work()
        except (Exception, TooSlow) as raised:
            error = raised
        finally:
            signal.alarm(0)
            self.on = False
        return answer, error, max(0, _memory("VmHWM") - before), self.seen


def _importing() -> bool:
    """Whether a library is importing a part of its own, which runs that part's code."""
    frame = sys._getframe(2)
    while frame is not None:
        if "importlib" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _memory(which: str) -> int:
    """Bytes in memory now (VmRSS), or at most since the mark was reset (VmHWM)."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{which}:\s+(\d+) kB", text)[1]) * 1024


def complaint(error: BaseException, names: tuple[str, ...]) -> str | None:
    """What is wrong with an error as an answer to a user; None for a sentence that names the file or a key."""
    text = str(error)
    if isinstance(error, TooSlow):
        return f"took longer than {MOST_SECONDS} s"
    if not isinstance(error, REFUSALS) or isinstance(error, RAW):
        return f"{type(error).__name__}: {text[:300]}"
    if not any(name in text for name in names):
        return f"names neither file nor key: {text[:300]}"
    if len(text.split()) < 3 or not text.rstrip().endswith((".", "?", ".)")) or text.startswith("[Errno"):
        return f"no sentence: {text[:300]}"
    if len(text) > 10_000:
        return f"{len(text)} characters: {text[:200]}"
    return None


def kind_of(text: str) -> str:
    """A sentence without what differs from file to file, to count it by."""
    text = re.sub(r"'[^']*'|\S*[\d/_]\S*", "#", " ".join(text.split()))
    return text[:100]
