"""`pcm merge`: several LoRAs of one family as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...samplers import Recipe
from ...samplers.recipe import HEADER_KEY
from ..lora.pair import Pair
from .factors import approximated, concatenated, error_text, errors, rounded, widest
from .pairs import MUST, Lora, check_out, settled, write_lora
from .read import read_lora


def merge(
    sources: Sequence[tuple[Path, float | None]],
    out: Path,
    *,
    rank: int | None = None,
    family: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the sum of LoRAs, each times its strength (None: what its recipe wants, else 1).

    The sum is exact, with the ranks side by side, or by SVD of `rank` at most. Metadata in which all agree
    stay, and so does the recipe where all that have one agree, for strength 1. Returns figures, and a
    sentence on them as "text"; the error is that of the tensors as they were written and rounded.
    Raises ValueError for less than two files, other families, shapes that differ, a strength of 0 or a rank
    that changes nothing, and what `read_lora`, `check_out` and `write_lora` raise.
    """
    if len(sources) < 2:
        raise ValueError(f"{len(sources)} LoRA is not merged with anything. Give two or more.")
    check_out(out, [path for path, _ in sources], overwrite)

    loras = [read_lora(path, family) for path, _ in sources]
    first = loras[0]
    if other := next((lora for lora in loras if lora.family is not first.family), None):
        raise ValueError(
            f"{first.path.name} is a LoRA for {first.family.title}, {other.path.name} for {other.family.title}. "
            "Merge those of one family."
        )
    strengths = [_strength(lora, chosen) for lora, (_, chosen) in zip(loras, sources, strict=True)]

    terms = _terms(loras, strengths)
    pairs = {name: concatenated(addends) for name, addends in terms.items()}
    if rank is not None:
        pairs = _lowered(pairs, rank)
    pairs = {name: rounded(pair, widest(terms[name])) for name, pair in settled(pairs, first.family).items()}

    recipe, note = _recipe(loras)
    write_lora(out, first.family, pairs, _metadata(loras, out), recipe)
    figures = errors(terms, pairs)
    text = (
        f"{out}: {first.family.title}, {len(pairs)} modules, ranks up to {max(p.rank for p in pairs.values())}; "
        f"{error_text(figures)}{''.join(lora.remark() for lora in loras)}. {note}"
    )
    merged = [{"file": str(lora.path), "strength": strength} for lora, strength in zip(loras, strengths, strict=True)]
    return {
        "out": str(out),
        "family": first.family.name,
        "modules": len(pairs),
        "merged": merged,
        **figures,
        "text": text,
    }


def _strength(lora: Lora, chosen: float | None) -> float:
    """The strength to merge a LoRA with: as chosen, else its recipe's, else 1. Raises ValueError for 0."""
    strength = chosen if chosen is not None else lora.recipe.strength if lora.recipe else 1.0
    if strength == 0:
        raise ValueError(f"{lora.path.name} has strength 0, which adds nothing. Leave it out.")
    return strength


def _terms(loras: Sequence[Lora], strengths: Sequence[float]) -> dict[str, list[Pair]]:
    """Module -> the pairs to add, each with its strength in its alpha. Raises ValueError where shapes differ."""
    terms: dict[str, list[Pair]] = {}
    for lora, strength in zip(loras, strengths, strict=True):
        for name, pair in lora.pairs.items():
            addends = terms.setdefault(name, [])
            if addends and addends[0].weight_shape != pair.weight_shape:
                raise ValueError(
                    f"{name} is of shapes {addends[0].weight_shape} and {pair.weight_shape}: {lora.path.name} is for "
                    f"another model than {loras[0].path.name}."
                )
            addends.append(replace(pair, alpha=pair.alpha * strength))
    return dict(sorted(terms.items()))


def _lowered(pairs: dict[str, Pair], rank: int) -> dict[str, Pair]:
    """The pairs, those above this rank approximated by one of it."""
    check_rank(rank, pairs)
    return {name: pair if pair.rank <= rank else approximated(pair, lambda _: rank) for name, pair in pairs.items()}


def check_rank(rank: int, pairs: dict[str, Pair]) -> None:
    """Raise ValueError for a rank below 1, or one that changes no pair because none is above it."""
    most = max(pair.rank for pair in pairs.values())
    if not 1 <= rank < most:
        raise ValueError(f"--rank is {rank}; expected 1 to {most - 1}, as the modules have ranks up to {most}.")


def _recipe(loras: Sequence[Lora]) -> tuple[Recipe | None, str]:
    """The recipe in which all files that have one agree, and a sentence about it.

    They may come from different bases: then the recipe names none.
    """
    recipes = {replace(lora.recipe, source="header", strength=1.0): None for lora in loras if lora.recipe}
    kinds = {replace(recipe, base_name="", base_hash="") for recipe in recipes}
    if len(kinds) == 1:
        recipe = next(iter(recipes)) if len(recipes) == 1 else kinds.pop()
        return recipe, f"Recipe kept: {recipe.usage_hint()}"
    return None, "They have different recipes: none is kept." if kinds else "None has a recipe."


def _metadata(loras: Sequence[Lora], out: Path) -> dict[str, str]:
    """The entries that all headers share, and of ModelSpec's obligatory ones the first file's; the recipe is apart."""
    first, *others = (lora.metadata for lora in loras)
    shared = {k: v for k, v in first.items() if k in MUST or all(other.get(k) == v for other in others)}
    shared = {k: v for k, v in shared.items() if k not in (HEADER_KEY, "modelspec.usage_hint")}
    names = ", ".join(lora.path.name for lora in loras)
    return shared | {"ss_output_name": out.stem, "modelspec.title": out.stem, "modelspec.merged_from": names}
