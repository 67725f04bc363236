"""The adversarial consistency loss (PCM, arXiv 2405.18407, Sec. 3.3): student and target told apart by small heads.

The body is the bare base itself, adapter off; only the heads learn. "Real" is the objective's target: PCM's own
prediction at the phase edge, not data, so that its loss vanishes where the model is self-consistent (Thm 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, relu

from ..samplers import renoise
from .adapter import Adapter
from .families import Base, Condition

GROUP = 8  # channels that a GroupNorm takes together
BETAS, WEIGHT_DECAY = (0.0, 0.999), 1e-3


@dataclass(frozen=True)
class Judged:
    """Where student and target are judged: ticks (B,), and the noise (B, C, h, w) that takes each of them there."""

    tick: Tensor
    student_noise: Tensor
    target_noise: Tensor


class Head(nn.Module):
    """A map of logits from one feature map: 1x1 convolutions of `width` channels, the second with a residual."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(channels, width, 1), nn.GroupNorm(width // GROUP, width))
        self.middle = nn.Sequential(nn.Conv2d(width, width, 1), nn.GroupNorm(width // GROUP, width))
        self.leave = nn.Conv2d(width, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        x = leaky_relu(self.enter(features))
        return self.leave(x + leaky_relu(self.middle(x)))


class Discriminator(nn.Module):
    """One head a feature map. `channels`: of each map; `width`: of the heads. `seed` fixes their start."""

    def __init__(self, channels: list[int], width: int, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(Head(c, width) for c in channels)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [head(f) for head, f in zip(self.heads, features, strict=True)]


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
