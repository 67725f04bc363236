"""A LoRA file in another key style, as `pcm convert` makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .factors import error_text, errors
from .pairs import STYLES, check_out, settled, write_lora
from .read import read_lora


def convert(
    source: Path,
    out: Path,
    to: str,
    *,
    family: str | None = None,
    alpha: float | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a LoRA of any published key style in kohya's or diffusers' (`STYLES`); returns what was done.

    Weights stay bit for bit and the error is 0, but for SD3's in diffusers' style with an alpha unlike the rank
    (`write_lora`). Metadata stays; a known public file takes its recipe along. family, alpha: see `read_lora`.
    Raises ValueError for another style, and what `read_lora`, `check_out` and `write_lora` raise.
    """
    if to not in STYLES:
        raise ValueError(f"--to is {to!r}; available: {', '.join(STYLES)}.")
    check_out(out, [source], overwrite)
    lora = read_lora(source, family, alpha)
    known = lora.recipe if lora.recipe and lora.recipe.source != "header" else None
    worked_in = write_lora(out, lora.family, lora.pairs, lora.metadata, known, to)
    told, baked = {"error": 0.0}, ""
    if worked_in:
        told = errors({name: [pair] for name, pair in lora.pairs.items()}, settled(lora.pairs, lora.family))
        baked = f"; alpha worked into the weights of {worked_in}, {error_text(told)}"
    return told | {
        "out": str(out),
        "style": to,
        "family": lora.family.name,
        "modules": len(lora.pairs),
        "alpha": lora.alpha_told,
        "alpha_worked_in": worked_in,
        "recipe_from": lora.recipe and lora.recipe.source,
        "text": f"{out}: {lora.family.title}, {len(lora.pairs)} modules in the {to} style; alpha: {lora.alpha_told}"
        f"{baked}",
    }
