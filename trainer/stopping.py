"""Asked to stop: once to save and end, twice to end at once; and one run at a time in a folder."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOCK = "run.lock"


class Stopper:
    """Takes signals while it is entered. The first sets `asked` where the run can save; the second, and the first where
    there is nothing to save yet, raise KeyboardInterrupt.

    say: called with a sentence. Outside the main thread no signal is taken.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say, self.asked = say, False
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
        if self.sentence is None or self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.say(f"{self.sentence} Once more to stop at once.")


@contextmanager
def only_run(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a folder for one run; the system lets go of it however the process ends.

    Raises ValueError where another run holds it, OSError where the folder cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"Another run is at work in {folder}. Wait until it has ended, or set output to another folder."
        ) from None
    except NotImplementedError:
        say(f"The disk of {folder} knows no locks: take care that no second run is started there.")
        yield
        return
    except OSError as error:
        raise type(error)(f"Cannot write to the run folder {folder}: {error}. Set output to another folder.") from error
    try:
        yield
    finally:
        lock.release()
