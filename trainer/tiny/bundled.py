"""The tiny bases that ship with the pack: where they are, and the prompts in their language."""

from __future__ import annotations

from pathlib import Path


def own_prompts(base: str) -> str | None:
    """The prompt file of a bundled tiny base, which knows other words than the default list; None for other bases."""
    folder = bundled_folder(base)
    return str(folder / "prompts.txt") if folder else None


def bundled_folder(path: str) -> Path | None:
    """The folder of a tiny base that ships with the pack ("tiny-sd15"), or None for any other path."""
    folder = Path(__file__).parent / path.removeprefix("tiny-")
    return folder if path.startswith("tiny-") and folder.is_dir() else None
