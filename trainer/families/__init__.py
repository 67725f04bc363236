"""Model families: what differs between SD1.5, SDXL and SD3. Everything else in the trainer is family-blind."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from ..tiny.bundled import bundled_folder
from .base import Base, BaseFacts, Condition
from .detection import family_of
from .loading import check_finite, is_hub_id
from .pixels import Pixels
from .sd3 import SD3
from .sd15 import SD15
from .sdxl import SDXL

FAMILIES: dict[str, type[Base]] = {"sd15": SD15, "sdxl": SDXL, "sd3": SD3, "pixels": Pixels}

__all__ = [
    "FAMILIES",
    "Base",
    "BaseFacts",
    "Condition",
    "family_class",
    "family_of",
    "load_base",
    "look_at_base",
]


def load_base(path: str, *, family: str | None = None, **options) -> Base:
    """Load a base from a diffusers folder, a single .safetensors file, a hub id, or a bundled tiny one.

    family: default: found from the base. options: those of the family's `load`; None leaves one out.
    Raises ValueError for an unknown family, one that the base is not of, options that the family has not, and
    weights that are not finite; and the family's own errors.
    """
    kind = family_class(path, family)
    base = kind.load(str(bundled_folder(path) or path), **_known(kind, options))
    base.path = path  # as the user said it, not the bundled folder's place on this machine
    check_finite(path, [base.network, *([base.vae] if base.vae else []), *base.text_encoders])
    return base


def look_at_base(path: str, *, family: str | None = None, **options) -> BaseFacts:
    """The facts of the base that `load_base` would load, as far as they are known without reading a weight.

    See `Base.look`. Raises as `load_base` does, for all that can be known so early. For a hub id the family must
    be given.
    """
    here = bundled_folder(path)
    if family and here is None and is_hub_id(path):
        if family not in FAMILIES:
            raise ValueError(f"Unknown base.family {family!r}; available: {', '.join(FAMILIES)}.")
        kind = FAMILIES[family]
    else:
        kind = family_class(path, family)
    return replace(kind.look(str(here or path), **_known(kind, options)), path=path)


def _known(kind: type[Base], options: dict[str, Any]) -> dict[str, Any]:
    """The options that are not None. Raises ValueError for one that the family has not."""
    options = {name: value for name, value in options.items() if value is not None}
    known = inspect.signature(kind.load).parameters
    if strange := [name for name in options if name not in known]:
        raise ValueError(f"base.{strange[0]} is not for {kind.title}. Leave it out.")
    return options


def family_class(path: str, family: str | None = None) -> type[Base]:
    """The class of a base's family, found from the base; nothing is loaded.

    Raises ValueError for an unknown family, or one that the base is not of.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"Unknown base.family {family!r}; available: {', '.join(FAMILIES)}.")
    return FAMILIES[family_of(path, family)]
