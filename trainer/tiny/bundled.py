"""The tiny bases that ship with the pack: where they are, and the prompts in their language."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...samplers.emoji_words import parse

EMOJI = "tiny-emoji"  # the base with a language of things, whose other words mean nothing to it
LEAST = 64  # pixels of a side that it draws; the most that it draws is its network's to tell
BUNDLED = ("tiny-sd15", "tiny-sdxl", EMOJI)


def own_prompts(base: str) -> str | None:
    """The prompt file of a bundled tiny base, which knows other words than the default list; None for other bases."""
    folder = bundled_folder(base)
    return str(folder / "prompts.txt") if folder else None


def bundled_folder(path: str) -> Path | None:
    """The folder of a tiny base that ships with the pack ("tiny-sd15"), or None for any other path.

    Raises ValueError for one that this installation lacks.
    """
    if path not in BUNDLED:
        return None
    folder = Path(__file__).parent / path.removeprefix("tiny-")
    if not folder.is_dir():
        raise ValueError(
            f"{path} is not in this installation: what ComfyUI's registry hands out leaves it out. Get the pack by git "
            'clone, or by pip install "phased-consistency[train]".'
        )
    return folder


def check_side(base: str, side: int) -> None:
    """Raise ValueError for pictures that are too small for the emoji base to draw what one would know."""
    if base == EMOJI and side < LEAST:
        raise ValueError(f"{base} draws {LEAST} to 256 pixels a side, and best at 128; {side} is not one of those.")


def check_words(base: str, prompts: Iterable[str]) -> None:
    """Raise ValueError, with the nearest words, for a prompt of the emoji base that says what it does not know."""
    if base == EMOJI:
        for prompt in prompts:
            parse(prompt)
