"""The report's plots, with matplotlib: figures over evaluations, consistency across steps, guidance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from .setting import SOLVERS, TEACHER

RowFacts = dict[str, Any]  # one of a report's rows
# The teacher is grey, told apart by markers and dashes; colours are the LoRAs'.
SOLVER_STYLES = dict(zip(SOLVERS, (("o", "-"), ("s", "--"), ("^", ":")), strict=True))
LEVEL = "reference (distances: with other noise)"
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


def _quality(report: dict[str, Any], colours: dict[str, str]) -> Figure:
    """A panel for each figure over evaluations; the reference itself is where the errors are 0."""
    reference, *rows = report["rows"]
    # title, figure of a row, level of the reference, whether the axis is logarithmic
    panels: list[tuple[str, Callable[[RowFacts], float | None], float | None, bool]] = [
        ("paired error", lambda r: r["paired_error"], None, True)
    ]
    for name, level in report["other_noise"].items():
        for kind, title in (("sliced_wasserstein", "sliced Wasserstein"), ("frechet", "Frechet distance")):
            value = lambda r, name=name, kind=kind: r["distances"][name][kind]  # noqa: E731
            panels.append((f"{title}, {name}", value, level[kind], True))
    for key, title in (("clip_score", "CLIP score"), ("prompt_followed", "share of prompts followed")):
        if key in reference:
            panels.append((title, lambda r, key=key: r[key], reference[key], False))
    for name, teacher in reference["diversity"].items():
        share = lambda r, name=name, teacher=teacher: r["diversity"][name] / teacher if "diversity" in r else None  # noqa: E731
        if teacher:
            panels.append((f"seed diversity, {name} (1: reference)", share, 1.0, False))

    figure, axes = _panels(len(panels), COLUMNS)
    for panel, (title, value, level, log) in zip(axes, panels, strict=True):
        _over_evaluations(panel, rows, value, colours)
        if level is not None:
            panel.axhline(level, color="black", linewidth=1, linestyle=(0, (1, 2)), label=LEVEL)
        panel.set(title=title, xlabel="network evaluations per picture")
        if log:
            logarithmic(panel)
        else:
            panel.set_ylim(bottom=0)
    _legend(figure, axes)
    return figure


def logarithmic(panel: Axes) -> None:
    """A logarithmic y axis in plain numbers."""
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    panel.yaxis.set_minor_locator(NullLocator())


def _over_evaluations(panel: Axes, rows: list[RowFacts], value: Callable, colours: dict[str, str]) -> None:
    """A line for each LoRA and solver, and for the teacher without guidance, on a logarithmic axis of evaluations."""
    lines: dict[str, list[RowFacts]] = {}
    for row in rows:
        unguided = row["name"] == TEACHER and row["guidance"] == 1
        lines.setdefault(f"{row['who']}, CFG 1" if unguided else row["who"], []).append(row)
    for label, same in lines.items():
        points = sorted((r["evaluations"], value(r)) for r in same if value(r) is not None)
        if points:
            panel.plot(*zip(*points, strict=True), label=label, **_style(same[0], label, colours))

    ticks = sorted({row["evaluations"] for row in rows})
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _style(row: RowFacts, label: str, colours: dict[str, str]) -> dict[str, Any]:
    """Matplotlib's keywords for the line of which this is a row."""
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


def _consistency(tables: dict[str, dict[str, dict[str, float]]]) -> Figure:
    """A panel for each who, with a square for each pair of step counts: rows have fewer steps, columns more."""
    figure, axes = _panels(len(tables), COLUMNS)
    highest = max(error for rows in tables.values() for row in rows.values() for error in row.values())
    for panel, (who, rows) in zip(axes, tables.items(), strict=True):
        fewer, more = list(rows), list(dict.fromkeys(m for row in rows.values() for m in row))
        grid = [[rows[n].get(m, float("nan")) for m in more] for n in fewer]
        panel.imshow(grid, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
        for i, row in enumerate(grid):
            for j, error in enumerate(row):
                if error == error:  # not NaN: there are more steps in the column
                    colour = "white" if error > 0.6 * highest else "black"
                    panel.text(j, i, f"{error:.3f}", ha="center", va="center", color=colour)
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
            points = [(p["guidance"], p[key]) for p in row["sweep"]]
            label = f"{row['name']}, {row['steps']} steps"
            panel.plot(*zip(*points, strict=True), label=label, marker="D", color=colours[row["name"]])
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
        panel.bar(i - 0.2, response["change"], 0.38, color=colours[row["name"]])
        panel.bar(i + 0.2, response["change_of_teacher"], 0.38, color="0.6", label="teacher" if first else None)
    panel.set_xlim(-1, len(rows))
    panel.set(title="change by a negative prompt", ylabel="paired error, with to without", xticks=range(len(rows)))
    panel.set_xticklabels([f"{r['name']}\nCFG {r['negative_prompt']['guidance']:g}" for r in rows], fontsize=8)
