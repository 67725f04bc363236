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
from .log import LOSS, Line

WIDTH, HEIGHT = 5.2, 3.1
BINS = 300  # of a curve of more updates than that, whose spread is drawn
NORM, AGREEMENT = "gradient norm", "paired error"
# Names of text stay text, in the page's font; the same run gives the same bytes.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "pcm", "font.family": "sans-serif", "font.size": 9}


def curves(updates: list[Line], measured: list[Line], best: int | None, stops: Sequence[int] = ()) -> dict[str, str]:
    """SVG by title, of what there is: losses, paired errors, gradient norms, rate.

    updates, measured: lines of the log. best: update of the best LoRA; stops: updates after which the run was stopped.
    """
    drawn: dict[str, Callable[[Axes], None]] = {}
    names = [name for name in (updates[0] if updates else {}) if name not in ("kind", "step", "seconds")]
    for name in names:
        if name.endswith("loss"):
            drawn[f"{name} in training".capitalize()] = lambda panel, name=name: _of_updates(panel, updates, name)
    figures = list(measured[-1]["figures"]) if measured else []
    if LOSS in figures:
        drawn["Held-out loss"] = lambda panel: _of_measured(panel, measured, [LOSS], best)
    errors = [name for name in figures if name.startswith(AGREEMENT)]
    if errors:
        drawn["Paired error against the teacher"] = lambda panel: _of_measured(panel, measured, errors, best)
    norms = [name for name in names if name.startswith(NORM)]
    if norms:
        drawn["Gradient norms"] = lambda panel: _norms(panel, updates, norms)
    if "lr" in names:
        drawn["Learning rate"] = lambda panel: panel.plot(*_points(updates, "lr"), color="C0")
    return {title: _svg(draw, stops) for title, draw in drawn.items()}


def _svg(draw: Callable[[Axes], Any], stops: Sequence[int]) -> str:
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


def _of_updates(panel: Axes, updates: list[Line], name: str) -> None:
    """Each update's value, or their spread where they are many, under a smoothed line."""
    x, y = _points(updates, name)
    if len(x) > BINS:
        parts = np.array_split(np.arange(len(x)), BINS)
        middle, low, high = (np.array([of(v[p]) for p in parts]) for of, v in ((np.mean, x), (np.min, y), (np.max, y)))
        panel.fill_between(middle, low, high, color="C0", alpha=0.22, linewidth=0, label="lowest to highest")
        keep = [p[-1] for p in parts]
    else:
        panel.plot(x, y, color="C0", alpha=0.35, linewidth=0.9, label="each update")
        keep = slice(None)
    panel.plot(x[keep], smoothed(y)[keep], color="C0", linewidth=1.8, label="smoothed")
    if len(y) and y.min() > 0:
        logarithmic(panel)


def _norms(panel: Axes, updates: list[Line], names: list[str]) -> None:
    for i, name in enumerate(names):
        x, y = _points(updates, name)
        panel.plot(x, smoothed(y), color=f"C{i}", linewidth=1.4, label=name.removeprefix(f"{NORM} of the "))
    logarithmic(panel)


def _of_measured(panel: Axes, measured: list[Line], names: list[str], best: int | None) -> None:
    """A line for each figure; what the weights have without averaging, dashed."""
    for i, name in enumerate(names):
        label = name.removeprefix(f"{AGREEMENT} at ") if len(names) > 1 else None
        for which, how in (("plain", {"linestyle": "--", "alpha": 0.5, "linewidth": 1}), ("figures", {"label": label})):
            points = [(line["step"], line[which][name]) for line in measured if line[which].get(name) is not None]
            if points:
                panel.plot(*zip(*points, strict=True), color=f"C{i}", marker="o", markersize=3, **how)
    if any(line["plain"] for line in measured):
        panel.plot([], [], color="0.5", linestyle="--", linewidth=1, label="not averaged")
    if best is not None:
        panel.axvline(best, color="C2", linewidth=1, zorder=0, label="best")
    values = [line["figures"].get(name) for line in measured for name in names]
    if all(value is not None and value > 0 for value in values):
        logarithmic(panel)


def smoothed(values: NDArray) -> NDArray:
    """Exponential moving average over a fiftieth of the updates, without the pull of its start (as Adam corrects)."""
    decay = 1 - 1 / max(1.0, len(values) / 50)
    found, mean = np.empty(len(values)), 0.0
    for i, value in enumerate(values):
        mean = decay * mean + (1 - decay) * value
        found[i] = mean / (1 - decay ** (i + 1))
    return found


def _points(lines: list[Line], name: str) -> tuple[NDArray, NDArray]:
    """Updates and values, where there is a value."""
    there = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    x, y = zip(*there, strict=True) if there else ((), ())
    return np.array(x, float), np.array(y, float)
