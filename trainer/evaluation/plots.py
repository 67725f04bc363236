"""The report's plots, with matplotlib: figures over evaluations, consistency across steps, guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ...samplers.phases import count_steps
from .distances import SCALE
from .intervals import Figure as Measured
from .setting import SOLVERS, TEACHER

RowFacts = dict[str, Any]  # one of a report's rows
# The teacher is grey, told apart by markers and dashes; colours are the LoRAs'.
SOLVER_STYLES = dict(zip(SOLVERS, (("o", "-"), ("s", "--"), ("^", ":")), strict=True))
LEVEL = "the reference itself: the floor"
# Panels of a space: figure, title, axis.
SPACE = (
    ("kernel", f"kernel distance x {SCALE}", "symlog"),
    ("frechet", "Frechet distance", "log"),
    ("precision", "precision", "linear"),
    ("recall", "recall", "linear"),
    ("diversity_share", "diversity, share of the reference's", "linear"),
)
COLUMNS, WIDTH, HEIGHT, DPI = 3, 4.6, 3.3, 110


def draw(report: dict[str, Any], out: Path) -> None:
    """Write quality.png, consistency.png (where there is more than one number of steps) and guidance.png."""
    colours = {lora["name"]: f"C{i}" for i, lora in enumerate(report["loras"])}
    _quality(report, colours).savefig(out / "quality.png", dpi=DPI)
    if report["consistency"]:
        _consistency(report["consistency"]).savefig(out / "consistency.png", dpi=DPI)
    _guidance(report, colours).savefig(out / "guidance.png", dpi=DPI)


def _panels(number: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many plain panels, in at most so many columns."""
    columns = min(columns, number)
    rows = -(-number // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.9), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(number)]
    for panel in axes:
        plain(panel)
    return figure, axes


def plain(panel: Axes) -> None:
    """A light grid, and no frame."""
    panel.grid(alpha=0.25, which="major")
    panel.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True)
class Curve:
    """What is drawn over evaluations: its title, axis ("log", "symlog", "linear"), the figure of a row, a factor."""

    title: str
    axis: str
    of: Callable[[RowFacts], dict[str, float] | None]
    factor: float = 1.0

    def figure(self, row: RowFacts) -> Measured | None:
        """The row's figure; None where it has none."""
        values = self.of(row)
        return values and Measured(**values) * self.factor


def _panels_of(reference: RowFacts) -> Iterator[Curve]:
    """A panel for each figure that the reference has."""
    yield Curve("paired error", "log", lambda row: row["paired_error"])
    for key, title in (("prompt_followed", "share of prompts followed"), ("clip_score", "CLIP score")):
        if key in reference:
            yield Curve(title, "linear", lambda row, key=key: row[key])
    for name, figures in reference["spaces"].items():
        for key, title, axis in SPACE:
            if key in figures:
                of = lambda row, name=name, key=key: row["spaces"][name].get(key)  # noqa: E731
                yield Curve(f"{title}, {name}", axis, of, SCALE if key == "kernel" else 1.0)


def _quality(report: dict[str, Any], colours: dict[str, str]) -> Figure:
    """A panel for each figure over evaluations; the reference is a band as wide as its interval."""
    reference, *rows = report["rows"]
    panels = list(_panels_of(reference))
    figure, axes = _panels(len(panels), COLUMNS)
    for axis, panel in zip(axes, panels, strict=True):
        _over_evaluations(axis, rows, panel, colours)
        floor = panel.figure(reference)
        if panel.title != "paired error":
            axis.axhline(floor.value, color="black", linewidth=1, linestyle=(0, (1, 2)), label=LEVEL)
            axis.axhspan(floor.low, floor.high, color="black", alpha=0.08, linewidth=0)
        axis.set(title=panel.title, xlabel="network evaluations per picture")
        if panel.axis == "log":
            logarithmic(axis)
        elif panel.axis == "symlog":  # an unbiased distance may come below 0: plain up to the floor's noise
            axis.set_yscale("symlog", linthresh=max(floor.half_width, 1e-9))
        else:
            axis.set_ylim(bottom=0)
    _legend(figure, axes)
    return figure


def logarithmic(panel: Axes) -> None:
    """A logarithmic y axis in plain numbers."""
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    panel.yaxis.set_minor_locator(NullLocator())


def _over_evaluations(axis: Axes, rows: list[RowFacts], panel: Curve, colours: dict[str, str]) -> None:
    """A line for each LoRA, the base without it, and each solver, on a logarithmic axis of evaluations."""
    lines: dict[str, list[RowFacts]] = {}
    for row in rows:
        unguided = row["name"] == TEACHER and row["guidance"] == 1
        lines.setdefault(f"{row['who']}, CFG 1" if unguided else row["who"], []).append(row)
    for label, same in lines.items():
        points = sorted(((r["evaluations"], panel.figure(r)) for r in same if panel.figure(r)), key=lambda p: p[0])
        with_bars(axis, points, label=label, **_style(same[0], label, colours))

    ticks = sorted({row["evaluations"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def with_bars(axis: Axes, points: list[tuple[float, Measured]], **style) -> None:
    """A line through figures at these places, each with its interval as a bar; nothing where there are none."""
    if points:
        places, figures = zip(*points, strict=True)
        bars = [[f.value - f.low for f in figures], [f.high - f.value for f in figures]]
        axis.errorbar(places, [f.value for f in figures], yerr=bars, capsize=2, elinewidth=1, **style)


def _style(row: RowFacts, label: str, colours: dict[str, str]) -> dict[str, Any]:
    """Matplotlib's keywords for the line of which this is a row."""
    if row["untrained"]:
        colour = colours[row["name"]]
        return {"color": colour, "marker": "x", "linestyle": "--", "linewidth": 1.3, "markersize": 6, "alpha": 0.7}
    if row["name"] != TEACHER:
        return {"color": colours[row["name"]], "marker": "D", "linewidth": 2.2, "markersize": 6, "zorder": 3}
    marker, dashes = SOLVER_STYLES[row["solver"]]
    if label.endswith("CFG 1"):
        return {"color": "0.72", "marker": "x", "linestyle": "-.", "linewidth": 1.3, "markersize": 5}
    return {"color": "0.35", "marker": marker, "linestyle": dashes, "linewidth": 1.3, "markersize": 5}


def _legend(figure: Figure, axes: list[Axes]) -> None:
    """One legend below all panels."""
    pairs = (pair for panel in axes for pair in zip(*panel.get_legend_handles_labels(), strict=True))
    handles = {label: handle for handle, label in pairs}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _consistency(tables: dict[str, dict[str, dict[str, dict[str, float]]]]) -> Figure:
    """A panel for each who, with a square for each pair of step counts: rows have fewer steps, columns more."""
    figure, axes = _panels(len(tables), COLUMNS)
    highest = max(error["value"] for rows in tables.values() for row in rows.values() for error in row.values())
    for panel, (who, rows) in zip(axes, tables.items(), strict=True):
        fewer, more = list(rows), list(dict.fromkeys(m for row in rows.values() for m in row))
        grid = [[rows[n][m]["value"] if m in rows[n] else float("nan") for m in more] for n in fewer]
        panel.imshow(grid, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
        for i, n in enumerate(fewer):
            for j, m in enumerate(more):
                if m in rows[n]:
                    error = Measured(**rows[n][m])
                    colour = "white" if error.value > 0.6 * highest else "black"
                    text = f"{error.value:.3f}\n[{error.low:.3f}, {error.high:.3f}]"
                    panel.text(j, i, text, ha="center", va="center", color=colour, fontsize=7)
        panel.set(title=who, xlabel="steps", ylabel="fewer steps", xticks=range(len(more)), yticks=range(len(fewer)))
        panel.set_xticklabels(more)
        panel.set_yticklabels(fewer)
        panel.grid(False)
    figure.suptitle("Paired error between step counts, same noise")
    return figure


def _guidance(report: dict[str, Any], colours: dict[str, str]) -> Figure:
    """The sweep against both references, and the negative prompt's change beside the teacher's."""
    rows, guidance = report["guidance"], report["reference"]["guidance"]
    with_negatives = [row for row in rows if "negative_prompt" in row]
    figure, axes = _panels(2 + bool(with_negatives), COLUMNS)
    titles = {
        "error_same_cfg": "against the teacher at the same CFG",
        "error": f"against the teacher at CFG {guidance:g}",
    }
    for panel, (key, title) in zip(axes, titles.items(), strict=False):
        for row in rows:
            points = [(p["guidance"], Measured(**p[key])) for p in row["sweep"]]
            label = f"{row['name']}, {count_steps(row['steps'])}"
            with_bars(panel, points, label=label, marker="D", color=colours[row["name"]])
        panel.set(title=title, xlabel="CFG of the LoRA", ylabel="paired error")
        logarithmic(panel)
    if with_negatives:
        _negatives(axes[2], with_negatives, colours)
    _legend(figure, axes)
    return figure


def _negatives(panel: Axes, rows: list[RowFacts], colours: dict[str, str]) -> None:
    """Two bars for each LoRA: how far a negative prompt moves its pictures, and the teacher's."""
    for i, row in enumerate(rows):
        response, first = row["negative_prompt"], i == 0
        changes = [Measured(**response[key]) for key in ("change", "change_of_teacher")]
        panel.bar(i - 0.2, changes[0].value, 0.38, color=colours[row["name"]])
        panel.bar(i + 0.2, changes[1].value, 0.38, color="0.6", label="teacher" if first else None)
        for at, change in zip((i - 0.2, i + 0.2), changes, strict=True):
            with_bars(panel, [(at, change)], color="black", linestyle="none")
    panel.set_xlim(-1, len(rows))
    panel.set(title="change by a negative prompt", ylabel="paired error, with to without", xticks=range(len(rows)))
    panel.set_xticklabels([f"{r['name']}\nCFG {r['negative_prompt']['guidance']:g}" for r in rows], fontsize=8)
