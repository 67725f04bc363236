"""What CFG and a negative prompt do to a LoRA's pictures, against what they do to the teacher's."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...samplers import Recipe
from ..families import Base
from .metrics import agreement, paired_error
from .trial import Setting, Trial


class GuidanceTrial:
    """The reference under any CFG, with negative prompts and without, each made once, and a LoRA beside it.

    A prompt's negative is the next one's. reference: the teacher at many steps. made: its latents, where they are.
    """

    def __init__(self, trial: Trial, base: Base, prompts: list[str], reference: Setting, made: Tensor | None = None):
        self.base, self.trial, self.setting = base, trial, reference
        self.avoiding = replace(trial, null=base.encode_prompts(prompts[1:] + prompts[:1]))
        self._made = {} if made is None else {(reference.guidance, False): made}

    def reference(self, guidance: float, avoiding: bool = False) -> Tensor:
        """The reference's latents at this CFG, with negative prompts or without."""
        if (guidance, avoiding) not in self._made:
            trial, setting = self.avoiding if avoiding else self.trial, replace(self.setting, guidance=guidance)
            self._made[guidance, avoiding] = trial.latents(setting, self.base)
        return self._made[guidance, avoiding]

    def sweep(self, setting: Setting, recipe: Recipe | None, scales: tuple[float, ...]) -> dict[float, Tensor]:
        """CFG -> latents of this setting at each of the scales."""
        return {g: self.trial.latents(replace(setting, guidance=g), self.base, recipe) for g in scales}

    def errors(self, swept: dict[float, Tensor]) -> dict[str, float]:
        """CFG -> paired error against the reference of the same CFG."""
        return {f"{g:g}": paired_error(made, self.reference(g)) for g, made in swept.items()}

    def response(self, guidance: float, without: Tensor, avoided: Tensor) -> dict[str, float]:
        """What negative prompts did at this CFG, from latents without and with them.

        change: |avoided - without| / |without|; agreement: the cosine between that change and the reference's.
        """
        expected = self.reference(guidance, avoiding=True) - self.reference(guidance)
        return {"change": paired_error(avoided, without), "agreement": agreement(avoided - without, expected)}
