"""Captions, in text files beside the pictures or in a table of the folder; which of a picture's several is taken."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...samplers.texts import brief, printable
from .listing import Listing, one_form
from .tags import Tags

TEXTS = (".txt", ".caption", ".cap")  # of text files beside pictures
METADATA = ("metadata.jsonl", "metadata.csv")
# What tables call the columns; the first that is there counts.
FILE_KEYS = ("file_name", "filename", "file", "file_path", "filepath", "image", "image_path", "image_file", "path")
TEXT_KEYS = ("text", "caption", "captions", "texts", "prompt", "prompts", "description")
LINE = 'not {"file_name": "...", "text": "..."}'
DELIMITERS = ",;\t"


class TableLine(NamedTuple):
    """A line of a table. where: the table and the line. name: of the picture, or None. captions, or the problem."""

    where: str
    name: str | None
    captions: list[str]
    problem: str = ""


@dataclass
class Table:
    """What the tables of a folder say.

    captions: by picture, with the table's name. bad: a line for each line without one. problems: by picture, where one
    of these is and what is wrong there.
    """

    captions: dict[Path, tuple[list[str], str]] = field(default_factory=dict)
    problems: dict[Path, tuple[str, str]] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)


def chosen(captions: str, choice: str, tags: Tags | None = None) -> list[str]:
    """Which of a picture's captions, a line each, a run takes by its setting `data.captions`, with the variants of each
    where these are captions of tags."""
    lines = captions.split("\n")
    lines = lines[:1] if choice == "first" else [" ".join(lines)] if choice == "joined" else lines
    return lines if tags is None else list(dict.fromkeys(v for line in lines for v in tags.varied(line)))


def lines_of(text: str) -> list[str]:
    """The lines of a text that hold something. Only "\\n" ends a line: other characters that may stand in texts."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def captions_in(value: Any) -> list[str] | None:
    """The captions that a table's or a JSON file's value is, a text or a list of them; None for anything else."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) and is_text(text) for text in values):
        return None
    # a line break within one of several captions would make two of it
    return lines_of(value) if isinstance(value, str) else [" ".join(lines_of(text)) for text in values if text.strip()]


def is_text(caption: str) -> bool:
    """Whether this can be a caption: UTF-16 read as UTF-8 has zeros, and JSON may hold halves of characters."""
    return "\0" not in caption and not any("\ud800" <= c <= "\udfff" for c in caption)


def text_in(row: dict[str, Any]) -> Any:
    """The value of the first of `TEXT_KEYS` in a JSON object; None where there is none."""
    return next((row[key] for key in TEXT_KEYS if row.get(key) is not None), None)


def read_text(content: bytes) -> list[str] | None:
    """The captions in a text file; None where it is not UTF-8."""
    try:
        return captions_in(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return None


class TextFiles:
    """The text files of a listing by the pictures that they may belong to; `used` are those that do."""

    def __init__(self, files: Iterable[Path]):
        self._files: dict[str, list[Path]] = defaultdict(list)
        self.used: set[Path] = set()
        for file in files:
            if file.suffix.lower() in TEXTS:
                self._files[one_form(str(file.with_suffix("")))].append(file)

    def beside(self, picture: Path) -> list[Path]:
        """The text files of a picture: a.txt or a.png.txt of a.png, and the like."""
        names = (picture.with_suffix(""), picture)
        files = [file for name in names for file in self._files.get(one_form(str(name)), ())]
        self.used.update(files)
        return files


def is_table(path: Path) -> bool:
    """Whether a file is a table of captions."""
    return path.name.lower() in METADATA


def read_tables(listing: Listing, pictures: Iterable[Path]) -> Table:
    """What the tables among the files say of these pictures."""
    table = Table()
    tables = [path for path in listing.files if is_table(path)]
    if not tables:
        return table
    places = {one_form(os.path.abspath(picture)): picture for picture in pictures}
    here, real = os.path.abspath(listing.root), os.path.realpath(listing.root)

    for path in tables:
        for row in _rows(path, listing.name(path)):
            picture = None if row.name is None else _named(row.name, path.parent, places, here, real)
            if row.name is not None and picture is None:
                table.bad.append(f"{row.where}: no picture {printable(row.name)}")
            elif picture is None:
                table.bad.append(f"{row.where}: {row.problem}")
            elif picture in table.captions or picture in table.problems:
                table.bad.append(f"{row.where}: another caption of {printable(row.name)}")
            elif row.problem:
                table.problems[picture] = row.where, row.problem
                table.bad.append(f"{row.where}: {row.problem}")
            else:
                table.captions[picture] = row.captions, path.name
    return table


def _named(name: str, folder: Path, places: dict[str, Path], here: str, real: str) -> Path | None:
    """The picture that a table in this folder names, also with backslashes, "..", or its whole path.

    here, real: the place of all pictures, with links and without.
    """
    for spelling in (name, name.replace("\\", "/")):
        path = os.path.abspath(folder / spelling)
        inner = here + path[len(real) :] if path.startswith(real + os.sep) else path
        for place in (path, inner):
            if picture := places.get(one_form(place)):
                return picture
    return None


def _rows(path: Path, name: str) -> Iterator[TableLine]:
    """The lines of a table. name: of the table, for people."""
    try:
        content = path.read_bytes()
    except OSError as error:
        yield TableLine(name, None, [], f"cannot be read ({error.strerror})")
        return
    yield from (_csv_rows if path.suffix.lower() == ".csv" else _json_rows)(content, name)


def _json_rows(content: bytes, name: str) -> Iterator[TableLine]:
    """The lines of a JSON-lines file that are not blank."""
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        where = f"{name} line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode())
        except UnicodeDecodeError:
            yield TableLine(where, None, [], "not UTF-8")
        except (ValueError, RecursionError):
            yield TableLine(where, None, [], LINE)
        else:
            yield _row(where, entry if isinstance(entry, dict) else {})


def _csv_rows(content: bytes, name: str) -> Iterator[TableLine]:
    """The lines of a CSV file below its first, which names the columns."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        yield TableLine(name, None, [], "not UTF-8: save it as CSV in UTF-8")
        return
    first = text.split("\n", 1)[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(DELIMITERS, key=first.count), strict=True)
    try:
        columns = [str(column).strip().lower() for column in reader.fieldnames or []]
        if not (set(columns) & set(FILE_KEYS) and set(columns) & set(TEXT_KEYS)):
            problem = (
                f"its first line must name the columns, such as file_name,text; it is {printable(first.strip())!r}"
            )
            yield TableLine(name, None, [], problem)
            return
        reader.fieldnames = columns
        for entry in reader:
            yield _row(f"{name} line {reader.line_num}", entry)
    except csv.Error as error:
        yield TableLine(f"{name} after line {reader.line_num}", None, [], f"not CSV ({brief(error)})")


def _row(where: str, entry: dict[Any, Any]) -> TableLine:
    """A line by its keys."""
    entry = {key.strip().lower(): value for key, value in entry.items() if isinstance(key, str)}
    name = next((entry[key] for key in FILE_KEYS if entry.get(key) is not None), None)
    name = name if isinstance(name, str) and is_text(name) else None
    value = text_in(entry)
    captions = captions_in(value)
    if name is None or captions is None:
        others = sorted(entry.keys() - {*FILE_KEYS, *TEXT_KEYS})
        return TableLine(where, name, [], LINE + (f", but {printable(', '.join(others))}" if others else ""))
    return TableLine(where, name, captions, "" if captions else "empty caption")
