"""Folders of pictures: which files are data, and the captions of each."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..tiny.digits import Digit
from .buckets import Buckets
from .captions import METADATA, TEXTS, Table, TextFiles, is_table, read_tables, read_text
from .decoding import has_strange_profile, load_picture
from .listing import Listing, is_picture, kinds_sentence, list_files
from .reading import stop_or_skip


@dataclass(frozen=True)
class Picture:
    """A picture file and its caption; several captions are a line each."""

    path: Path
    caption: str

    @property
    def name(self) -> str:
        return self.path.name

    def load(self, size: int | Buckets) -> tuple[Tensor, Tensor]:
        """The picture as `load_picture` gives it."""
        return load_picture(self.path, size)

    def has_strange_profile(self) -> bool:
        """Whether its colour profile counts for nothing."""
        return has_strange_profile(self.path)


class Folder(NamedTuple):
    """A folder's pictures with captions; a line for each that is left out; sentences on what else is there."""

    pictures: list[Picture] | list[Digit]
    skipped: list[str]
    notes: list[str]


def find_pictures(folder: str, skip_bad: bool, apart: Iterable[Path] = ()) -> Folder:
    """The pictures below a folder with their captions.

    A caption is in a text file of the picture's name (a.txt, a.caption, a.cap, a.png.txt), or in a table in the
    picture's folder or one above it: metadata.jsonl, {"file_name": ..., "text": ...} a line, or metadata.csv.
    apart: files and folders that are never data. Raises ValueError for a missing or empty folder, and for missing,
    empty or double captions and what is no picture unless `skip_bad`.
    """
    root = Path(folder)
    if root.is_file():
        raise ValueError(f"{folder} is a file, and data.images is a folder of pictures; a .tar goes into data.shards.")
    if not root.is_dir():
        raise ValueError(f"No folder at {folder}. Set data.images to a folder of pictures with .txt captions.")
    listing = list_files(root, apart)
    files = [file for file in listing.files if is_picture(file)]
    texts, table = TextFiles(listing.files), read_tables(listing, files)

    pictures, lacking, said = [], [], set()
    for file in files:
        captions, problem = _captions(file, texts, table)
        if captions:
            pictures.append(Picture(file, "\n".join(captions)))
            continue
        if not problem and file in table.problems:
            where, what = table.problems[file]
            problem = f"{where}: {what}"
            said.add(problem)
        lacking.append(f"{listing.name(file)}: {problem or _no_caption(file)}")
    lines = [line for line in table.bad if line not in said]

    others = set(listing.files) - set(files) - texts.used
    other_kinds = kinds_sentence(file for file in listing.files if file in others and not is_table(file))
    if not files and not listing.bad:
        raise ValueError(_no_pictures(folder, listing, other_kinds))
    count, bad = len(files) + len(listing.bad), [*listing.bad, *lines, *lacking]
    where = f"{other_kinds}; captions are read from {', '.join(TEXTS)} and {', '.join(METADATA)}"
    what = _in_numbers(folder, count, len(lacking), len(listing.bad), len(lines))
    stop_or_skip(bad, skip_bad, what, where if lacking and other_kinds else "")
    if not pictures:
        raise ValueError(
            f"None of the {count} pictures in {folder} has a caption (same name, {', '.join(TEXTS)}; or a line in "
            f"{' or '.join(METADATA)})." + (f" {other_kinds}." if other_kinds else "")
        )
    return Folder(pictures, bad, [other_kinds] if other_kinds else [])


def _captions(file: Path, texts: TextFiles, table: Table) -> tuple[list[str], str]:
    """A picture's captions, and what is wrong where there are none; "" where nothing is there that could be one."""
    beside = texts.beside(file)
    line = table.captions.get(file)
    names = [text.name for text in beside] + ([line[1]] if line else [])
    if len(names) > 1:
        return [], f"captions in both {names[0]} and {names[1]}"
    if line:
        return line[0], ""
    if not beside:
        return [], ""
    try:
        captions = read_text(beside[0].read_bytes())
    except OSError as error:
        return [], f"{names[0]} cannot be read ({error.strerror})"
    if captions is None:
        return [], f"not UTF-8: {names[0]}"
    return captions, "" if captions else f"empty caption {names[0]}"


def _no_caption(picture: Path) -> str:
    """Why a picture has no caption beside it, as it is said of it."""
    text = picture.with_suffix(TEXTS[0])
    if os.path.lexists(text):
        return f"{text.name} is no file" + (", but a link that leads nowhere" if text.is_symlink() else "")
    return f"no caption {text.name}"


def _in_numbers(folder: str, count: int, lacking: int, unusable: int, lines: int) -> str:
    """How many of a folder's `count` pictures lack a caption, how many are none, and how many lines are wrong."""
    which = f" of the {count} pictures in {folder}"
    parts = []
    if lacking:
        parts.append(f"{lacking}{which} lack a good caption")
    if unusable:
        parts.append(f"{unusable}{'' if parts else which} cannot be used")
    if lines:
        place = "" if parts else f" in {folder}"
        parts.append(f"{lines} line{'s' * (lines > 1)} of metadata{place} {'are' if lines > 1 else 'is'} wrong")
    return ", ".join(parts)


def _no_pictures(folder: str, listing: Listing, other_kinds: str) -> str:
    """Why a folder holds no pictures."""
    sentence = f"{folder} holds no pictures that can be read (.png, .jpg, .webp, .bmp, .gif, .tif, .avif)"
    hidden = [f"{listing.hidden} are hidden or the system's, which are never data"] if listing.hidden else []
    return "; ".join([sentence, *hidden, *([other_kinds] if other_kinds else [])]) + "."
