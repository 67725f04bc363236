"""The fixed-seed grid that a run draws as it goes, beside what the teacher and the untrained base draw."""

from __future__ import annotations

from functools import cached_property
from itertools import islice

from PIL import Image
from torch import Tensor

from ...samplers.phases import count_steps
from ..config.config import Config
from ..data.store import LatentCache
from ..evaluation.trial import Trial
from ..families import Base, Condition
from ..families.generate import draw, unit_noise
from ..lora.adapter import bare
from ..lora.recipe import recipe_for
from ..pictures import draw_grid
from .validation import reference_of


class Previews:
    """Draws the prompts of `preview` from one noise, a row for each of its numbers of steps.

    Above them is the teacher, as the LoRA is to imitate it; below them the base without what was trained, at the
    recipe's own steps: between these two one sees what was learnt. A network that is trained whole has neither.
    """

    def __init__(self, config: Config, base: Base, cache: LatentCache, null: Condition):
        self.config, self.base, self.null = config, base, null
        self.prompts = list(config.preview.prompts) or list(islice(cache.prompts, 1, 5))  # the first is the empty one
        self.condition = {k: v.to(base.device) for k, v in cache.encoding(self.prompts).items()}
        shape = base.latent_shape(config.data.resolution)
        self.noise = unit_noise((len(self.prompts), *shape), config.preview.seed)
        self.usual = base.alone if base.whole else recipe_for(config, base.facts)

    def grid(self) -> Image.Image:
        """What was trained, as it stands, between the teacher and the untrained base, under the prompts."""
        rows = self._rows()
        return draw_grid(rows if self.base.whole else [self.teacher, *rows, self.untrained], self.prompts)

    def cover(self) -> Image.Image:
        """What was trained, alone and without the prompts: the picture that stands beside the file."""
        return draw_grid(self._rows(), [""] * len(self.prompts))

    @cached_property
    def teacher(self) -> tuple[str, Tensor]:
        """The teacher's row, which stays as it is during a run."""
        reference = reference_of(self.config, self.usual)
        trial = Trial(self.condition, self.null, self.noise, self.config.preview.seed)
        label = f"teacher\n{count_steps(reference.steps)}, CFG {reference.guidance:g}"
        return label, self.base.decode(trial.latents(reference, self.base))

    @cached_property
    def untrained(self) -> tuple[str, Tensor]:
        """The row of a LoRA that has learnt nothing, which stays as it is too."""
        with bare(self.base.network):
            return f"untrained\n{count_steps(self.usual.steps)}", self._pictures(self.usual.steps)

    def _rows(self) -> list[tuple[str, Tensor]]:
        return [(count_steps(steps), self._pictures(steps)) for steps in self.config.preview.steps]

    def _pictures(self, steps: int) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1] of the prompts."""
        settings = self.config.preview
        latents = draw(
            self.base,
            self.usual,
            self.condition,
            self.null,
            self.noise,
            self.usual.grid().plan(steps).ticks,
            guidance=settings.guidance,
            seed=settings.seed,
        )
        return self.base.decode(latents)
