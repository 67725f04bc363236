"""`pcm watch`: a run that goes on, on one page of a terminal, read from its folder."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .page import write_report
from .story import Story, duration

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 48  # characters of a curve
LOSSES = "loss"  # how the names of an update's losses end
PICTURES = 3  # newest previews that are named


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """A curve in one line, from its least to its greatest value; means of neighbours where there are more than fit.

    What is not finite is a gap.
    """
    if not values:
        return ""
    count = min(width, len(values))
    parts = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return " " * count
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join(BARS[int((mean - low) / span * (len(BARS) - 1))] if math.isfinite(mean) else " " for mean in means)


def facts(story: Story) -> dict[str, Any]:
    """The state of a run, JSON-ready: updates, rate and time left as the run tells them, newest figures, files."""
    state, reason = story.state
    start = story.starts[-1]
    newest = story.updates[-1] if story.updates else {}
    measured = story.measured[-1] if story.measured else {}
    previews = sorted((story.folder / "previews").glob("step-*.png"))
    return {
        "run": str(story.folder),
        "state": state,
        "reason": reason,
        "step": story.step,
        "steps": story.steps,
        "updates_per_second": story.rate,
        "seconds_left": story.seconds_left if state == "running" else None,
        "losses": {name: value for name, value in newest.items() if name.endswith(LOSSES)},
        "peak_memory_gib": start.get("peak memory") or newest.get("peak memory"),
        "figures": measured.get("figures", {}),
        "best": story.best,
        "previews": [str(path) for path in previews[-PICTURES:]],
        "loras": [str(story.folder / lora["name"]) for lora in story.loras.values()],
    }


def page(story: Story) -> Group:
    """The run as a page for a terminal."""
    now = facts(story)
    rate, left = now["updates_per_second"], now["seconds_left"]
    head = [f"update {now['step']} of {now['steps']}"]
    head += [f"{rate:.2f} updates/s" if rate >= 1 else f"{1 / rate:.1f} s an update"] if rate else []
    head += [f"{duration(left)} left"] if left is not None else []
    head += [f"{now['peak_memory_gib']:.1f} GiB"] if now["peak_memory_gib"] else []

    curves = Table.grid(padding=(0, 2))
    names = dict.fromkeys(name for line in story.updates[-1:] for name in line if name.endswith(LOSSES))
    for name in names:
        values = [line[name] for line in story.updates if name in line]
        curves.add_row(name, sparkline(values), f"{values[-1]:.4g}")
    for name in now["figures"]:
        values = [line["figures"][name] for line in story.measured if name in line["figures"]]
        curves.add_row(name, sparkline(values), f"{values[-1]:.4g}")

    best = now["best"]
    lines = [Text(f"{story.name}: {now['state']}{', ' + now['reason'] if now['reason'] else ''}", style="bold")]
    lines += [Text(", ".join(head)), curves]
    lines += [Text(f"best so far: update {best['step']}, {best['figure']} {best['value']:.4g}")] if best else []
    lines += [Text(path, overflow="fold") for path in (*now["previews"], *now["loras"])]
    return Group(*lines)


def watch(folder: Path, every: float, report: bool, console: Console) -> dict[str, Any]:
    """Show a run until it ends, read anew each `every` seconds; returns its last `facts`.

    report: write report.html each time, too, which a browser then reads anew by itself. Where the console is no
    terminal the page is printed once. Raises ValueError for a folder that holds no run, or an interval that is not
    above 0.
    """
    if not every > 0:
        raise ValueError(f"--every is {every:g}; a number of seconds above 0.")
    story = Story.of(folder)
    if report:
        write_report(folder)
    if not console.is_terminal:
        console.print(page(story), soft_wrap=True)
        return facts(story)

    with Live(page(story), console=console, auto_refresh=False) as live:
        while story.state[0] == "running":
            time.sleep(every)
            story = Story.of(folder)
            if report:
                write_report(folder)
            live.update(page(story), refresh=True)
    return facts(story)
