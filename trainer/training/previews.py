"""The fixed-seed grid that a run draws as it goes."""

from __future__ import annotations

from itertools import islice

from PIL import Image

from ...samplers.phases import count_steps
from ..config.config import Config
from ..data.store import LatentCache
from ..families import Base, Condition
from ..families.generate import draw, unit_noise
from ..lora.recipe import recipe_for
from ..pictures import draw_grid


def preview_grid(config: Config, base: Base, cache: LatentCache, null: Condition, captions: bool) -> Image.Image:
    """The fixed prompts and seed of `preview` at each of its steps, with the adapter as it stands."""
    settings = config.preview
    prompts = list(settings.prompts) or list(islice(cache.prompts, 1, 5))  # the first is the empty one
    shape = base.latent_shape(config.data.resolution)
    noise = unit_noise((len(prompts), *shape), settings.seed)
    condition = {k: v.to(base.device) for k, v in cache.encoding(prompts).items()}
    usual = base.alone if base.whole else recipe_for(config, base.facts)

    rows = []
    for steps in settings.steps:
        ticks = usual.grid().plan(steps).ticks
        latents = draw(base, usual, condition, null, noise, ticks, guidance=settings.guidance, seed=settings.seed)
        rows.append((count_steps(steps), base.decode(latents)))
    return draw_grid(rows, prompts if captions else [""] * len(prompts))
