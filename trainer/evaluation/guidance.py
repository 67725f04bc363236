"""The effect of CFG and of a negative prompt on a LoRA's pictures, against that on the teacher's."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...samplers import Recipe
from ..families import Base
from .intervals import Figure, mean_of
from .metrics import agreements, paired_errors
from .setting import Setting
from .trial import Trial


class GuidanceTrial:
    """The reference under any CFG, with negative prompts and without, each made once, and a LoRA beside it.

    reference: the teacher at many steps. latents: the reference's on this trial, where they are there
    already. The negative prompt of each picture is the prompt of the next.
    """

    def __init__(self, trial: Trial, base: Base, prompts: list[str], reference: Setting, latents: Tensor | None = None):
        self.base, self.trial, self.setting = base, trial, reference
        self.avoiding = replace(trial, null=base.encode_prompts(prompts[1:] + prompts[:1]))
        self._references = {} if latents is None else {(reference.guidance, False): latents}

    def reference(self, guidance: float, avoiding: bool = False) -> Tensor:
        """The reference's latents at this CFG, with negative prompts or without."""
        if (guidance, avoiding) not in self._references:
            trial = self.avoiding if avoiding else self.trial
            self._references[guidance, avoiding] = trial.latents(replace(self.setting, guidance=guidance), self.base)
        return self._references[guidance, avoiding]

    def sweep(self, setting: Setting, recipe: Recipe | None, scales: tuple[float, ...]) -> dict[float, Tensor]:
        """CFG -> latents made with this setting but at that CFG, for each of the scales."""
        return {g: self.trial.latents(replace(setting, guidance=g), self.base, recipe) for g in scales}

    def errors(self, swept: dict[float, Tensor]) -> dict[str, Figure]:
        """CFG -> paired error of the latents made at it against the reference of the same CFG."""
        return {f"{g:g}": mean_of(paired_errors(latents, self.reference(g))) for g, latents in swept.items()}

    def response(self, guidance: float, without: Tensor, avoided: Tensor) -> dict[str, Figure]:
        """The effect of negative prompts at this CFG, from latents without and with them.

        change: |avoided - without| / |without|; agreement: the cosine between that change and the reference's.
        """
        expected = self.reference(guidance, avoiding=True) - self.reference(guidance)
        changes, cosines = paired_errors(avoided, without), agreements(avoided - without, expected)
        return {"change": mean_of(changes), "agreement": mean_of(cosines)}
