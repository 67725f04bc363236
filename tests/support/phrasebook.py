"""The table of what nodes say in other languages, read as nodes/web/phrasebook.js reads it, for tests with no browser.

tests/web/test_words.py holds the two to the same translations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TABLE = Path(__file__).parents[2] / "nodes" / "web" / "words.json"
LANGUAGES = ("zh", "zh-TW", "ja", "ko")
FIELD = re.compile(r"\{(\w+)\}")
NUMBER = r"-?(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|inf|nan)"
ANY = "{text}"
Rows = dict[str, dict[str, str]]


@cache
def table() -> dict[str, dict]:
    """phrases by their groups, sentences, choices, notes, titles: of each English text one translation a language."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def rows() -> Iterator[tuple[str, dict[str, str]]]:
    """Every English text of the table, and its translations."""
    parts = (table()[part] for part in ("sentences", "choices", "notes", "titles"))
    for group in (*table()["phrases"].values(), *parts):
        yield from group.items()


def kind_of(field: str) -> str:
    return re.sub(r"(?<=\D)\d+$", "", field)


def letters(template: str) -> int:
    return len(FIELD.sub("", template))


class Phrasebook:
    """The table for one language."""

    def __init__(self, language: str):
        self.language = language
        self.groups = table()["phrases"]
        self.phrases = {group: self._compiled(rows) for group, rows in self.groups.items()}
        self.sentences = self._compiled(table()["sentences"])
        self.notes = self._compiled(table()["notes"])
        self.titles = self._compiled(table()["titles"])

    def _compiled(self, rows: Rows) -> list[tuple[re.Pattern, list[str], str]]:
        ordered = sorted(rows, key=letters, reverse=True)
        return [
            (re.compile(self._pattern(text, "({})")), FIELD.findall(text), rows[text][self.language])
            for text in ordered
        ]

    def _pattern(self, template: str, group: str) -> str:
        parts = FIELD.split(template)
        patterns = [group.format(self._field(part)) if i % 2 else re.escape(part) for i, part in enumerate(parts)]
        return "".join(patterns)

    def _field(self, field: str) -> str:
        kind = kind_of(field)
        if kind.isdigit():
            return NUMBER
        if kind == "word":
            return r"\S+?"
        rows = self.groups.get(kind)
        if rows is None or ANY in rows:
            return ".*?"
        return "|".join(self._pattern(text, "(?:{})") for text in sorted(rows, key=letters, reverse=True))

    def matches(self, text: str) -> list[str]:
        """The translations of the sentences whose form a text has, in the order in which they are tried."""
        return [self._filled(*row) for row in self._matching(text, self.sentences)]

    def translated(self, text: str, rows: list) -> str | None:
        """By the first template that fits; None where there is none."""
        return next((self._filled(*row) for row in self._matching(text, rows)), None)

    @staticmethod
    def _matching(text: str, rows: list) -> Iterator[tuple[re.Match, list[str], str]]:
        return ((match, fields, to) for pattern, fields, to in rows if (match := pattern.fullmatch(text)))

    def _filled(self, match: re.Match, fields: list[str], translation: str) -> str:
        return FIELD.sub(lambda field: self._part(field[1], match[1 + fields.index(field[1])]), translation)

    def _part(self, field: str, text: str) -> str:
        kind = kind_of(field)
        rows = self.sentences if kind == "sentence" else self.phrases.get(kind, [])
        translation = self.translated(text, rows)
        return text if translation is None else translation

    def line(self, text: str) -> str:
        """A line on a node."""
        mark, rest = re.fullmatch(r"(⚠ )?(.*)", text).groups(default="")
        error, sentence = re.fullmatch(r"([\w.]+: )?(.*)", rest).groups(default="")
        whole = self.translated(rest, self.sentences)
        if whole is None:
            known = self.translated(sentence, self.sentences)
            whole = error + (sentence if known is None else known)
        return mark + whole

    def note(self, text: str) -> str | None:
        """A note of a template; None where one of its lines is not in the table."""
        lines = [line and self.translated(line, self.notes) for line in text.split("\n")]
        return None if None in lines else "\n".join(lines)

    def title(self, text: str) -> str | None:
        """A title of a template's node or group; None where it is not in the table."""
        return self.translated(text, self.titles)
