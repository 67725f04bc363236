"""`pcm sample`: a labelled grid of pictures by the samplers that run in ComfyUI."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..families import Base
from ..families.generate import generate
from ..lora.install import install_for_sample, mismatches, null_of
from ..objectives import tells_target_time
from ..pictures import check_png, draw_grid, save_image


def sample_grid(
    base: Base,
    prompts: list[str],
    out: Path,
    lora: Path | None,
    steps: list[int],
    guidance: float | None,
    negative: str | None,
    strength: float | None,
    gamma: float | None,
    seed: int,
    resolution: int | None,
) -> dict[str, Any]:
    """Draw a row for each number of steps and write the grid; returns what was used, with the recipe's warnings.

    guidance, strength, gamma: None is the recipe's. Without a recipe they are those of the base alone, and strength 1.
    """
    check_png(out)
    recipe, strength = install_for_sample(lora, base, strength)
    usual = recipe or base.alone
    grid = usual.grid()
    guidance = usual.guidance if guidance is None else guidance
    gamma = usual.gamma if gamma is None else gamma
    shape = base.latent_shape(resolution or base.default_resolution)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)).repeat(len(prompts), 1, 1, 1)
    condition = base.encode_prompts(prompts)
    null = null_of(base, negative)
    rows, pictures, warnings = [], [], mismatches(recipe, base)
    for n in steps:
        plan = grid.plan(n)
        warnings += [*(recipe.warnings(n, guidance) if recipe else []), *plan.notes]
        told = recipe is not None and tells_target_time(recipe.objective)
        how = {"min_alpha": usual.min_alpha, "seed": seed, "target_time": told}
        latents = generate(base, condition, null, noise, plan.ticks, guidance, gamma, **how)
        pictures.append((f"{n} step{'s' * (n > 1)}\nCFG {guidance:g}", base.decode(latents)))
        rows.append({"steps": n, "guidance": guidance, "gamma": gamma, "ticks": plan.ticks})
    save_image(draw_grid(pictures, prompts), out)
    facts = {"out": str(out), "rows": rows, "strength": strength}
    return facts | {"recipe": recipe and asdict(recipe), "warnings": list(dict.fromkeys(warnings))}
