"""What the shell completes, once `pcm --install-completion` has been run: presets, and settings by their dotted key."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import shorten

from ..config.presets import PRESETS

LONGEST = 70  # characters of a setting's description


def preset_names_with(incomplete: str) -> list[str]:
    """The presets whose names begin so."""
    return [name for name in PRESETS if name.startswith(incomplete)]


def setting_names_with(incomplete: str) -> list[tuple[str, str]]:
    """(key with its equals sign, description) of each setting whose dotted key begins so."""
    return [
        (f"{key}=", shorten(description, LONGEST, placeholder=" ..."))  # shells take one line
        for key, description in _settings()
        if key.startswith(incomplete)
    ]


def _settings() -> Iterator[tuple[str, str]]:
    """Every setting once; those of the objectives are of all of them."""
    from ..config.config import Config  # imports torch
    from ..objectives import OBJECTIVES

    for name, field in Config.model_fields.items():
        if name == "objective":
            rows = [row.model_fields for row in OBJECTIVES.values()]
            section = {key: setting for row in rows for key, setting in row.items()}
        else:
            section = getattr(field.annotation, "model_fields", None)
        if section is None:
            yield name, field.description or ""
            continue
        for key, setting in section.items():
            yield f"{name}.{key}", setting.description or ""
