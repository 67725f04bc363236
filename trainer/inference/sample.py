"""`pcm sample`: a labelled grid of pictures by the samplers that run in ComfyUI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ...samplers.phases import count_steps
from ..families import Base
from ..families.generate import draw, unit_noise
from ..lora.install import Installed, install_for_sample, null_of
from ..pictures import check_png, draw_grid, save_image


class Row(NamedTuple):
    """The pictures of one number of steps: pixels (B, 3, H, W) in [0, 1], one a prompt."""

    steps: int
    guidance: float
    gamma: float
    ticks: tuple[int, ...]
    pixels: Tensor


class Rows(NamedTuple):
    """Pictures, a row for each number of steps, and the sentences that their user should read."""

    rows: list[Row]
    warnings: list[str]


def draw_rows(
    base: Base,
    put: Installed,
    prompts: list[str],
    steps: Sequence[int],
    guidance: float | None,
    negative: str | None,
    gamma: float | None,
    seed: int,
    resolution: int | None,
) -> Rows:
    """Draw each prompt at each number of steps, with the LoRA as it was put into the base.

    guidance, gamma: None is the recipe's, or the base's alone. resolution: side in pixels; None is the base's own.
    """
    recipe, usual = put.recipe, put.recipe or base.alone
    guidance = usual.guidance if guidance is None else guidance
    gamma = usual.gamma if gamma is None else gamma

    # one noise for all: a column differs by its prompt alone, and a row by its steps
    noise = unit_noise((1, *base.latent_shape(resolution or base.default_resolution)), seed)
    noise = noise.repeat(len(prompts), 1, 1, 1)
    condition = base.encode_prompts(prompts)
    null = null_of(base, negative)

    rows, warnings = [], [*put.notes]
    for n in steps:
        plan = usual.grid().plan(n)
        warnings += [*(recipe.warnings(n, guidance) if recipe else []), *plan.notes]
        latents = draw(base, usual, condition, null, noise, plan.ticks, guidance=guidance, gamma=gamma, seed=seed)
        rows.append(Row(n, guidance, gamma, plan.ticks, base.decode(latents)))
    return Rows(rows, list(dict.fromkeys(warnings)))


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
    put = install_for_sample(lora, base, strength)
    drawn = draw_rows(base, put, prompts, steps, guidance, negative, gamma, seed, resolution)
    pictures = [(f"{count_steps(row.steps)}\nCFG {row.guidance:g}", row.pixels) for row in drawn.rows]
    save_image(draw_grid(pictures, prompts), out)

    rows = [row._asdict() for row in drawn.rows]
    for row in rows:
        del row["pixels"]
    return {
        "out": str(out),
        "rows": rows,
        "strength": put.strength,
        "recipe": put.recipe and asdict(put.recipe),
        "warnings": drawn.warnings,
    }
