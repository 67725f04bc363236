"""What lies below a folder of pictures: every file that may be data, and what is passed over for its name or place."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ...samplers.texts import printable
from ..pictures import READERS, SUFFIXES, readable_kinds

# Folders that systems and programs make beside people's files: macOS in archives, Synology, QNAP and Windows on disks.
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information"}


@dataclass
class Listing:
    """The files below a folder, in the order of their names.

    bad: a line for each entry that is called like a picture and is none, and for each folder that cannot be opened.
    hidden: how many pictures' names are hidden, or the system's.
    """

    root: Path
    files: list[Path] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    hidden: int = 0

    def name(self, path: Path) -> str:
        """A path below the folder, for people."""
        return printable(str(path.relative_to(self.root)))

    def add_bad(self, path: Path, problem: str) -> None:
        self.bad.append(f"{self.name(path)}: {problem}")


def list_files(root: Path, apart: Iterable[Path] = ()) -> Listing:
    """The files below a folder, also those behind links.

    apart: files and folders that are never data. Hidden entries, whose names begin with a dot, are passed over, as
    are `SYSTEM_FOLDERS`, and links back to a folder that they are in.
    """
    listing, apart = Listing(root), {path.resolve() for path in apart}
    _visit(listing, root, {root.resolve()}, apart)
    listing.files.sort(key=lambda file: (*map(one_form, file.relative_to(root).parts), file.name))
    return listing


def _visit(listing: Listing, folder: Path, above: set[Path], apart: Collection[Path]) -> None:
    """Add the files of a folder and those below it. above: this folder and those that it is in, without links."""
    names = {path.name for path in apart}
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        listing.add_bad(folder, f"cannot be opened ({error.strerror})")
        return

    for entry in entries:
        path = folder / entry.name
        like_a_picture = path.suffix.lower() in SUFFIXES
        if is_systems(entry.name):
            listing.hidden += like_a_picture
        elif _is(entry.is_dir):
            real = path.resolve()
            if real in above or real in apart:
                continue
            if like_a_picture:
                listing.add_bad(path, "a folder that is called like a picture: rename it")
            else:
                _visit(listing, path, above | {real}, apart)
        elif _is(entry.is_file):
            if entry.name not in names or path.resolve() not in apart:
                listing.files.append(path)
        elif like_a_picture:
            listing.add_bad(path, "a link that leads nowhere" if entry.is_symlink() else "no file")


def _is(test: Callable[[], bool]) -> bool:
    """What a directory entry's test says; False for a link that leads to itself."""
    try:
        return test()
    except OSError:
        return False


def is_systems(name: str) -> bool:
    """Whether a part of a path is hidden, or a system's own: never data."""
    return name in SYSTEM_FOLDERS or (name.startswith(".") and name != "..")


def one_form(name: str) -> str:
    """A name in the one form in which names are compared: an é may be one character or two (macOS)."""
    return unicodedata.normalize("NFC", name)


def is_picture(path: Path) -> bool:
    """Whether a file is called like a picture of a kind that can be read here."""
    return SUFFIXES.get(path.suffix.lower()) in readable_kinds()


def kinds_sentence(files: Iterable[Path]) -> str:
    """How many files of which kinds these are, none of which is read, and what would read them; "" for none."""
    kinds = Counter(path.suffix.lower() or "without a suffix" for path in files)
    if not kinds:
        return ""
    named = ", ".join(
        f"{count} {printable(kind)}" for kind, count in sorted(kinds.items(), key=lambda k: (-k[1], k[0]))
    )
    readers = {READERS[SUFFIXES[kind]]: kind for kind in sorted(kinds) if SUFFIXES.get(kind) in READERS}
    advice = "".join(f"; {kind} is read after {command}" for command, kind in readers.items())
    which = "1 file of another kind is" if kinds.total() == 1 else f"{kinds.total()} files of other kinds are"
    return f"{which} not used: {named}{advice}"
