"""Model families: what differs between SD1.5, SDXL and SD3. Everything else in the trainer is family-blind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .sd15 import SD15

FAMILIES: dict[str, Callable[..., SD15]] = {"sd15": SD15.load}


def load_base(path: str, *, family: str = "sd15", **options) -> SD15:
    """Load a base of this family from a diffusers folder, a single .safetensors file, a hub id, or a bundled tiny one.

    Raises ValueError for an unknown family, and the family's own errors.
    """
    if family not in FAMILIES:
        raise ValueError(f"Unknown base.family {family!r}; available: {', '.join(FAMILIES)}.")
    base = FAMILIES[family](str(bundled_folder(path) or path), **options)
    base.path = path
    return base


def bundled_folder(path: str) -> Path | None:
    """The folder of a tiny base that ships with the pack ("tiny-sd15"), or None for any other path."""
    folder = Path(__file__).parent.parent / "tiny" / path.removeprefix("tiny-")
    return folder if path.startswith("tiny-") and folder.is_dir() else None
