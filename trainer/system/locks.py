"""Locks: one run at a time in a folder, and one at a time that fills a cache.

The system lets go of a lock however a process ends, so that a run that was killed leaves none behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .saying import Say


@contextmanager
def only_run(folder: Path, say: Say) -> Iterator[None]:
    """Hold the lock of a run's folder in this block.

    Raises ValueError where another run holds it, OSError where the folder cannot be written.
    """

    def taken(_: FileLock) -> None:
        raise ValueError(
            f"Another run is at work in {folder}. Wait until it has ended, or set output to another folder."
        )

    with _hold(folder / "run.lock", taken, say):
        yield


@contextmanager
def only_filler(folder: Path, say: Say) -> Iterator[None]:
    """Hold the lock of a folder of caches in this block, after waiting for a run that fills one there.

    Raises OSError where the folder cannot be written.
    """

    def taken(lock: FileLock) -> None:
        say(f"Another run is filling the cache in {folder}: waiting for it.")
        lock.acquire(timeout=-1)

    with _hold(folder / "cache.lock", taken, say):
        yield


@contextmanager
def _hold(path: Path, taken: Callable[[FileLock], None], say: Say) -> Iterator[None]:
    """Hold the lock at this path in this block; its folder is made.

    taken: called where another process holds it, to wait for it or to raise. say: told where the disk knows
    no locks, and the block runs without one. Raises OSError where the folder cannot be written.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            taken(lock)
    except NotImplementedError:  # some network disks; newer versions of filelock make do with a file that is there
        say(f"The disk of {path.parent} knows no locks: take care that no second run is started there.")
    except OSError as error:
        advice = "Set output, and data.cache if you have set it, to another folder."
        raise type(error)(f"Cannot write to {path.parent}: {error}. {advice}") from error
    try:
        yield
    finally:
        lock.release()
