"""What a student may have against it in a run: a discriminator, or a critic.

There is one place for it. It has its own weights, its own group of the optimizer and its own part of the checkpoint,
and it never leaves the run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config.config import Config


class Opponent(ABC):
    """The weights beside the student's that a run trains.

    name: its group in optimizer, checkpoint and log. decided_by: the setting that decides how large it is. rounds:
    updates of its own before each of the student's; 0: it learns in the student's backward pass. warmup: updates of the
    run in which it learns alone.
    """

    name: ClassVar[str]
    decided_by: ClassVar[str]
    rounds: int = 0
    warmup: int = 0

    @abstractmethod
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, in a fixed order; no name is one of the student's."""

    @classmethod
    @abstractmethod
    def optimizer_settings(cls, config: Config) -> dict[str, Any]:
        """AdamW's lr, weight_decay and betas for it."""

    @classmethod
    def most_grad_norm(cls, config: Config) -> float:
        """Norm to which a larger gradient of it is clipped."""
        return config.train.max_grad_norm

    def updated(self, step: int) -> None:
        """Take in its weights after the run's update `step` (from 1)."""
        return

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint must keep of it, by group."""
        return {self.name: self.named_parameters()}

    @torch.no_grad()
    def load(self, groups: dict[str, dict[str, Tensor]]) -> None:
        """Put `state` back. Raises ValueError for weights of another shape."""
        saved, parameters = groups[self.name], self.named_parameters()
        if {n: t.shape for n, t in parameters.items()} != {n: t.shape for n, t in saved.items()}:
            raise ValueError(f"The checkpoint's {self.name} is of another shape: set {self.decided_by} back.")
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
