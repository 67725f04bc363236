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

SHAPE, WIDTH = (4, 8, 8), 16
POINTS = 20  # of the memory curve


def run(count: int, folder: Path, batches: int, batch: int) -> dict[str, Any]:
    """Write `count` samples to an empty folder, open them as a run does, and go through shuffled batches of them.

    Returns JSON-ready values: seconds to write, and to open and read a first batch; milliseconds a batch; bytes on
    disk; and `curve`: by samples seen, first before opening, the reading process's resident MiB, all of it and without
    pages of mapped files, which the system takes back when it needs them (`anonymous_mib`, where it tells).
    Raises ValueError for a folder that is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder for the made-up samples.")
    started = time.perf_counter()
    _write(count, folder)
    written = time.perf_counter() - started
    # in a process of its own: what writing has freed would hide what reading takes
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        read = pool.submit(_walk, folder, batches, batch).result()
    sizes = [file.stat().st_size for file in folder.iterdir()]
    return {"samples": count, "files": len(sizes), "bytes": sum(sizes), "write_seconds": round(written, 1), **read}


def _walk(folder: Path, batches: int, batch: int) -> dict[str, Any]:
    """Open the cache, and go through shuffled batches of it."""
    curve, started = [{"samples": 0, **_memory()}], time.perf_counter()
    cache = LatentCache(folder)
    order = Order(cache.buckets, batch, 0)
    _read(cache, order.samples(0, batch))
    opened, started = time.perf_counter() - started, time.perf_counter()
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
    """What a forward pass reads."""
    cache.latents(samples, [torch.Generator().manual_seed(number) for number in samples])
    cache.encoding([cache.captions[number] for number in samples])
    cache.sizes(samples)


def _write(count: int, folder: Path) -> None:
    """A cache of as many samples, each with a prompt of its own, by what writes a run's cache."""
    generator = torch.Generator().manual_seed(0)
    name = "x".join(map(str, SHAPE[1:]))
    for part, start in enumerate(range(0, count, SHARD)):
        here = min(SHARD, count - start)
        latents = torch.randn(2, here, *SHAPE, generator=generator).half()
        tensors = {f"mean.{name}": latents[0], f"std.{name}": latents[1].abs()}
        tensors["sizes"] = torch.tensor([64, 64, 0, 0, 64, 64]).repeat(here, 1)
        tensors["shape"] = torch.zeros(here, dtype=torch.int16)
        captions = [f"made-up prompt number {start + i}" for i in range(here)]
        write_latents(folder / latents_name(part, 0, last=True), tensors, [name], captions, [])
    write_index(folder, None, listed=False)
    for number, start in enumerate(range(0, count + 1, SHARD)):  # one more: the empty prompt
        here = min(SHARD, count + 1 - start)
        write_tensors(
            folder / prompts_name(number), {"hidden": torch.randn(here, 1, WIDTH, generator=generator).half()}, {}
        )


def _memory() -> dict[str, float]:
    """Resident MiB of this process."""
    found = {"resident_mib": psutil.Process().memory_info().rss / 2**20}
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        found["anonymous_mib"] = int(lines["RssAnon"].split()[0]) / 1024
    return {key: round(value, 1) for key, value in found.items()}


def report(details: dict[str, Any]) -> str:
    """`run` for people."""
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
