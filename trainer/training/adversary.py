"""The adversarial consistency loss (PCM, arXiv 2405.18407, Sec. 3.3): student and target told apart by small heads.

The body is the bare base itself, adapter off; only the heads learn. "Real" is the objective's target: PCM's own
prediction at the phase edge, not data, so that its loss vanishes where the model is self-consistent (Thm 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from ...samplers import renoise
from ..config.config import Config
from ..families import Base, Condition
from ..lora.adapter import Adapter
from ..objectives.discriminator import Discriminator
from .opponent import Opponent

BETAS, WEIGHT_DECAY = (0.0, 0.999), 1e-3


@dataclass(frozen=True)
class Judged:
    """Where student and target are judged: ticks (B,), and the noise (B, C, h, w) that takes each of them there."""

    tick: Tensor
    student_noise: Tensor
    target_noise: Tensor


class Adversary(Opponent):
    """The discriminator of one run over the bare base's features.

    condition: of one sample (1, ...), and `resolution` in pixels, to see how many channels each feature map has.
    """

    name: ClassVar[str] = "discriminator"
    decided_by: ClassVar[str] = "adversarial.width"

    def __init__(self, base: Base, adapter: Adapter, condition: Condition, resolution: int, width: int, seed: int):
        self.base = base
        self.adapter = adapter
        x = torch.zeros(1, *base.latent_shape(resolution), device=base.device)
        tick = torch.tensor([base.schedule.ticks], device=base.device)
        with torch.no_grad(), adapter.off():
            channels = [features.shape[1] for features in base.features(x, tick, condition)]
        self.heads = Discriminator(channels, width, seed).to(base.device)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.heads.named_parameters())

    @classmethod
    def optimizer_settings(cls, config: Config) -> dict[str, Any]:
        return {"lr": config.adversarial.lr, "weight_decay": WEIGHT_DECAY, "betas": BETAS}

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

        # The heads are frozen for the generator's loss, and the features cut off for the discriminator's, so that one
        # backward pass over the sum of both gives each of them its own gradient.
        self.heads.requires_grad_(False)
        generator = mean_of([relu(1 - logits) for logits in self.heads(fake)])
        self.heads.requires_grad_(True)
        logits_of_fake = self.heads([features.detach() for features in fake])
        logits_of_real = self.heads(real)
        hinge_of_fake = mean_of([relu(1 + logits) for logits in logits_of_fake])
        hinge_of_real = mean_of([relu(1 - logits) for logits in logits_of_real])
        return generator, hinge_of_fake + hinge_of_real

    def _features(self, x: Tensor, edge: Tensor, tick: Tensor, noise: Tensor, condition: Condition) -> list[Tensor]:
        """Feature maps of points x at ticks `edge`, re-noised to `tick`."""
        schedule = self.base.schedule
        point = renoise(
            x, noise, schedule.alpha(edge), schedule.sigma(edge), schedule.alpha(tick), schedule.sigma(tick)
        )
        return self.base.features(point, tick, condition)


def mean_of(maps: list[Tensor]) -> Tensor:
    """(B,) mean over heads of the mean over places."""
    return torch.stack([m.float().flatten(1).mean(1) for m in maps]).mean(0)
