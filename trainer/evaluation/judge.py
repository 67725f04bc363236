"""Pictures as the metrics see them: their features, and whether they show what their prompts say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..families import Base
from .contestants import Prompts
from .features import ClipScore, Features

SHOWN = 6  # pictures that are kept for the grid
DECODED = 8  # pictures that are decoded and measured together


@dataclass(frozen=True)
class Look:
    """One setting's pictures, looked at: K of each of N prompts, each from its own noise.

    latents: (N, K, C, h, w). features: (N, K, D) by space. facts: (N, K) by name, how each picture follows its
    prompt. examples: pixels (n, 3, H, W) in [0, 1] of the first prompts, from the first noise.
    """

    latents: Tensor
    features: dict[str, Tensor]
    facts: dict[str, Tensor]
    examples: Tensor


class Judge:
    """Looks at latents in every space, and at how pictures follow their prompts where there is a way to tell."""

    def __init__(self, base: Base, spaces: list[Features], prompts: Prompts, clip: ClipScore | None = None):
        self.base, self.spaces, self.prompts, self.clip = base, spaces, prompts, clip

    @torch.no_grad()
    def look(self, latents: Tensor) -> Look:
        """Decode latents (N, K, C, h, w), K for each prompt, a few at a time, and measure them."""
        features: dict[str, list[Tensor]] = {space.name: [] for space in self.spaces}
        facts: dict[str, list[Tensor]] = {}
        examples = []
        number, noises = latents.shape[:2]
        in_turn = latents.transpose(0, 1).flatten(0, 1)  # all prompts from the first noise, then from the next
        texts = self.prompts.texts * noises

        for at in range(0, len(in_turn), DECODED):
            part = slice(at, at + DECODED)
            pixels = self.base.decode(in_turn[part])
            for space in self.spaces:
                features[space.name].append(space.of(in_turn[part], pixels))
            if self.clip:
                facts.setdefault("clip_score", []).append(self.clip(pixels, texts[part]))
            if language := self.prompts.language:
                facts.setdefault("prompt_followed", []).append(language.shows(texts[part], pixels))
            examples.append(pixels[: max(0, min(SHOWN, number) - at)])

        def by_prompt(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts).unflatten(0, (noises, number)).transpose(0, 1)

        return Look(
            latents,
            {name: by_prompt(parts) for name, parts in features.items()},
            {name: by_prompt(parts) for name, parts in facts.items()},
            torch.cat(examples),
        )
