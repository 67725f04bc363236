"""Several LoRAs of one family as one, as `pcm merge` makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...samplers import Recipe
from ...samplers.recipe import HEADER_KEY
from .factors import approximated, concatenated, error_text, errors, rounded, widest
from .pairs import MUST, Lora, Pair, check_out, settled, write_lora
from .read import read_lora


def merge(
    sources: Sequence[tuple[Path, float | None]],
    out: Path,
    *,
    rank: int | None = None,
    family: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the sum of LoRAs, each times its strength (None: what its recipe wants, else 1); returns what was done.

    Exact, with the ranks side by side, or of `rank` at most by SVD. Metadata in which all agree stays, and the recipe
    where all that have one agree, for strength 1. The error is that of the tensors written, rounded as they are.
    Raises ValueError for less than two files, other families, shapes that differ, a strength of 0 or a rank that
    changes nothing, and what `read_lora`, `check_out` and `write_lora` raise.
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
    strengths = [_strength(lora, given) for lora, (_, given) in zip(loras, sources, strict=True)]
    meant = _terms(loras, strengths)
    found = {name: concatenated(pairs) for name, pairs in meant.items()}
    if rank is not None:
        found = _lowered(found, rank)
    found = {name: rounded(pair, widest(meant[name])) for name, pair in settled(found, first.family).items()}
    recipe, note = _recipe(loras)
    write_lora(out, first.family, found, _metadata(loras, out), recipe)
    told = errors(meant, found)
    text = (
        f"{out}: {first.family.title}, {len(found)} modules, ranks up to {max(p.rank for p in found.values())}; "
        f"{error_text(told)}. {note}"
    )
    merged = [{"file": str(lora.path), "strength": s} for lora, s in zip(loras, strengths, strict=True)]
    return {"out": str(out), "family": first.family.name, "modules": len(found), "merged": merged, **told, "text": text}


def _strength(lora: Lora, given: float | None) -> float:
    strength = given if given is not None else lora.recipe.strength if lora.recipe else 1.0
    if strength == 0:
        raise ValueError(f"{lora.path.name} has strength 0, which adds nothing. Leave it out.")
    return strength


def _terms(loras: Sequence[Lora], strengths: Sequence[float]) -> dict[str, list[Pair]]:
    """Module -> the pairs to add, each with its strength in its alpha."""
    terms: dict[str, list[Pair]] = {}
    for lora, strength in zip(loras, strengths, strict=True):
        for name, pair in lora.pairs.items():
            found = terms.setdefault(name, [])
            if found and (found[0].down.shape[1:], len(found[0].up)) != (pair.down.shape[1:], len(pair.up)):
                shapes = f"{(len(found[0].up), *found[0].down.shape[1:])} and {(len(pair.up), *pair.down.shape[1:])}"
                raise ValueError(
                    f"{name} is of shapes {shapes}: {lora.path.name} is for another model than {loras[0].path.name}."
                )
            found.append(replace(pair, alpha=pair.alpha * strength))
    return dict(sorted(terms.items()))


def _lowered(pairs: dict[str, Pair], rank: int) -> dict[str, Pair]:
    check_rank(rank, pairs)
    return {n: p if p.rank <= rank else approximated(p, lambda _: rank) for n, p in pairs.items()}


def check_rank(rank: int, pairs: dict[str, Pair]) -> None:
    """Raise ValueError for a rank that is none, or that no pair is above."""
    most = max(pair.rank for pair in pairs.values())
    if not 1 <= rank < most:
        raise ValueError(f"--rank is {rank}; expected 1 to {most - 1}, as the modules have ranks up to {most}.")


def _recipe(loras: Sequence[Lora]) -> tuple[Recipe | None, str]:
    """The recipe that all agree in who have one, and a sentence about it."""
    found = {replace(lora.recipe, source="header", strength=1.0): None for lora in loras if lora.recipe}
    kinds = {replace(recipe, base_name="", base_hash="") for recipe in found}
    if len(kinds) == 1:
        recipe = next(iter(found)) if len(found) == 1 else kinds.pop()
        return recipe, f"Recipe kept: {recipe.usage_hint()}"
    return None, "They have different recipes: none is kept." if kinds else "None has a recipe."


def _metadata(loras: Sequence[Lora], out: Path) -> dict[str, str]:
    first, *others = (lora.metadata for lora in loras)
    same = {k: v for k, v in first.items() if k in MUST or all(other.get(k) == v for other in others)}
    same = {k: v for k, v in same.items() if k not in (HEADER_KEY, "modelspec.usage_hint")}
    names = ", ".join(lora.path.name for lora in loras)
    return same | {"ss_output_name": out.stem, "modelspec.title": out.stem, "modelspec.merged_from": names}
