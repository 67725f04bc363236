"""Ctrl-C and SIGTERM: the first asks a run to save and end, the second ends it at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds in which a launcher passes on what the terminal has sent to its processes already.
PASSED_ON = 3.0


class Stopper:
    """Takes the signals while it is entered as a context.

    The first sets `asked` where the run can save. The second, and the first where there is nothing to save
    yet, raise KeyboardInterrupt. Outside the main thread, where Python lets nobody take them, no signal is
    taken.

    say: called with a sentence for the user. launched: whether a launcher started this process. It passes on
    what the terminal has sent already, so that signals right after the first are the first once more.
    """

    def __init__(self, say: Callable[[str], None], launched: bool = False):
        self.say = say
        self.launched = launched
        self.stop_requested = False
        self._since = 0.0  # when that was
        self.sentence: str | None = None  # said at the first signal; None while there is nothing to save
        self._before: dict[int, signal.Handlers] = {}

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._take) for n in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def saving(self, sentence: str) -> Iterator[None]:
        """In this block the first signal only sets `stop_requested`, and `sentence` is said."""
        self.sentence = sentence
        try:
            yield
        finally:
            self.sentence = None

    def _take(self, *_) -> None:
        if self.launched and self.stop_requested and time.monotonic() - self._since < PASSED_ON:
            return
        if self.sentence is None or self.stop_requested:
            raise KeyboardInterrupt
        self.stop_requested = True
        self._since = time.monotonic()
        self.say(f"{self.sentence} Once more to stop at once.")
