"""The critic of distribution matching: a second adapter on the one base that learns the student's own distribution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config.config import Config
from ..families import Base
from ..lora.adapter import CRITIC, Adapter, Average
from .opponent import Opponent

AVERAGE = "critic average"


class Critic(Opponent):
    """An adapter that stands in the student's place where its own view of a point is asked for.

    It begins as the student does. Its rank is the objective's, at the student's alpha / rank, and so in each module.
    """

    name: ClassVar[str] = CRITIC
    decided_by: ClassVar[str] = "objective.critic_rank"

    def __init__(self, config: Config, base: Base, student: Adapter):
        objective = config.objective
        rank = objective.critic_rank or student.rank
        self.student = student
        self.rounds = objective.critic_updates
        self.warmup = objective.critic_warmup
        share = rank / student.rank
        ranks = {pattern: r and max(1, round(r * share)) for pattern, r in student.ranks.items()}
        self.adapter = Adapter(
            base.network, base.lora_targets, rank, student.alpha * share, config.train.seed, CRITIC, ranks, student.dora
        )
        self._begin_as(student)
        self.average = Average(self.adapter, objective.critic_ema) if objective.critic_ema else None

    @torch.no_grad()
    def _begin_as(self, student: Adapter) -> None:
        """Take the student's first weights, as far as the ranks go; what is above them begins without effect."""
        weights = self.adapter.named_parameters()
        for name, weight in student.named_parameters().items():
            if not name.endswith(("lora_A", "lora_B")):
                weights[name].copy_(weight)
                continue
            over = 0 if name.endswith("lora_A") else 1  # the dimension of the rank
            rank = min(weight.shape[over], weights[name].shape[over])
            weights[name].narrow(over, 0, rank).copy_(weight.narrow(over, 0, rank))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {f"{self.name}.{name}": parameter for name, parameter in self.adapter.named_parameters().items()}

    @classmethod
    def optimizer_settings(cls, config: Config) -> dict[str, Any]:
        objective, train = config.objective, config.train
        return {
            "lr": objective.critic_lr or train.lr,
            "weight_decay": train.weight_decay,
            "betas": (objective.beta1, 0.999),
        }

    @classmethod
    def most_grad_norm(cls, config: Config) -> float:
        return config.objective.critic_grad_norm or config.train.max_grad_norm

    @contextmanager
    def learning(self) -> Iterator[None]:
        """The critic itself in the student's place."""
        with self.adapter.in_place(self.student):
            yield

    @contextmanager
    def asked(self) -> Iterator[None]:
        """The critic in the student's place as the student's loss asks it: its average where there is one."""
        with self.learning(), self.adapter.using(self.average.weights) if self.average else nullcontext():
            yield

    def updated(self, step: int) -> None:
        if self.average:
            self.average.update(step)

    def state(self) -> dict[str, dict[str, Tensor]]:
        return super().state() | ({AVERAGE: self.average.weights} if self.average else {})

    def load(self, groups: dict[str, dict[str, Tensor]]) -> None:
        super().load(groups)
        if self.average:
            # an average that is new here begins at the weights that the critic has come to
            saved = groups.get(AVERAGE) or self.adapter.copy()
            device = next(iter(self.adapter.parameters())).device
            self.average.weights = {name: weight.to(device, copy=True) for name, weight in saved.items()}
