"""The discriminator's heads: small maps of logits over the frozen network's features (arXiv 2405.18407, Sec. 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

GROUP = 8  # channels that a GroupNorm normalises together


class Head(nn.Module):
    """A feature map (B, channels, h, w) -> logits (B, 1, h, w), by 1x1 convolutions of `width` channels.

    The second has a residual around it. LeakyReLU as in PCM's code (the paper says GELU), and 1x1 as in its
    SDXL and SD3 heads: SD1.5's 3x3, four for each map, are 664 M parameters.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(channels, width, 1), nn.GroupNorm(width // GROUP, width))
        self.middle = nn.Sequential(nn.Conv2d(width, width, 1), nn.GroupNorm(width // GROUP, width))
        self.leave = nn.Conv2d(width, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        x = leaky_relu(self.enter(features))
        return self.leave(x + leaky_relu(self.middle(x)))


class Discriminator(nn.Module):
    """A head for each feature map of the frozen network.

    channels: how many each map has. width: channels inside the heads. seed: fixes the heads' first weights,
    whatever was drawn before.
    """

    def __init__(self, channels: list[int], width: int, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(Head(c, width) for c in channels)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [head(f) for head, f in zip(self.heads, features, strict=True)]
