"""The fixed-seed grid that a run draws as it goes."""

from __future__ import annotations

from itertools import islice

import torch
from PIL import Image

from ..config.config import Config
from ..data.store import LatentCache
from ..families import Base, Condition
from ..families.generate import generate
from ..lora.recipe import recipe_for
from ..pictures import draw_grid


def preview_grid(config: Config, base: Base, cache: LatentCache, null: Condition, captions: bool) -> Image.Image:
    """The fixed prompts and seed of `preview` at each of its steps, with the adapter as it stands."""
    settings = config.preview
    prompts = list(settings.prompts) or list(islice(cache.prompts, 1, 5))  # the first is the empty one
    shape = base.latent_shape(config.data.resolution)
    noise = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(settings.seed))
    condition = {k: v.to(base.device) for k, v in cache.encoding(prompts).items()}
    recipe = base.alone if base.whole else recipe_for(config, base)
    how = {"gamma": recipe.gamma, "min_alpha": recipe.min_alpha, "seed": settings.seed}
    how["target_time"] = config.objective.target_time
    rows = []
    for steps in settings.steps:
        ticks = recipe.grid().plan(steps).ticks
        latents = generate(base, condition, null, noise, ticks, settings.guidance or recipe.guidance, **how)
        rows.append((f"{steps} step{'s' * (steps > 1)}", base.decode(latents)))
    return draw_grid(rows, prompts if captions else [""] * len(prompts))
