"""Wildcards in prompt files: `{a|b|c}` takes one of several, `__name__` a line of the file name.txt beside it."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache
from itertools import cycle, islice
from pathlib import Path

from .captions import lines_of

CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")  # the innermost
FILE = re.compile(r"__([\w-]+(?:/[\w-]+)*)__")
DEEPEST = 100  # replacements in one prompt


def has_wildcards(prompts: Sequence[str]) -> bool:
    return any(CHOICE.search(prompt) or FILE.search(prompt) for prompt in prompts)


def expanded(prompts: Sequence[str], number: int, folder: Path) -> list[str]:
    """`number` prompts: the lines in turn, each time with its wildcards replaced anew.

    folder: where the wildcards' files are. What is taken belongs to the prompt's place in the list alone.
    Raises ValueError for a wildcard without a file, and for files that lead to each other without an end.
    """
    lines = _Lines(folder)
    turns = islice(cycle(prompts), number)
    return [_replaced(prompt, random.Random(f"wildcards {place}"), lines) for place, prompt in enumerate(turns)]


class _Lines:
    """The lines of the wildcards' files in a folder, each read once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.of = cache(self._read)

    def _read(self, name: str) -> list[str]:
        path = self.folder / f"{name}.txt"
        if not path.is_file():
            there = sorted(file.stem for file in self.folder.glob("*.txt"))
            raise ValueError(
                f"The prompt file has the wildcard __{name}__, and there is no {path}. Files beside it: "
                f"{', '.join(there[:10]) or 'none'}."
            )
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        options = [line for line in lines_of(text) if not line.startswith("#")]
        if not options:
            raise ValueError(f"The wildcard's file {path} holds no lines. Write one a line.")
        return options


def _replaced(prompt: str, rng: random.Random, lines: _Lines) -> str:
    """The prompt without wildcards, in one line."""
    text = prompt
    for _ in range(DEEPEST):
        if match := FILE.search(text):
            options = lines.of(match[1])
        elif match := CHOICE.search(text):
            options = match[1].split("|")
        else:
            return " ".join(text.split())
        text = text[: match.start()] + rng.choice(options).strip() + text[match.end() :]
    raise ValueError(f"The wildcards of the prompt {prompt[:80]!r} lead to each other without an end.")
