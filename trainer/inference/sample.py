"""`pcm sample`: a labelled grid of pictures by the samplers that run in ComfyUI."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...samplers.phases import count_steps
from ..families import Base
from ..families.generate import draw, unit_noise
from ..lora.install import install_for_sample, null_of
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
    resolution: side in pixels; None is the base's own. Raises ValueError for a name that is no PNG's, and as
    `install_for_sample`.
    """
    check_png(out)
    recipe, strength, notes = install_for_sample(lora, base, strength)
    usual = recipe or base.alone
    guidance = usual.guidance if guidance is None else guidance
    gamma = usual.gamma if gamma is None else gamma

    # one noise for the whole grid: a column differs by its prompt alone, and a row by its steps
    noise = unit_noise((1, *base.latent_shape(resolution or base.default_resolution)), seed)
    noise = noise.repeat(len(prompts), 1, 1, 1)
    condition = base.encode_prompts(prompts)
    null = null_of(base, negative)

    rows, pictures, warnings = [], [], [*notes]
    for n in steps:
        plan = usual.grid().plan(n)
        warnings += [*(recipe.warnings(n, guidance) if recipe else []), *plan.notes]
        latents = draw(base, usual, condition, null, noise, plan.ticks, guidance=guidance, gamma=gamma, seed=seed)
        pictures.append((f"{count_steps(n)}\nCFG {guidance:g}", base.decode(latents)))
        rows.append({"steps": n, "guidance": guidance, "gamma": gamma, "ticks": plan.ticks})
    save_image(draw_grid(pictures, prompts), out)

    return {
        "out": str(out),
        "rows": rows,
        "strength": strength,
        "recipe": recipe and asdict(recipe),
        "warnings": list(dict.fromkeys(warnings)),
    }
