"""Chapters of a page of measurements: tables of figures, rows of pictures, and goals that are met or not."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from torch import Tensor

LETTERS = 19  # in a line of a label
Figures = dict[str, float]


@dataclass
class Goal:
    """A value that an edit has reached, and the range that it has to be in. what: the value's name."""

    what: str
    value: float
    least: float = float("-inf")
    most: float = float("inf")

    @property
    def met(self) -> bool:
        return self.least <= self.value <= self.most


@dataclass
class Chapter:
    """One edit: rows of figures by label, rows of labelled pictures, goals.

    captions: of the columns of pictures. measure: called with a row's pictures, and other tensors where its
    figures depend on them, for the figures.
    """

    title: str
    captions: list[str]
    measure: Callable[..., Figures] | None = None
    rows: dict[str, Figures] = field(default_factory=dict)
    pictures: list[tuple[str, Tensor]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def show(self, label: str, pictures: Tensor) -> None:
        """Add a row of pictures (B, 3, H, W)."""
        self.pictures.append((textwrap.fill(label, LETTERS, break_long_words=False), pictures[: len(self.captions)]))

    def add(self, label: str, pictures: Tensor, *others: Tensor, show: bool = True) -> None:
        """Measure a row of pictures, with these other arguments of `measure`."""
        self.rows[label] = self.measure(pictures, *others)
        if show:
            self.show(label, pictures)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: figures that are exact are None."""
        goals = [{k: _finite(v) for k, v in asdict(goal).items()} | {"met": goal.met} for goal in self.goals]
        rows = {label: {k: _finite(v) for k, v in figures.items()} for label, figures in self.rows.items()}
        return {"goals": goals, "rows": rows}


def tables(chapters: list[Chapter]) -> str:
    """Markdown of all goals in one table, then a table of figures for each chapter."""
    lines = ["| edit | what | reached | goal | met |", "|---|---|---|---|---|"]
    for s in chapters:
        lines += [
            f"| {s.title} | {x.what} | {_cell(x.value)} | {_range(x)} | {'yes' if x.met else 'no'} |" for x in s.goals
        ]
    for s in chapters:
        columns = list(dict.fromkeys(c for figures in s.rows.values() for c in figures))
        lines += ["", f"**{s.title}**", "", f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        for label, figures in s.rows.items():
            cells = " | ".join(_cell(figures[c]) if c in figures else "" for c in columns)
            lines.append(f"| {label} | {cells} |")
    return "\n".join(lines) + "\n"


def _range(goal: Goal) -> str:
    ends = [f"{text} {_cell(end)}" for text, end in (("at least", goal.least), ("at most", goal.most)) if isfinite(end)]
    return ", ".join(ends)


def _cell(value: float) -> str:
    if not isfinite(value):
        return "exact"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not isfinite(value) else value
