"""Settings tried on the same prompts and the same noise."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...samplers import Recipe
from ..data.order import seed_of
from ..families import Base, Condition
from ..families.generate import draw, generate, unit_noise
from ..lora.adapter import bare
from .setting import TEACHER, Setting

# How many latent places (h * w) are sampled at once: 64 pictures of the tiny bases, 4 of SD1.5, 1 of SDXL.
PLACES = 64 * 16 * 16
# Marks the seed of the noise between steps, in the place where those of training's batches have ranks from -1 on.
FRESH = -2


@dataclass(frozen=True)
class Trial:
    """The prompts and noises that settings are compared on.

    condition: the prompts' encodings (N, ...). null: the encoding that guidance steers away from, (1, ...)
    for all or (N, ...) for each its own. noise: (N, C, h, w). seed: of the noise, and of that which a
    stochastic setting draws between its steps; settings of one gamma share it.
    """

    condition: Condition
    null: Condition
    noise: Tensor
    seed: int

    @classmethod
    def of(
        cls, base: Base, prompts: list[str], seed: int, negative: str | None = None, resolution: int | None = None
    ) -> Trial:
        """Noise from `seed` for these prompts; a negative prompt stands in for the base's own null condition.

        resolution: side in pixels; default: the base's own.
        """
        empty = base.encode_prompts([negative or ""])
        null = empty if negative else base.null_condition(empty)
        return cls.on(base, base.encode_prompts(prompts), null, seed, resolution)

    @classmethod
    def on(cls, base: Base, condition: Condition, null: Condition, seed: int, resolution: int | None = None) -> Trial:
        """Noise from `seed` for prompts, or their null condition, that are encoded already; the rest as in `of`."""
        shape = len(next(iter(condition.values()))), *base.latent_shape(resolution or base.default_resolution)
        return cls(condition, null, unit_noise(shape, seed), seed)

    def first(self, number: int) -> Trial:
        """The first `number` pictures alone."""
        null = {k: v[:number] for k, v in self.null.items()}
        condition = {k: v[:number] for k, v in self.condition.items()}
        return Trial(condition, null, self.noise[:number], self.seed)

    def with_noise(self, seed: int) -> Trial:
        """A trial of the same prompts with other noise, at the start and between the steps."""
        return replace(self, noise=unit_noise(self.noise.shape, seed), seed=seed)

    def latents(self, setting: Setting, base: Base, recipe: Recipe | None = None) -> Tensor:
        """Latents (N, C, h, w) made with this setting. A LoRA must be installed in the base, and needs its recipe; an
        untrained setting needs the recipe alone."""
        teacher = setting.name == TEACHER
        if teacher:
            sample = partial(generate, base, solver=setting.solver, gamma=setting.gamma or 0.0)
        else:
            sample = partial(draw, base, recipe, gamma=setting.gamma)

        latents = []
        size = max(1, PLACES // self.noise[0, 0].numel())
        with bare(base.network) if teacher or setting.untrained else nullcontext():
            for start in range(0, len(self.noise), size):
                part = slice(start, start + size)
                latents.append(
                    sample(
                        condition={k: v[part] for k, v in self.condition.items()},
                        null={k: v[part] if len(v) > 1 else v for k, v in self.null.items()},
                        noise=self.noise[part],
                        ticks=setting.ticks(recipe),
                        guidance=setting.guidance,
                        seed=seed_of(self.seed, start, FRESH),
                    ).cpu()
                )
        return torch.cat(latents)
