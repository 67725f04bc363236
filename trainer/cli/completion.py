"""What the shell completes, once `pcm --install-completion` has been run: presets, and settings by their dotted key."""

from __future__ import annotations

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
        for key, description in _settings().items()
        if key.startswith(incomplete)
    ]


def _settings() -> dict[str, str]:
    """What every setting does, by its dotted key; of one that objectives have in several forms, the last."""
    from ..config.reference import settings  # imports torch

    return {row.key: row.description for row in settings()}
