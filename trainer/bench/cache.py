"""A cache of many made-up samples: how long it takes to open, and how much memory a pass over it holds."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch

from ..data.cache import write_latents
from ..data.index import latents_name, write_index
from ..data.order import Order
from ..data.store import SHARD, LatentCache, prompts_name
from ..system.files import write_tensors

SHAPE, WIDTH = (4, 8, 8), 16  # of a latent, and of a prompt's encoding
POINTS = 20  # of the memory curve
MIB = 2**20


def run(count: int, folder: Path, batches: int, batch: int) -> dict[str, Any]:
    """Write `count` samples to an empty folder, open them as a run does, and go through shuffled batches of them.

    batches: how many are read. batch: samples in each. Returns JSON-ready values: seconds to write, and to
    open and read a first batch; milliseconds a batch; bytes on disk; and `curve`: by samples seen, first
    before opening, the reading process's resident MiB, all of it and without pages of mapped files, which the
    system takes back when it needs them (`anonymous_mib`, where it tells). Raises ValueError for a folder
    that is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder for the made-up samples.")
    started = time.perf_counter()
    _write(count, folder)
    written = time.perf_counter() - started

    # In a process of its own: memory that writing has freed would hide how much reading takes.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        reading = pool.submit(_walk, folder, batches, batch).result()
    sizes = [file.stat().st_size for file in folder.iterdir()]
    facts = {"samples": count, "files": len(sizes), "bytes": sum(sizes), "write_seconds": round(written, 1)}
    return facts | reading


def _walk(folder: Path, batches: int, batch: int) -> dict[str, Any]:
    """Open the cache, and go through shuffled batches of it. Returns the part of `run`'s values that is of reading."""
    curve = [{"samples": 0, **_memory()}]
    started = time.perf_counter()
    cache = LatentCache(folder)
    order = Order(cache.buckets, batch, 0)
    _read(cache, order.samples(0, batch))
    opened = time.perf_counter() - started

    started = time.perf_counter()
    for number in range(batches):
        _read(cache, order.samples(number * batch, batch))
        if (number + 1) % max(1, batches // POINTS) == 0:
            curve.append({"samples": (number + 1) * batch, **_memory()})
    milliseconds = (time.perf_counter() - started) / batches * 1000
    return {
        "open_seconds": round(opened, 2),
        "batch": batch,
        "batch_milliseconds": round(milliseconds, 2),
        "curve": curve,
    }


def _read(cache: LatentCache, samples: list[int]) -> None:
    """Read these samples as training does."""
    cache.latents(samples, [torch.Generator().manual_seed(number) for number in samples])
    cache.encoding([cache.captions[number] for number in samples])
    cache.sizes(samples)


def _write(count: int, folder: Path) -> None:
    """Write a cache of so many samples, each with a prompt of its own, by the functions that write a run's."""
    generator = torch.Generator().manual_seed(0)
    name = "x".join(map(str, SHAPE[1:]))
    for part, start in enumerate(range(0, count, SHARD)):
        size = min(SHARD, count - start)
        latents = torch.randn(2, size, *SHAPE, generator=generator).half()
        tensors = {f"mean.{name}": latents[0], f"std.{name}": latents[1].abs()}
        tensors["sizes"] = torch.tensor([64, 64, 0, 0, 64, 64]).repeat(size, 1)
        tensors["shape"] = torch.zeros(size, dtype=torch.int16)
        captions = [f"made-up prompt number {start + i}" for i in range(size)]
        write_latents(folder / latents_name(part, 0, last=True), tensors, [name], captions, [])
    write_index(folder, None, listed=False)

    for number, start in enumerate(range(0, count + 1, SHARD)):  # one more: the empty prompt
        size = min(SHARD, count + 1 - start)
        encodings = torch.randn(size, 1, WIDTH, generator=generator).half()
        write_tensors(folder / prompts_name(number), {"hidden": encodings}, {})


def _memory() -> dict[str, float]:
    """Resident MiB of this process, and where the system tells how much of it is no page of a file."""
    mib = {"resident_mib": psutil.Process().memory_info().rss / MIB}
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        mib["anonymous_mib"] = int(lines["RssAnon"].split()[0]) / 1024
    return {key: round(value, 1) for key, value in mib.items()}


def cache_text(details: dict[str, Any]) -> str:
    """The values of `run` as text for people."""
    d = details
    lines = [
        f"{d['samples']:,} samples: {d['bytes'] / 1e9:.2f} GB in {d['files']} files, written in {d['write_seconds']} s",
        f"opened, with a first batch read, in {d['open_seconds']} s",
        f"read at {d['batch_milliseconds']} ms a batch of {d['batch']}",
        f"{'samples seen':>12} {'resident MiB':>13} {'without file pages':>19}",
    ]
    for row in d["curve"]:
        lines.append(f"{row['samples']:12,} {row['resident_mib']:13.1f} {row.get('anonymous_mib', float('nan')):19.1f}")
    return "\n".join(lines)
