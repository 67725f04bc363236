"""How a LoRA of a run must be sampled, as its header will say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...samplers import Recipe, recipe_for_file
from ...samplers.lora_file import read_header
from ..config.config import Config
from ..families import BaseFacts
from ..objectives.objective import guidance_of


def recipe_for(config: Config, base: BaseFacts) -> Recipe:
    """How a LoRA of this run must be sampled. Raises ValueError for settings that no sampler has."""
    return Recipe(
        family=base.family.name,
        prediction=base.prediction,
        zero_terminal_snr=base.zero_terminal_snr,
        shift=base.shift,
        base_name=" + ".join(Path(place).name for place in (base.path, *config.base.loras)),
        base_hash=base.base_hash,
        **(config.objective.sampling() | _guidance_without_teacher(config)),
    )


def _guidance_without_teacher(config: Config) -> dict[str, Any]:
    """A recipe's fields on guidance where no teacher's step decides them: those of the LoRA that the run goes on from,
    else those of the teacher's pictures, if these are what it learns from."""
    data, phases = config.data, config.grid().phases
    if config.objective.needs_teacher:
        return {}
    if config.lora.init is None:
        return guidance_of(not data.has_pictures and data.teacher_guidance > 1, phases)
    header = read_header(Path(config.lora.init))
    recipe = recipe_for_file(str(header.path), header.metadata, header.family)
    baked = guidance_of(True, phases)
    return {field: getattr(recipe, field) for field in baked} if recipe else baked
