"""What every setting is measured with: the teacher's pictures of the same prompts, and the figures against them."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from math import ceil
from typing import Any

import torch
from torch import Tensor

from ...samplers import Recipe
from ...samplers.phases import count_steps
from ..data.order import seed_of
from ..families import Base
from .contestants import choose_prompts
from .distances import frechet, kernel_distance, kernel_pairs, precision_and_recall
from .features import latents, own_spaces
from .intervals import Figure, mean_of, mean_over_pairs, ratio_of
from .judge import Judge, Look
from .metrics import diversities, paired_errors
from .setting import Setting
from .trial import Trial

NOISES = 2  # from which a setting draws each prompt: the least that tells a prompt's diversity
OTHERS = 2  # from which the teacher draws what they are compared with, so that both sets are of one size
OTHER_NOISE = -3  # stands in the seeds of all noises but the trial's own
SHARE = 0.1  # of a difference, that may come from the sets' size


class Gauge:
    """Draws settings from a trial's prompts and measures them against its reference, the teacher at many steps.

    Distributions are compared with the reference's pictures from noises that nothing else is drawn from. The reference
    itself is measured too, from the noises of the others: that is the floor of every figure.
    """

    def __init__(self, base: Base, judge: Judge, trial: Trial, reference: Setting):
        self.base, self.judge, self.reference = base, judge, reference
        seeds = [seed_of(trial.seed, n, OTHER_NOISE) for n in range(1, NOISES + OTHERS)]
        self.trials = [trial, *(trial.with_noise(seed) for seed in seeds)]
        self._untrained: dict[tuple, Setting] = {}

    @classmethod
    def on_held_out(cls, base: Base, number: int, seed: int, reference: Setting) -> Gauge:
        """A study's gauge: `number` prompts that no run on this base has seen, in latents and the base's own space."""
        prompts = choose_prompts(None, base.path, number)
        judge = Judge(base, [latents(base.device), *own_spaces(prompts.language)], prompts)
        return cls(base, judge, Trial.of(base, prompts.texts, seed), reference)

    def row(self, setting: Setting, recipe: Recipe | None = None) -> dict[str, Any]:
        """A setting with its figures, JSON-ready; recipe: as in `sample`."""
        sample = self.floor if setting == self.reference else self.sample(setting, recipe)
        return setting.as_dict() | self.figures(sample)

    def sample(self, setting: Setting, recipe: Recipe | None = None) -> Look:
        """A setting's pictures; recipe: that of the LoRA, which is installed. The first noise is the trial's own."""
        return self.judge.look(self._drawn(self.trials[:NOISES], setting, recipe))

    def without(self, setting: Setting, recipe: Recipe) -> Setting:
        """A LoRA's setting with the base alone: the same one for all LoRAs that are drawn alike."""
        bare = replace(setting, untrained=True)
        return self._untrained.setdefault(bare.way(recipe), bare)

    def is_untrained(self, setting: Setting) -> bool:
        """Whether one of the settings `without` a LoRA draws the very pictures of this one of the teacher's."""
        return setting.way(None) in self._untrained

    @cached_property
    def floor(self) -> Look:
        """The reference's own pictures, from the noises that the others are drawn from."""
        return self.sample(self.reference)

    @cached_property
    def target(self) -> dict[str, Tensor]:
        """By space, the features (N, K, D) of the reference's pictures from the other noises."""
        return self.judge.look(self._drawn(self.trials[NOISES:], self.reference)).features

    def _drawn(self, trials: list[Trial], setting: Setting, recipe: Recipe | None = None) -> Tensor:
        """Latents (N, K, C, h, w), one of each of K trials. Raises ValueError where they are not finite."""
        drawn = torch.stack([trial.latents(setting, self.base, recipe) for trial in trials], dim=1)
        finite = drawn.isfinite().flatten(2).all(2)
        if not finite.all():
            raise ValueError(
                f"{setting.who} at {count_steps(setting.steps)}: {(~finite).sum()} of {finite.numel()} pictures are "
                "not finite. Numbers of half precision may be too small for them: use --dtype fp32 or bf16."
            )
        return drawn

    def figures(self, sample: Look) -> dict[str, Any]:
        """All figures of a sample, each a `Figure` as a dict.

        paired_error: against the reference from the same noise, over all noises. spaces: by space, what `_in_space`
        says. The rest: the means of the sample's facts.
        """
        errors = [paired_errors(sample.latents[:, k], self.floor.latents[:, k]) for k in range(NOISES)]
        figures = {"paired_error": mean_of(torch.stack(errors, dim=1)).as_dict()}
        figures["spaces"] = {name: self._in_space(sample, name) for name in self.target}
        return figures | {name: mean_of(values).as_dict() for name, values in sample.facts.items()}

    def _in_space(self, sample: Look, space: str) -> dict[str, dict[str, float]]:
        """Distances to the reference's pictures from other noises, precision and recall, and how much pictures of a
        prompt differ: as it is and, where the reference's do, as a share of theirs."""
        features, target = sample.features[space], self.target[space]
        precision, recall = precision_and_recall(features, target)
        within, usual = diversities(features), diversities(self.floor.features[space])
        figures = {
            "kernel": kernel_distance(features, target),
            "frechet": frechet(features, target),
            "precision": precision,
            "recall": recall,
            "diversity": mean_of(within),
        }
        if usual.all():
            figures["diversity_share"] = ratio_of(within, usual)
        return {name: figure.as_dict() for name, figure in figures.items()}

    def gain(self, sample: Look, untrained: Look, space: str) -> Figure:
        """By how much a sample's kernel distance is below the untrained base's; noise that both share is not in its
        interval."""
        pairs = [kernel_pairs(s.features[space], self.target[space]) for s in (untrained, sample)]
        return mean_over_pairs(pairs[0] - pairs[1])


def pictures_needed(number: int, floor: Figure, difference: Figure) -> int:
    """How many pictures make the noise of two equal sets at most `SHARE` of a difference, to two digits; `number` where
    they are enough.

    floor: the kernel distance of two equal sets of `number`, whose interval shrinks as 1 / number.
    """
    needed = number * floor.half_width / (SHARE * abs(difference.value))
    if needed <= number:
        return number
    unit = 10 ** max(0, len(str(ceil(needed))) - 2)
    return ceil(needed / unit) * unit
