"""log.jsonl in the run folder: all that became of a run, one JSON object a line, over all its starts.

Kinds of lines, by "kind":

    start       "step" it goes on from, "time" (UTC), device, versions, settings, data, notes, "expected seconds" of its
                updates, by their operations
    update      "step", "seconds" since the start, losses, gradient norms, lr, samples per second
    validation  "step", "figures" by name, "plain" where the others are of an average, "best"
    saved       "step", "file", "sentence" of its self-test
    end         "step", "seconds", "how" (finished, stopped, failed or killed), "reason", "parts" of the time,
                "evaluations": samples that the process took through the network, counted once a pass

A run that goes on takes up at its last checkpoint: the figures of updates after it are dropped, and come
again. Lines are written as they come. What cannot be written is said once, and the run goes on.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

from ..system.files import write_text
from ..system.saying import Say

LOSS = "held-out loss"
# the beginnings of the figures of a set of pictures
DISTANCE, DIVERSITY, RECALL = "distance to the teacher's pictures", "diversity within a prompt", "recall"

LogLine = dict[str, Any]
LOG = "log.jsonl"
KILLED = "no end was written: the process was killed, or the machine went down"
OF_UPDATES = ("update", "validation", "saved")  # kinds whose lines are dropped where a run takes up before them
ADDRESS = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.IGNORECASE)
# An absolute path with a folder in it, on any system.
PATH = re.compile(r"(?<![\w.:/\\])(?:[A-Za-z]:[\\/]|/)(?:[^\s/\\:;,'\"()<>]+[\\/])+")


class RunLog:
    """Writes the log of one run. path: None where nothing is written, which is so in all processes but the first."""

    def __init__(self, path: Path | None, say: Say):
        self.path, self.say, self.started = path, say, time.monotonic()

    @property
    def seconds(self) -> float:
        """How long this start has been running."""
        return time.monotonic() - self.started

    def begin(self, step: int, **facts: Any) -> None:
        """Write down a start that goes on from an update, and drop the figures of later ones."""
        self.started = time.monotonic()
        if self.path is None:
            return

        start = _line("start", {"step": step, "time": now(), **facts})
        self._try(lambda: self._rewrite(step, start))

    def add(self, kind: str, **values: Any) -> None:
        """Write down one line, at once."""
        if self.path is not None:
            self._try(lambda: self._append(_text(_line(kind, values))))

    def _rewrite(self, step: int, start: LogLine) -> None:
        """Write the whole file: the lines that stay, and this start."""
        lines = [line for line in read_log(self.path.parent) if isinstance(line.get("step"), int)]
        write_text(self.path, "".join(map(_text, [*continued(lines, step), start])))

    def _append(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def _try(self, write: Callable[[], None]) -> None:
        """Write, or say that it cannot be, once, and write no more."""
        try:
            write()
        except OSError as error:
            self.say(f"{self.path.name} is no longer written: {error}. The run goes on without.")
            self.path = None


def read_log(folder: Path) -> list[LogLine]:
    """The lines of a run's log; none where there is no log. A line that was cut short ends it."""
    path, lines = folder / LOG, []
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except (json.JSONDecodeError, RecursionError):
                break
            if isinstance(line, dict) and "kind" in line:
                lines.append(line)
    return lines


def continued(lines: Iterable[LogLine], step: int) -> Iterable[LogLine]:
    """The lines that stay where a run goes on from this update.

    A start without an end was killed, and gets that end.
    """
    kept: list[LogLine] = []
    last: LogLine | None = None  # the last line of the start that has no end yet
    for line in lines:
        if line["kind"] == "start" and last:
            kept.append(_killed(last))
        if line["kind"] in ("start", "end"):
            last = line if line["kind"] == "start" else None
        elif last and "seconds" in line:
            last = line
        if line["kind"] not in OF_UPDATES or line["step"] <= step > 0:
            kept.append(line)
    return [*kept, _killed(last)] if last else kept


def _killed(last: LogLine) -> LogLine:
    """The end of a start whose last line this is."""
    return _line("end", {"step": last["step"], "seconds": last.get("seconds", 0.0), "how": "killed", "reason": KILLED})


def now() -> str:
    """The time in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())


def without_places(text: str) -> str:
    """A message without this machine's folders, and without the keys that addresses carry: of both the last
    name stays."""

    def last_name(match: re.Match) -> str:
        address = urlsplit(match[0])
        return PurePath(address.path).name or address.hostname or ""

    return PATH.sub("", ADDRESS.sub(last_name, text))


def _line(kind: str, values: LogLine) -> LogLine:
    return {"kind": kind, **{key: _plain(value) for key, value in values.items()}}


def _plain(value: Any) -> Any:
    """The value with None for every infinity and NaN, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _text(line: LogLine) -> str:
    """A line as it stands in the file."""
    text = json.dumps(line, ensure_ascii=False)
    return text.encode(errors="replace").decode() + "\n"  # file names of bytes that are no text
