"""`pcm settings` and `pcm presets`: the rows that docs/config.md and docs/presets.md show."""

from __future__ import annotations

import difflib
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from .completion import preset_names_with, setting_names_with
from .options import Json, answer

if TYPE_CHECKING:
    from ..config.reference import SettingRow

HEADS = ("preset", "rank / alpha", "lr", "batch, updates", "teacher", "seen, or time")


def settings(
    section: Annotated[
        str,
        typer.Argument(
            help="A section such as train, an objective such as ct, or a key such as train.steps; default: all.",
            autocompletion=setting_names_with,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the settings of a run: key, default, what it may be, what it does.

    Example: pcm settings train
    """
    from ..config.reference import settings as rows_of_all

    rows = list(rows_of_all())
    chosen = rows if section is None else _chosen(rows, section.removesuffix("="))
    answer([asdict(row) for row in chosen], as_json, "\n".join(map(_paragraph, chosen)))


def presets(
    name: Annotated[
        str,
        typer.Argument(help="One to tell all of, or the beginning of several.", autocompletion=preset_names_with),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the presets: what each trains, on how much, and with its name where its numbers come from.

    Example: pcm presets sd15-4step
    """
    from ..config.reference import presets as rows_of_all

    rows = {preset: row for preset, row in rows_of_all().items() if preset.startswith(name or "")}
    if not rows:
        near = difflib.get_close_matches(name, preset_names_with(""), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"No preset begins with {name!r}.{hint} `pcm presets` lists all.")
    cells = {preset: (preset, row.weights, row.lr, row.batch, row.teacher, row.cost) for preset, row in rows.items()}
    widths = [max(map(len, column)) for column in zip(HEADS, *cells.values(), strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [HEADS, *cells.values()]
    ]
    sources = dict.fromkeys(row.source for row in rows.values()) if name else ()
    answer({preset: asdict(row) for preset, row in rows.items()}, as_json, "\n".join([*lines, *sources]))


def _chosen(rows: list[SettingRow], word: str) -> list[SettingRow]:
    """The settings of a section, of an objective, or of a key. Raises ValueError where there are none."""
    chosen = [
        row
        for row in rows
        if row.key == word or row.key.startswith(f"{word}.") or row.objectives is not None and word in row.objectives
    ]
    if not chosen:
        known = list(dict.fromkeys([row.key.partition(".")[0] for row in rows] + [row.key for row in rows]))
        near = difflib.get_close_matches(word, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        parts = dict.fromkeys(row.key.partition(".")[0] for row in rows)
        raise ValueError(f"No section or setting is called {word!r}.{hint} Available: {', '.join(parts)}.")
    return chosen


def _paragraph(row: SettingRow) -> str:
    """A setting in words, without the backticks."""
    kind = f"{row.type}, {row.bounds}" if row.bounds else row.type
    having = f" (objective {', '.join(row.objectives)})" if row.objectives is not None else ""
    default = f" = {row.default}" if row.default else ""
    return f"{row.key}{default}{having}\n    {kind}\n    {row.description}\n".replace("`", "")
