"""`pcm bench`: what a run's updates take, beside a loop like the published scripts', or counted at full size without a
GPU; `pcm bench-gpu`: every promise that is made of a GPU; `pcm bench-data`: what a large cache takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Json, Settings, answer, configured, preset_option

if TYPE_CHECKING:
    from ..config.config import Config


def bench(
    settings: Settings = None,
    preset: Annotated[str, preset_option("Start from this preset; default without a file: demo.")] = None,
    count: Annotated[
        str,
        preset_option("Time nothing: count what an update of this preset, or CONFIG.toml, asks of a GPU, without one."),
    ] = None,
    updates: Annotated[int, typer.Option(min=1, help="Updates to time, of each loop; default: 20.")] = None,
    warmup: Annotated[int, typer.Option(min=1, help="Updates before, in which passes are counted; default: 3.")] = None,
    reference: Annotated[
        bool, typer.Option("--reference/--no-reference", help="Run the reference loop too; default: yes.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.txt.")] = None,
    as_json: Json = False,
) -> None:
    """Measure speed, passes, memory and time split of training, beside a loop like PCM's published scripts.

    Takes the settings of pcm train, and keeps nothing of the run. With adversarial.weight it measures the plain
    updates too. The reference loop has two networks, encodes in every iteration, and trains a discriminator and the
    student in turn; both loops run in one process, a few updates each in turn.

    With --count the networks are of full size and hold nothing, on a CUDA device that need not be there: launches,
    operations, bytes moved, peak memory, copies between host and GPU and waits, by part of the update, in a minute.
    It needs Linux, a C++ compiler and torch's build for CPUs.

    Example: pcm bench --preset demo adversarial.weight=0.1 --updates 20

    Example: pcm bench --count sdxl-4step base.quantize=int8
    """
    if count is not None:
        details, text = _counted(count, settings, preset, updates, warmup, reference)
    else:
        details, text = _compared(configured(settings, preset, default="demo"), updates, warmup, reference)

    if out:
        from ..system.files import write_text

        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "bench.json", json.dumps(details, indent=2) + "\n")
        write_text(out / "bench.txt", text + "\n")
    answer(details, as_json, text)


def _counted(
    name: str, settings: list[str] | None, preset: str | None, *timing: int | bool | None
) -> tuple[dict[str, Any], str]:
    """What `pcm bench --count` answers. Raises ValueError for options that are about time."""
    if any(option is not None for option in timing):
        raise ValueError("--count times nothing: leave --updates, --warmup and --reference out.")
    if name.endswith(".toml"):
        config = configured([name, *(settings or [])], preset)
    elif preset is not None:
        raise ValueError(f"--count {name} and --preset {preset} name two presets: leave --preset out.")
    else:
        config = configured(settings, name)

    from ..bench.count import count, count_text

    (details,) = count(config)
    return details, count_text(details)


def _compared(
    config: Config, updates: int | None, warmup: int | None, reference: bool | None
) -> tuple[dict[str, Any], str]:
    """What `pcm bench` answers without --count."""
    from ..bench.comparison import bench as compare
    from ..bench.report import bench_text
    from ..reporting.progress import progress_on_stderr

    with progress_on_stderr() as bar:
        details = compare(
            config, updates=updates or 20, warmup=warmup or 3, reference=reference is not False, reporter=bar
        )
    return details, bench_text(details)


def bench_gpu(
    out: Annotated[Path, typer.Option(help="Folder for gpu-check.json and gpu-check.md.")] = Path("out/gpu"),
    limit: Annotated[float, typer.Option(min=1, help="Seconds that it may take; default: 420.")] = None,
    only: Annotated[list[str], typer.Option(help="A section by its name. Repeat for several; default: all.")] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Try the check itself on the least bases, without a GPU too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Try what is promised of a GPU, and measure it, on networks of full size with random weights; nothing is fetched.

    Losses and gradients beside a CPU's, waits, our updates beside the reference loop's and beside what the card can do,
    whole runs in 8, 12 and 16 GB, runs that are killed and go on, sampling. JSON and a table in Markdown are written
    after every section. A section that fails is a row of the table, and so is one for which no time is left.

    Exits with 1 unless every promise is seen to hold. What needs another machine does not count.

    Example: pcm bench-gpu --out out/gpu

    Example: pcm bench-gpu --only "devices agree" --only resumes
    """
    from ..bench.gpu.check import LIMIT, check_gpu

    def say(line: str) -> None:
        typer.echo(line, err=True)

    report = check_gpu(out, limit=limit or LIMIT, only=only or (), tiny=tiny, say=say)
    answer(report, as_json, report["text"])
    if report["open"]:
        raise typer.Exit(1)


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
