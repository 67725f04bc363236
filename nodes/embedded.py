"""Guidance that a network takes as an input (FLUX, HunyuanVideo): what a prompt carries, and what a recipe wants."""

from __future__ import annotations

from typing import Any

from ..samplers import Recipe
from .graph import conditioning_path

SLACK = 1.0  # by which people move it on purpose
DEFAULT = 3.5  # that the host takes where a FLUX prompt carries none
NODE = "FluxGuidance"
MISSING = "FluxGuidance is missing on the positive prompt: add it with {:g}, the LoRA's."
OTHER = "FluxGuidance is {:g}, and this LoRA is for {:g}: set guidance to {:g}."
TWICE = "FluxGuidance is on the positive prompt twice, and the last one counts: remove one."


def embedded_warnings(node: Any, recipe: Recipe, positive: list) -> list[str]:
    """Faults of the guidance in a positive CONDITIONING, a sentence each; none for a recipe that tells no guidance."""
    wanted = recipe.embedded_guidance
    if wanted is None:
        return []
    warnings = []
    carried = {extra.get("guidance", DEFAULT if wanted == DEFAULT else None) for _, extra in positive}
    if None in carried:
        warnings.append(MISSING.format(wanted))
    warnings += [OTHER.format(each, wanted, wanted) for each in carried - {None} if abs(each - wanted) > SLACK]
    path = conditioning_path(node.hidden.prompt, node.hidden.unique_id, "positive")
    if sum(entry["class_type"] == NODE for entry in path) > 1:
        warnings.append(TWICE)
    return warnings
