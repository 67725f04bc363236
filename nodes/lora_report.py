"""What the loader's node says of a LoRA on a model: faults first, then how to sample it, and the facts of the file."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..samplers import Recipe
from ..samplers.families import FAMILIES, family_title
from ..samplers.lora_file import LoraHeader
from ..samplers.lora_modules import SCALED
from ..samplers.phases import count_steps
from ..samplers.recipe import SOURCES
from .host import warned
from .lora_on_model import BY_NODE, LOADED, model_family, model_title, sampling_fault, shift_of
from .lora_patches import LoraMatch
from .loras_in_graph import TWICE

FAST_BY_NODE = "PCM Recipe says that this model is made for few steps: remove that node, or this one."
OFF = "Strength 0: the LoRA is off, and the model is as it came."
# Shares of a recipe's strength that people take on purpose, beside other LoRAs or on merged models.
USUAL = (0.7, 1.1)


def check(header: LoraHeader, matched: LoraMatch, model: Any, family: str | None) -> None:
    """Raise ValueError for a LoRA that is of another family (as far as known), or of which this model takes nothing."""
    file = header.path.name
    title = model_title(model)
    # Between transformers the matched modules tell, as in the host: Chroma takes much of what is made for FLUX.1.
    is_certain = family in FAMILIES or model_family(model) in FAMILIES or not matched.places
    if family is not None and is_certain and family != model_family(model):
        raise ValueError(
            f"{file} is a LoRA for {family_title(family)}, but the model is {title}. "
            f"Load a model of {family_title(family)}, or a LoRA made for {title}."
        )
    if not matched.places:
        why = " ".join(matched.sentences()) or "it is for text encoders alone, which this node does not patch."
        example = f" Its names are like {next(iter(matched.misfits))}." if matched.misfits else ""
        raise ValueError(f"{file} does nothing to this {title} model: {why}{example}")


def report(
    header: LoraHeader,
    matched: LoraMatch,
    recipe: Recipe,
    strength: float,
    model: Any,
    patched: Any,
    fast_already: list[str],
) -> list[str]:
    """Lines for the loader's node.

    model, patched: the host MODEL before and after. fast_already: sentences on what the graph shows of the
    model's speed, beside a LoRA of this node's kind, which the model itself carries (`LOADED`).
    """
    lines = [
        *warned(_problems(header, matched, recipe, strength, model, fast_already) if strength else [OFF]),
        f"{count_steps(recipe.steps)}, {recipe.guidance_text}, {recipe.mode_text}.",
        f"{family_title(recipe.family)} {recipe.method}, {len(matched.places)} of {matched.total} modules matched.",
        f"Recipe from {SOURCES[recipe.source]}.",
    ]
    if shift_of(patched) != shift_of(model):
        lines.append(f"Shift set to {shift_of(patched):.4g}, the LoRA's; it was {shift_of(model):.4g}.")
    return lines + _facts(header, matched, recipe)


def _facts(header: LoraHeader, matched: LoraMatch, recipe: Recipe) -> list[str]:
    """What else there is to know of the file."""
    lines = []
    modules = header.modules
    kinds = Counter(modules[name].title for name in matched.places if not modules[name].is_plain)
    if kinds:
        lines.append(f"Other than plain LoRA: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}.")
    if any(place.width for place in matched.places.values()):
        lines.append("This model takes a picture and a mask as well, on which the LoRA has no say.")
    if matched.misfits:
        lines.append(f"Not taken: {next(iter(matched.misfits))}{' and others' * (len(matched.misfits) > 1)}.")
    if matched.text_modules:
        lines.append(f"{matched.text_modules} text encoder modules are not used.")
    if kept := [name for name in header.unmatched if name not in matched.ignored]:
        lines.append(f"{len(kept)} tensors of other kinds left to the host, such as {kept[0]}.")
    if matched.ignored:
        lines.append(f"{len(matched.ignored)} tensors are no LoRA's and are not used, such as {matched.ignored[0]}.")
    if recipe.source != "header" and len(_without_alpha(header, matched)) == len(matched.places):
        lines.append("The file has no alpha: its weights are taken as they are.")
    return lines


def _problems(
    header: LoraHeader, matched: LoraMatch, recipe: Recipe, strength: float, model: Any, fast_already: list[str]
) -> list[str]:
    """Faults of a LoRA on this model at this strength, a sentence each that says what to do."""
    loaded = model.get_attachment(LOADED)
    twice = FAST_BY_NODE if loaded == BY_NODE else TWICE.format(loaded)
    lines = [*([twice] if loaded else []), *fast_already][:1]
    lines += filter(None, [recipe.family_warning(model_family(model)), sampling_fault(model, recipe)])
    share = strength / recipe.strength
    if recipe.source != "settings" and not USUAL[0] <= share <= USUAL[1]:
        lines.append(f"Made for strength {recipe.strength:g}, not {strength:g}: set strength to {recipe.strength:g}.")
    lines += matched.sentences()
    lost = [name for name in header.lost_alphas() if name in matched.places]
    if lost:
        lines.append(f"{len(lost)} of {len(matched.places)} modules have lost their alpha: get the file again.")
    return lines


def _without_alpha(header: LoraHeader, matched: LoraMatch) -> list[str]:
    """The matched modules that take an alpha and have none, neither as a tensor of the file nor in its header."""
    modules, numbers = header.modules, header.numbers
    return [name for name in matched.places if modules[name].kind in SCALED and "alpha" not in numbers[name]]
