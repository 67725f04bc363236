"""The report's curves, by matplotlib, as SVG to stand in a page."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ..evaluation.plots import logarithmic, plain
from .log import DISTANCE, DIVERSITY, LOSS, RECALL, LogLine

WIDTH, HEIGHT = 5.2, 3.1
BINS = 300  # a curve of more updates than that is drawn as the spread in so many bins
NORM, ERROR = "gradient norm", "paired error"  # the beginnings of figures' names
# Text stays text, in the page's font; the salt makes the same run give the same bytes.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "pcm", "font.family": "sans-serif", "font.size": 9}


def curves(
    updates: list[LogLine],
    measured: list[LogLine],
    best: int | None,
    stops: Sequence[int] = (),
    loss_tells: bool = True,
) -> dict[str, str]:
    """SVG by title, of the curves that there is something for: losses, paired errors or figures of sets, norms of
    gradients, learning rate.

    updates, measured: lines of the log. best: update of the best LoRA; stops: updates after which the run was stopped.
    loss_tells: whether the loss falls as the run learns; else there is no curve of it.
    """
    panels: dict[str, Callable[[Axes], None]] = {}
    names = [name for name in (updates[0] if updates else {}) if name not in ("kind", "step", "seconds")]
    for name in names:
        if name.endswith("loss") and (loss_tells or name != "loss"):
            panels[f"{name} in training".capitalize()] = lambda panel, name=name: _updates(panel, updates, name)
    figures = list(measured[-1]["figures"]) if measured else []
    if LOSS in figures:
        panels["Held-out loss"] = lambda panel: _validations(panel, measured, [LOSS], best)
    errors = [name for name in figures if name.startswith(ERROR)]
    if errors:
        panels["Paired error against the teacher"] = lambda panel: _validations(panel, measured, errors, best)
    for kind in (DISTANCE, DIVERSITY, RECALL):
        if of_sets := [name for name in figures if name.startswith(kind)]:
            panels[kind.capitalize()] = lambda panel, names=of_sets: _validations(panel, measured, names, best)
    norms = [name for name in names if name.startswith(NORM)]
    if norms:
        panels["Gradient norms"] = lambda panel: _norms(panel, updates, norms)
    if "lr" in names:
        panels["Learning rate"] = lambda panel: panel.plot(*_points(updates, "lr"), color="C0")
    return {title: _svg(draw, stops) for title, draw in panels.items()}


def _svg(draw: Callable[[Axes], Any], stops: Sequence[int]) -> str:
    """A panel that `draw` fills, over updates."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        panel = figure.add_subplot()
        plain(panel)
        draw(panel)
        for stop in stops:
            panel.axvline(stop, color="0.6", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        panel.set_xlabel("updates")
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if panel.get_legend_handles_labels()[1]:
            figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _updates(panel: Axes, updates: list[LogLine], name: str) -> None:
    """Each update's value, or their spread where they are many, under a smoothed line."""
    x, y = _points(updates, name)
    if len(x) > BINS:
        bins = np.array_split(np.arange(len(x)), BINS)
        middle = np.array([x[indices].mean() for indices in bins])
        low = np.array([y[indices].min() for indices in bins])
        high = np.array([y[indices].max() for indices in bins])
        panel.fill_between(middle, low, high, color="C0", alpha=0.22, linewidth=0, label="lowest to highest")
        keep = [indices[-1] for indices in bins]
    else:
        panel.plot(x, y, color="C0", alpha=0.35, linewidth=0.9, label="each update")
        keep = slice(None)
    panel.plot(x[keep], smoothed(y)[keep], color="C0", linewidth=1.8, label="smoothed")
    if len(y) and y.min() > 0:
        logarithmic(panel)


def _norms(panel: Axes, updates: list[LogLine], names: list[str]) -> None:
    """A smoothed line for each gradient norm."""
    for i, name in enumerate(names):
        x, y = _points(updates, name)
        panel.plot(x, smoothed(y), color=f"C{i}", linewidth=1.4, label=name.removeprefix(f"{NORM} of the "))
    logarithmic(panel)


def _validations(panel: Axes, measured: list[LogLine], names: list[str], best: int | None) -> None:
    """A line for each figure, and a dashed one for that of the weights without averaging."""
    for i, name in enumerate(names):
        label = name.rpartition(" at ")[2] if len(names) > 1 else None
        styles = {"plain": {"linestyle": "--", "alpha": 0.5, "linewidth": 1}, "figures": {"label": label}}
        for which, style in styles.items():
            points = [(line["step"], line[which][name]) for line in measured if line[which].get(name) is not None]
            if points:
                panel.plot(*zip(*points, strict=True), color=f"C{i}", marker="o", markersize=3, **style)
    if any(line["plain"] for line in measured):
        panel.plot([], [], color="0.5", linestyle="--", linewidth=1, label="not averaged")
    if best is not None:
        panel.axvline(best, color="C2", linewidth=1, zorder=0, label="best")
    values = [line["figures"].get(name) for line in measured for name in names]
    if all(value is not None and value > 0 for value in values):
        logarithmic(panel)


def smoothed(values: NDArray) -> NDArray:
    """(n,) the values' exponential moving average over a fiftieth of them.

    It is divided by the sum of its weights so far, as Adam does, so that it does not start at 0.
    """
    decay = 1 - 1 / max(1.0, len(values) / 50)
    averages, mean = np.empty(len(values)), 0.0
    for i, value in enumerate(values):
        mean = decay * mean + (1 - decay) * value
        averages[i] = mean / (1 - decay ** (i + 1))
    return averages


def _points(lines: list[LogLine], name: str) -> tuple[NDArray, NDArray]:
    """The updates at which there is a value of this name, and the values."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    x, y = zip(*points, strict=True) if points else ((), ())
    return np.array(x, float), np.array(y, float)
