"""`pcm bench`: what a run's updates take, beside a loop like the published scripts'; `pcm bench-data`: what a large
cache takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Settings, answer, configured, preset_option


def bench(
    settings: Settings = None,
    preset: Annotated[str, preset_option("Start from this preset; default without a file: demo.")] = None,
    updates: Annotated[int, typer.Option(min=1, help="Updates to time, of each loop.")] = 20,
    warmup: Annotated[int, typer.Option(min=1, help="Updates before, in which passes are counted.")] = 3,
    reference: Annotated[bool, typer.Option("--reference/--no-reference", help="Run the reference loop too.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.txt.")] = None,
    as_json: Json = False,
) -> None:
    """Measure speed, passes, memory and time split of training, beside a loop like PCM's published scripts.

    Takes the settings of pcm train, and keeps nothing of the run. With adversarial.weight it measures the plain
    updates too. The reference loop has two networks, encodes in every iteration, and trains a discriminator and the
    student in turn; both loops run in one process, a few updates each in turn.

    Example: pcm bench --preset demo adversarial.weight=0.1 --updates 20
    """
    config = configured(settings, preset, default="demo")

    from ..bench.comparison import bench as compare
    from ..bench.report import bench_text
    from ..reporting.progress import progress_on_stderr
    from ..system.files import write_text

    with progress_on_stderr() as bar:
        details = compare(config, updates=updates, warmup=warmup, reference=reference, reporter=bar)
    text = bench_text(details)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "bench.json", json.dumps(details, indent=2) + "\n")
        write_text(out / "bench.txt", text + "\n")
    answer(details, as_json, text)


def bench_data(
    samples: Annotated[int, typer.Option(min=1, help="Synthetic samples to write and read.")] = 1_000_000,
    batches: Annotated[int, typer.Option(min=1, help="Batches to read.")] = 15_625,
    batch: Annotated[int, typer.Option(min=1, help="Samples of each.")] = 64,
    folder: Annotated[Path, typer.Option(help="Where to write them for the time; a million take 1.2 GB.")] = Path("."),
    as_json: Json = False,
) -> None:
    """Write a cache of synthetic samples, open it and read shuffled batches: times, and the memory that it takes.

    Example: pcm bench-data --samples 20000 --batches 300
    """
    import tempfile

    from ..bench.cache import cache_text
    from ..bench.cache import run as measure

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="pcm-bench-") as place:
        details = measure(samples, Path(place), batches, batch)
    answer(details, as_json, cache_text(details))
