"""Many files at once: work done ahead in threads, remembered hashes, bad items that stop a run or are skipped."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

from ..system.files import write_text

Item, Result = TypeVar("Item"), TypeVar("Result")
# How many items each thread may be ahead of who takes the results.
AHEAD = 2
BLOCK = 1 << 20  # bytes read at a time
# A file written less than so many ns before its hash was taken may change again without a later time.
RACY = 2_000_000_000


def ahead(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """work(item) of each item, in the items' order. workers: how many threads do it; 0: none, one after the other.

    Items are taken, and results held, only as far ahead as keeps the threads busy.
    """
    if workers == 0:
        yield from map(work, items)
        return
    items = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(work, item) for item in islice(items, AHEAD * workers))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(work, item) for item in islice(items, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def file_hashes(files: list[Path], known: Path, workers: int, write: bool = True) -> list[str]:
    """SHA-256 of each file.

    known: the JSON file that remembers them, so that a file of the same path, size and time is not read
    again. write: whether to bring it up to date. A file that cannot be read has none: "".
    """
    remembered = _remembered(known)
    now, kept = time.time_ns(), {}

    def hash_of(file: Path) -> str:
        try:
            path, stat = str(file.resolve()), file.stat()
            entry = remembered.get(path)
            if entry is None or entry[:2] != [stat.st_size, stat.st_mtime_ns]:
                entry = [stat.st_size, stat.st_mtime_ns, content_hash(file)]
        except OSError:  # who reads the file says why
            return ""
        if now - stat.st_mtime_ns > RACY:
            kept[path] = entry
        return entry[2]

    hashes = list(ahead(hash_of, files, workers))
    if write and not kept.items() <= remembered.items():
        known.parent.mkdir(parents=True, exist_ok=True)
        write_text(known, json.dumps(dict(sorted((remembered | kept).items()))))
    return hashes


def _remembered(known: Path) -> dict[str, list]:
    """path -> [size, time in ns, hash] of the files in `known`; nothing of a missing or damaged one, as it
    only saves time."""
    try:
        entries = json.loads(known.read_text(encoding="utf-8"))
        return {path: entry for path, entry in entries.items() if [type(e) for e in entry] == [int, int, str]}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def stop_or_skip(bad: list[str], skip_bad: bool, what: str, note: str = "") -> None:
    """Raise ValueError that names the bad items, unless they may be skipped.

    bad: a line for each. what: the sentence that says how many there are, without its end. note: what else may
    explain them, without its end.
    """
    if bad and not skip_bad:
        more = [f"and {len(bad) - 10} more"] if len(bad) > 10 else []
        lines = "".join(f"  {line}\n" for line in bad[:10] + more)
        also = f"{note[0].upper()}{note[1:]}.\n" if note else ""
        raise ValueError(f"{what}:\n{lines}{also}Mend or remove them, or set data.skip_bad=true to leave them out.")
