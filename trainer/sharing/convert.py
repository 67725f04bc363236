"""`pcm convert`: a LoRA file in another key style."""

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
    """Write a LoRA of any published key style in kohya's or diffusers' (`STYLES`).

    Weights stay bit for bit and the error is 0. The one exception is SD3 in diffusers' style, where an alpha
    unlike the rank is worked into the weights (`write_lora`). Metadata stays; a known public file takes its
    recipe along. family, alpha: see `read_lora`. Returns figures, and a sentence on them as "text".
    Raises ValueError for another style, and what `read_lora`, `check_out` and `write_lora` raise.
    """
    if to not in STYLES:
        raise ValueError(f"--to is {to!r}; available: {', '.join(STYLES)}.")
    check_out(out, [source], overwrite)
    lora = read_lora(source, family, alpha)
    # a recipe from the header is in the metadata, and stays with them
    known = lora.recipe if lora.recipe and lora.recipe.source != "header" else None
    worked_in = write_lora(out, lora.family, lora.pairs, lora.metadata, known, to)

    figures, remark = {"error": 0.0}, ""
    if worked_in:
        figures = errors({name: [pair] for name, pair in lora.pairs.items()}, settled(lora.pairs, lora.family))
        remark = f"; alpha worked into the weights of {worked_in}, {error_text(figures)}"
    return figures | {
        "out": str(out),
        "style": to,
        "family": lora.family.name,
        "modules": len(lora.pairs),
        "alpha": lora.alpha_source,
        "alpha_worked_in": worked_in,
        "recipe_from": lora.recipe and lora.recipe.source,
        "text": f"{out}: {lora.family.title}, {len(lora.pairs)} modules in the {to} style; alpha: {lora.alpha_source}"
        f"{remark}{lora.remark()}",
    }
