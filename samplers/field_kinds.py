"""What the fields of a recipe may hold, by their annotations: a header is JSON, which has other types, and NaN."""

from __future__ import annotations

from typing import Any

# a field's annotation -> what it may be; a bool is no number
KINDS = {"str": str, "bool": bool, "int": int, "float": (int, float), "int | None": (int, type(None))}
KINDS |= {"float | None": (int, float, type(None))}
LISTS = ("Numbers | None", "Pairs | None")  # annotations of fields that hold rows
Numbers = tuple[float, ...]
Pairs = tuple[Numbers, ...]  # of two numbers each
GREATEST = 1e6  # a number in a recipe is less
LONGEST = 1000  # characters of a text in a recipe
MOST = 100  # numbers in a row


def wrong_kind(name: str, value: object, kind: str) -> str | None:
    """The fault in a field's value by its annotation, as a clause, or None."""
    if kind in LISTS:
        return _wrong_row(name, value, kind)
    if not isinstance(value, KINDS[kind]) or isinstance(value, bool) != (kind == "bool"):
        return f"{name} is {value!r:.60}; expected {kind.replace(' | ', ' or ')}"
    if kind.startswith("float") and value is not None and abs(value) >= GREATEST:
        return f"{name} is {value!r:.60}; expected a number of less than {GREATEST:g}"
    if kind == "str" and len(value) > LONGEST:
        return f"{name} has {len(value)} characters; expected at most {LONGEST}"
    return None


def frozen(value: Any) -> Any:
    """A list, as JSON has it, as a tuple, and so are those in it; any other value as it is."""
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def _wrong_row(name: str, value: object, kind: str) -> str | None:
    """As `wrong_kind` for a row of numbers, or of pairs of them."""
    if value is None:
        return None
    rows = value if kind.startswith("Pairs") else (value,)
    is_row = isinstance(value, tuple) and all(isinstance(row, tuple) for row in rows)
    if is_row and sum(map(len, rows)) <= MOST and not any(_no_number(each) for row in rows for each in row):
        pairs = kind.startswith("Numbers") or all(len(row) == 2 for row in rows)
        if value and pairs:
            return None
    expected = "a list of numbers" if kind.startswith("Numbers") else "a list of pairs of numbers"
    return f"{name} is {value!r:.60}; expected {expected}, {MOST} at most"


def _no_number(value: object) -> bool:
    return wrong_kind("", value, "float") is not None or value != value  # NaN
