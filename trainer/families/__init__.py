"""Model families: what differs between SD1.5, SDXL and SD3. Everything else in the trainer is family-blind."""

from __future__ import annotations

import inspect

from ..tiny.bundled import bundled_folder
from .base import Base, Condition
from .detection import family_of
from .loading import check_finite
from .pixels import Pixels
from .sd3 import SD3
from .sd15 import SD15
from .sdxl import SDXL

FAMILIES: dict[str, type[Base]] = {"sd15": SD15, "sdxl": SDXL, "sd3": SD3, "pixels": Pixels}

__all__ = ["FAMILIES", "Base", "Condition", "bundled_folder", "family_class", "family_of", "load_base"]


def load_base(path: str, *, family: str | None = None, **options) -> Base:
    """Load a base from a diffusers folder, a single .safetensors file, a hub id, or a bundled tiny one.

    family: default: found from the base. options: those of the family's `load`; None leaves one out.
    Raises ValueError for an unknown family, one that the base is not of, options that the family has not, and
    weights that are not finite; and the family's own errors.
    """
    kind = family_class(path, family)
    known = inspect.signature(kind.load).parameters
    options = {name: value for name, value in options.items() if value is not None}
    if strange := [name for name in options if name not in known]:
        raise ValueError(f"base.{strange[0]} is not for {kind.title}. Leave it out.")

    base = kind.load(str(bundled_folder(path) or path), **options)
    base.path = path  # as the user said it, not the bundled folder's place on this machine
    check_finite(path, [base.network, *([base.vae] if base.vae else []), *base.text_encoders])
    return base


def family_class(path: str, family: str | None = None) -> type[Base]:
    """The class of a base's family, found from the base; nothing is loaded.

    Raises ValueError for an unknown family, or one that the base is not of.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"Unknown base.family {family!r}; available: {', '.join(FAMILIES)}.")
    return FAMILIES[family_of(path, family)]
