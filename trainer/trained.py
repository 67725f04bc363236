"""Everything that an update changes: what a checkpoint must hold for a run to go on exactly."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .adapter import Average, Learner
from .checkpoint import load_optimizer_tensors, optimizer_tensors
from .config import Config
from .engine import Engine
from .update import Learners, make_optimizer


class Trained:
    """The adapter with its average, the discriminator's heads, the optimizer, fp16's scale, and what the objective
    keeps of earlier weights."""

    def __init__(self, config: Config, accelerator: Accelerator, adapter: Learner, engine: Engine):
        self.adapter, self.engine, self.accelerator = adapter, engine, accelerator
        self.average = Average(adapter, config.train.ema) if config.train.ema else None
        optimizer = make_optimizer(config, self.learners(), engine.base.device)
        self.optimizer = accelerator.prepare(optimizer)

    def learners(self) -> Learners:
        """What is trained, by name: the adapter's weights, and those of the discriminator's heads."""
        found = {"adapter": self.adapter.named_parameters()}
        if self.engine.adversary:
            found["discriminator"] = dict(self.engine.adversary.heads.named_parameters())
        return found

    def updated(self, step: int, steps: int) -> None:
        """Take in the weights after update `step` (from 1) of `steps`."""
        if self.average:
            self.average.update(step)
        self.engine.updated(step, (step - 1) / steps, step / steps)

    def weights(self) -> dict[str, Tensor]:
        """What is exported: the average where there is one."""
        return {n: w.cpu() for n, w in self.average.weights.items()} if self.average else self.adapter.state()

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by group, and facts for JSON."""
        groups = {
            "adapter": self.adapter.state(),
            "optimizer": optimizer_tensors(self.optimizer.optimizer, self._names()),
            "average": self.average.weights if self.average else {},
            "discriminator": self.learners().get("discriminator", {}),
            **self.engine.state(),
        }
        scaler = self.accelerator.scaler
        return groups, {"scaler": scaler.state_dict() if scaler else None}

    def load(self, groups: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
        """Put `state` back. Raises ValueError for one of another adapter, or without this one's discriminator."""
        self.adapter.load(groups["adapter"])
        if self.engine.adversary:
            self._load_heads(groups.get("discriminator", {}))
        load_optimizer_tensors(self.optimizer.optimizer, groups.get("optimizer", {}), self._names())
        if self.average:
            self.average.weights = {n: w.to(self.engine.base.device) for n, w in groups["average"].items()}
        self.engine.load(groups)
        if self.accelerator.scaler and facts["scaler"]:
            self.accelerator.scaler.load_state_dict(facts["scaler"])

    def _load_heads(self, saved: dict[str, Tensor]) -> None:
        heads = self.learners()["discriminator"]
        missing = sorted(heads.keys() ^ saved.keys())
        if missing:
            raise ValueError(
                "The checkpoint lacks the discriminator of this adversarial run "
                f"({len(missing)} tensors differ, such as {missing[0]}); without it the run would not go on as it was. "
                "Use another output folder to start anew, or delete the folder."
            )
        with torch.no_grad():
            for name, parameter in heads.items():
                parameter.copy_(saved[name])

    def _names(self) -> list[str]:
        """The learners' parameters in the optimizer's order."""
        return [name for learner in self.learners().values() for name in learner]
