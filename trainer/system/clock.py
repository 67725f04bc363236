"""Where a run's time goes: seconds by the name of the part, measured without making a GPU wait."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up the seconds of named parts of a run; a part within another counts as the outer one alone.

    On a GPU a part is the time between two events on its stream. They are read only when `seconds` is asked,
    so that the host runs on ahead; time in which the GPU waits for the host counts in the part where it
    waits.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.on_gpu = torch.device(device).type == "cuda"
        self._inside = False
        self.reset()

    def reset(self) -> None:
        """Begin again at zero in every part."""
        self._sums: Counter[str] = Counter()
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._started = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of this block as the part `name`."""
        if self._inside:
            yield
            return
        before, self._inside = self._now(), True
        try:
            yield
        finally:
            after, self._inside = self._now(), False
            if self.on_gpu:
                self._events.append((name, before, after))
                self._read_events()
            else:
                self._sums[name] += after - before

    def seconds(self) -> dict[str, float]:
        """Seconds by part since the last reset, and "other" for the time outside of all parts. Waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()
            self._read_events()
        elapsed = time.perf_counter() - self._started
        return {**self._sums, "other": max(0.0, elapsed - sum(self._sums.values()))}

    def _read_events(self) -> None:
        """Add the time between events that the GPU has passed, without waiting, so that they do not pile up."""
        while self._events and self._events[0][2].query():
            name, before, after = self._events.popleft()
            self._sums[name] += before.elapsed_time(after) / 1000

    def _now(self) -> float | torch.cuda.Event:
        """The time: a clock's seconds, or on a GPU an event on its stream."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
