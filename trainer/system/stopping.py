"""Asked to stop: once to save and end, twice to end at once."""

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
    """Takes signals while it is entered. The first sets `asked` where the run can save; the second, and the first where
    there is nothing to save yet, raise KeyboardInterrupt.

    say: called with a sentence. launched: whether by a launcher, which passes signals on: those right after the first
    are that one. Outside the main thread no signal is taken.
    """

    def __init__(self, say: Callable[[str], None], launched: bool = False):
        self.say, self.launched, self.asked, self._since = say, launched, False, 0.0
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
        """In this block the first signal only asks, and `sentence` is said."""
        self.sentence = sentence
        try:
            yield
        finally:
            self.sentence = None

    def _take(self, *_) -> None:
        if self.launched and self.asked and time.monotonic() - self._since < PASSED_ON:
            return
        if self.sentence is None or self.asked:
            raise KeyboardInterrupt
        self.asked, self._since = True, time.monotonic()
        self.say(f"{self.sentence} Once more to stop at once.")
