"""Model families: what differs between SD1.5, SDXL and SD3. Everything else in the trainer is family-blind."""

from __future__ import annotations

from .base import Base, Condition, bundled_folder
from .sd15 import SD15

FAMILIES: dict[str, type[Base]] = {"sd15": SD15}

__all__ = ["FAMILIES", "Base", "Condition", "bundled_folder", "load_base"]


def load_base(path: str, *, family: str = "sd15", **options) -> Base:
    """Load a base of this family from a diffusers folder, a single .safetensors file, a hub id, or a bundled tiny one.

    Raises ValueError for an unknown family, and the family's own errors.
    """
    if family not in FAMILIES:
        raise ValueError(f"Unknown base.family {family!r}; available: {', '.join(FAMILIES)}.")
    base = FAMILIES[family].load(str(bundled_folder(path) or path), **options)
    base.path = path
    return base
