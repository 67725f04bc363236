"""The adversarial consistency loss (PCM, arXiv 2405.18407, Sec. 3.3): student and target told apart by small heads.

The body is the bare base itself, adapter off; only the heads learn. "Real" is the objective's target: PCM's own
prediction at the phase edge, not data, so that its loss vanishes where the model is self-consistent (Thm 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu

from ...samplers import renoise
from ..families import Base, Condition
from ..lora.adapter import Adapter
from ..objectives.discriminator import Discriminator

BETAS, WEIGHT_DECAY = (0.0, 0.999), 1e-3


@dataclass(frozen=True)
class Judged:
    """Where student and target are judged: ticks (B,), and the noise (B, C, h, w) that takes each of them there."""

    tick: Tensor
    student_noise: Tensor
    target_noise: Tensor


class Adversary:
    """The discriminator of one run over the bare base's features.

    condition: of one sample (1, ...), and `resolution` in pixels, to see how many channels each feature map has.
    """

    def __init__(self, base: Base, adapter: Adapter, condition: Condition, resolution: int, width: int, seed: int):
        self.base, self.adapter = base, adapter
        x, tick = (torch.zeros(1, *shape, device=base.device) for shape in (base.latent_shape(resolution), ()))
        with torch.no_grad(), adapter.off():
            channels = [f.shape[1] for f in base.features(x, tick.long() + base.schedule.ticks, condition)]
        self.heads = Discriminator(channels, width, seed).to(base.device)

    def losses(
        self, student: Tensor, target: Tensor, edge: Tensor, judged: Judged, condition: Condition
    ) -> tuple[Tensor, Tensor]:
        """(B,) losses of generator and discriminator; the first reaches the student alone, the second the heads alone.

        student, target: points (B, C, h, w) at ticks edge (B,), re-noised to judged.tick by the exact forward kernel
        (the published SD3 code's has too little variance). One pass of the body for each serves both losses.
        """
        with self.adapter.off():
            fake = self._features(student, edge, judged.tick, judged.student_noise, condition)
            with torch.no_grad():
                real = self._features(target, edge, judged.tick, judged.target_noise, condition)
        self.heads.requires_grad_(False)
        generator = mean_of([relu(1 - logits) for logits in self.heads(fake)])
        self.heads.requires_grad_(True)
        told_fake = self.heads([f.detach() for f in fake])
        told_real = self.heads(real)
        return generator, mean_of([relu(1 + x) for x in told_fake]) + mean_of([relu(1 - x) for x in told_real])

    def _features(self, x: Tensor, edge: Tensor, tick: Tensor, noise: Tensor, condition: Condition) -> list[Tensor]:
        level = self.base.schedule
        point = renoise(x, noise, level.alpha(edge), level.sigma(edge), level.alpha(tick), level.sigma(tick))
        return self.base.features(point, tick, condition)


def mean_of(maps: list[Tensor]) -> Tensor:
    """(B,) mean over heads of the mean over places."""
    return torch.stack([m.float().flatten(1).mean(1) for m in maps]).mean(0)
