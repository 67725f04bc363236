"""Texts of others, such as a library's message or a name in a file, made fit to be shown."""

from __future__ import annotations

LONGEST = 200  # characters; a file may decide the length of what is said of it


def brief(error: Exception) -> str:
    """The message of an error on one line; the error's kind where it has none."""
    return " ".join(str(error).split())[:LONGEST] or type(error).__name__


def printable(text: str, longest: int = LONGEST) -> str:
    """At most so many characters on one line, none of which moves a cursor or turns the reading direction."""
    text = text if len(text) <= longest else text[: longest - 3] + "..."
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)
