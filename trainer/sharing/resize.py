"""`pcm resize`: a LoRA of lower rank."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..lora.pair import Pair
from .factors import approximated, error_text, errors, rank_for_error, rounded, widest
from .merge import check_rank
from .pairs import check_out, settled, write_lora
from .read import read_lora


def resize(
    source: Path,
    out: Path,
    *,
    rank: int | None = None,
    error: float | None = None,
    family: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a LoRA's best approximation of lower rank (`approximated`).

    rank: at most this in every module; those at or below it stay bit for bit. error: instead, in every module
    the least rank with a relative error (Frobenius) of at most this, before rounding to the file's precision.
    Returns figures, and a sentence on them as "text"; the errors are those of the tensors as they were
    written.
    Raises ValueError for none or both of these, a rank that no module is above, an error that is not between
    0 and 1, and what `read_lora`, `check_out` and `write_lora` raise.
    """
    if (rank is None) == (error is None):
        raise ValueError("Give one of --rank and --error.")
    if error is not None and not 0 < error < 1:
        raise ValueError(f"--error is {error:g}; expected a share between 0 and 1, such as 0.1.")
    check_out(out, [source], overwrite)
    lora = read_lora(source, family)
    if rank is not None:
        check_rank(rank, lora.pairs)

    smaller: dict[str, Pair] = {}
    for name, pair in lora.pairs.items():
        choose = (lambda _: rank) if error is None else (lambda values: rank_for_error(values, error))
        candidate = pair if rank and pair.rank <= rank else approximated(pair, choose)
        smaller[name] = candidate if candidate.rank < pair.rank else pair
    alpha = Counter(pair.alpha for pair in lora.pairs.values()).most_common(1)[0][0]
    smaller = settled(smaller, lora.family, alpha)
    smaller = {name: rounded(pair, widest([lora.pairs[name]])) for name, pair in smaller.items()}

    recipe = lora.recipe if lora.recipe and lora.recipe.source != "header" else None
    write_lora(out, lora.family, smaller, lora.metadata | {"ss_output_name": out.stem}, recipe)
    figures = errors({name: [pair] for name, pair in lora.pairs.items()}, smaller)
    before = [pair.rank for pair in lora.pairs.values()]
    after = [pair.rank for pair in smaller.values()]
    text = (
        f"{out}: {len(smaller)} modules, ranks up to {max(before)} to ranks up to {max(after)}, {sum(before)} to "
        f"{sum(after)} in all; {error_text(figures)}"
    )
    sizes = {"rank_before": max(before), "rank": max(after), "ranks_before": sum(before), "ranks": sum(after)}
    return {
        "out": str(out),
        "family": lora.family.name,
        "modules": len(smaller),
        **sizes,
        **figures,
        "text": text + lora.remark(),
    }
