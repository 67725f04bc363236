"""A LoRA file described for people: `pcm inspect` and the node PCM LoRA Info say the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from .families import base_title
from .known_files import recipe_for_file
from .lora_file import LoraHeader
from .recipe import SOURCES, Recipe
from .texts import printable

NO_ALPHA = "none (strength 1)"
MOST_KINDS = 4  # of ranks, alphas or dtypes that are listed
# entries of a header that people look for -> what they are called
NOTED = {
    "modelspec.title": "Title",
    "modelspec.author": "Author",
    "modelspec.description": "Description",
    "modelspec.usage_hint": "Its own hint",
    "modelspec.trigger_phrase": "Trigger phrase",
    "modelspec.license": "License",
    "ss_sd_model_name": "Made from",
    "ss_base_model_version": "Base version",
    "ss_training_comment": "Training comment",
}


def recipe_of(header: LoraHeader, family: str | None = None) -> Recipe | None:
    """The recipe of a LoRA file, from its header, or by its name and family where it is a known file.

    family: of the model that it is for, where its tensors do not tell.
    """
    return recipe_for_file(str(header.path), header.metadata, header.family or family)


def facts(header: LoraHeader) -> dict[str, Any]:
    """Everything a LoRA's header says, as JSON-ready values.

    Reads no tensor but the alphas. Raises ValueError for a file that holds no LoRA.
    """
    modules = header.modules
    recipe = recipe_of(header)
    alphas = header.alphas()
    return {
        "file": str(header.path),
        "bytes": header.path.stat().st_size,
        "family": header.family,
        "recipe": asdict(recipe) if recipe else None,
        "method": recipe.method if recipe else None,
        "usage": recipe.usage_hint() if recipe else None,
        "modules": len(modules),
        "tensors": len(header.tensors),
        "not_lora_tensors": header.unmatched,
        "kinds": dict(Counter(m.title for m in modules.values())),
        "ranks": dict(Counter("none" if m.rank is None else m.rank for m in modules.values())),
        "alphas": dict(Counter(f"{alphas[name]:g}" if name in alphas else NO_ALPHA for name in modules)),
        "dtypes": dict(Counter(t.dtype for t in header.tensors.values())),
        "metadata": header.metadata,
    }


def sentences(values: dict[str, Any]) -> list[str]:
    """The values of `facts` as sentences, the most important first."""
    method = "" if values["method"] in (None, "LoRA") else f"{values['method']} "
    modules = f"{values['modules']} module{'s' * (values['modules'] != 1)}"
    if set(values["kinds"]) != {"LoRA"}:
        modules += f" ({', '.join(f'{n} {kind}' for kind, n in values['kinds'].items())})"
    title = base_title(values["family"], values["metadata"])
    lines = [f"{title} {method}LoRA, {modules}, {values['bytes'] / 1e6:.1f} MB."]
    if values["recipe"]:
        lines += [values["usage"], f"Recipe from {SOURCES[values['recipe']['source']]}."]
    else:
        lines.append("No recipe in the header, and not a known file: settings unknown.")
    kinds = (_kinds(values[key]) for key in ("ranks", "alphas", "dtypes"))
    lines.append("Rank {}; alpha {}; stored as {}.".format(*kinds))
    if others := values["not_lora_tensors"]:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        lines.append(f"Tensors of no LoRA style known here: {others[0]}{more}.")
    return lines


def noted(metadata: dict[str, str], usage: str | None = None) -> list[str]:
    """The entries of a header that people look for, a sentence each, and the hash that it stores.

    usage: how the LoRA is sampled, as stated already, which an entry need not repeat.
    """
    texts = {title: _short(metadata[key]) for key, title in NOTED.items() if metadata.get(key)}
    lines = [f"{title}: {text}." for title, text in texts.items() if text != _short(usage or "")]
    stored = metadata.get("sshs_model_hash") or metadata.get("modelspec.hash_sha256", "").removeprefix("0x")
    return [*lines, f"AutoV3 in the header: {printable(stored[:12])}."] if stored else lines


def _kinds(counts: dict[Any, int]) -> str:
    """Counts in words: "4" where all are alike, else "4 (60), 8 (6)", the most frequent first."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    ordered = Counter(counts).most_common()
    rest = f" and {len(ordered) - MOST_KINDS} others" if len(ordered) > MOST_KINDS else ""
    return ", ".join(f"{kind} ({n})" for kind, n in ordered[:MOST_KINDS]) + rest


def _short(text: str) -> str:
    """A text of a file's on one line, no longer than a node can show, without its full stop."""
    return printable(" ".join(text.split()).rstrip("."))
