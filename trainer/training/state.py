"""Everything that an update changes: what a checkpoint must hold for a run to go on exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config.config import Config
from ..lora.adapter import Average, Learner
from .engine import Engine
from .optimizers import SCHEDULE_FREE, STUDENT, Learners, ScheduleFreeWeights, make_optimizer


class Trained:
    """What training changes: the adapter with its average, its opponent, the optimizer, fp16's scale, and what the
    objective keeps of earlier weights."""

    def __init__(self, config: Config, accelerator: Accelerator, adapter: Learner, engine: Engine):
        self.adapter = adapter
        self.engine = engine
        self.accelerator = accelerator
        optimizer = make_optimizer(config, self.learners(), engine.opponent, engine.base.device)
        self.optimizer = accelerator.prepare(optimizer)
        self.average: Average | ScheduleFreeWeights | None = None
        if config.train.optimizer == SCHEDULE_FREE:
            self.average = ScheduleFreeWeights(adapter, optimizer)
        elif config.train.ema:
            self.average = Average(adapter, config.train.ema)

    def learners(self) -> Learners:
        """The weights that the optimizer changes: the adapter's, and those of its opponent."""
        opponent = self.engine.opponent
        return {STUDENT: self.adapter.named_parameters()} | (
            {opponent.name: opponent.named_parameters()} if opponent else {}
        )

    def updated(self, step: int, steps: int) -> None:
        """Take in the weights after update `step` (from 1) of `steps`."""
        if self.average:
            self.average.update(step)
        self.engine.updated(step, (step - 1) / steps, step / steps, self.average)

    def weights(self) -> dict[str, Tensor]:
        """The weights to export, on the CPU: the average where there is one."""
        if self.average:
            return {name: weight.cpu() for name, weight in self.average.weights.items()}
        return self.adapter.state()

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by group, and facts for JSON."""
        groups = {
            "adapter": self.adapter.state(),
            "optimizer": optimizer_tensors(self.optimizer.optimizer, self._names()),
            "average": self.average.weights if isinstance(self.average, Average) else {},
            **(self.engine.opponent.state() if self.engine.opponent else {}),
            **self.engine.state(),
        }
        scaler = self.accelerator.scaler
        facts = {"kind": type(self.optimizer.optimizer).__name__, "numbers": group_numbers(self.optimizer.optimizer)}
        return groups, {"scaler": scaler.state_dict() if scaler else None, "optimizer": facts}

    def load(self, groups: dict[str, dict[str, Tensor]], facts: dict[str, Any], changed: bool = False) -> list[str]:
        """Put a checkpoint's `state` back, and return what it held nothing for, which begins anew.

        changed: whether the checkpoint may be of other settings, and so lack something. Raises ValueError for one of
        another adapter, and unless `changed` for one that lacks something.
        """
        self._load_adapter(groups["adapter"])
        of_optimizer = groups.get("optimizer", {})
        kept = self._load_optimizer(of_optimizer, facts.get("optimizer") or earlier_facts(of_optimizer), changed)
        anew = [] if kept else ["the optimizer's state"]

        opponent = self.engine.opponent
        needed = {
            **({opponent.name: True} if opponent else {}),
            "average": isinstance(self.average, Average),
            "target": bool(self.engine.average),
        }
        lacking = [group for group, is_needed in needed.items() if is_needed and not groups.get(group)]
        if lacking and not changed:
            raise ValueError(
                f"The checkpoint lacks the {' and the '.join(lacking)} of this run; without it the run would not go on "
                "as it was. Use another output folder to start anew, or delete the folder."
            )

        if opponent and opponent.name not in lacking:
            opponent.load(groups)
        # an average that is new here begins at the weights that the run has come to
        if isinstance(self.average, Average):
            saved = groups["adapter" if "average" in lacking else "average"]
            self.average.weights = {n: w.to(self.engine.base.device) for n, w in saved.items()}
        self.engine.load(groups | ({"target": groups["adapter"]} if "target" in lacking else {}))
        if self.accelerator.scaler and facts["scaler"]:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        return anew + [f"the {group}" for group in lacking]

    def _load_adapter(self, saved: dict[str, Tensor]) -> None:
        try:
            self.adapter.load(saved)
        except ValueError as error:
            raise ValueError(
                f"{error} A run's base and lora.rank cannot change. Set them back, or use another output folder."
            ) from error

    def _load_optimizer(self, saved: dict[str, Tensor], facts: dict[str, Any], changed: bool) -> bool:
        """Put the optimizer's state back; returns whether that could be done.

        facts: its class, and the numbers of its groups. changed: with other settings some weights may be new, or the
        whole optimizer.
        """
        names, optimizer = self._names(), self.optimizer.optimizer
        if changed:
            if facts["kind"] != type(optimizer).__name__:
                return not saved
            saved = {key: value for key, value in saved.items() if key.split("/")[0] in names}
        load_optimizer_tensors(optimizer, saved, names)
        for group, numbers in zip(optimizer.param_groups, facts["numbers"], strict=False):
            group.update(numbers)
        return True

    def _names(self) -> list[str]:
        """The learners' parameters in the optimizer's order."""
        return [name for learner in self.learners().values() for name in learner]


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """An optimizer's state as named tensors: "<parameter>/<entry>"; numbers become 0-d tensors, and entries that hold
    more (bitsandbytes') come as "<parameter>/<entry>/<entry>"."""
    states = optimizer.state_dict()["state"]
    return {f"{names[i]}/{entry}": value for i, entries in states.items() for entry, value in _flat(entries)}


def group_numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """What an optimizer counts and estimates for each of its groups: every number that is no setting of the run's."""
    settings = ("lr", "full_lr", "weight_decay", "fused")
    return [
        {key: value for key, value in group.items() if isinstance(value, int | float) and key not in settings}
        for group in optimizer.param_groups
    ]


def earlier_facts(saved: dict[str, Tensor]) -> dict[str, Any]:
    """What a checkpoint says of its optimizer, for one written when there were AdamW and its 8-bit kin alone."""
    in_8_bits = any(key.endswith("/state1") for key in saved)
    return {"kind": "AdamW8bit" if in_8_bits else "AdamW", "numbers": []}


def _flat(entries: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of every entry of one parameter's state, nested ones by their path."""
    for entry, value in entries.items():
        if isinstance(value, dict):
            # cloned: bitsandbytes' tables are one tensor for all parameters, which a file cannot hold twice
            yield from ((path, tensor.clone()) for path, tensor in _flat(value, f"{prefix}{entry}/"))
        elif value is not None:
            yield f"{prefix}{entry}", torch.as_tensor(value)


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], names: list[str]) -> None:
    """Put into an optimizer what `optimizer_tensors` made of one like it."""
    number = {name: i for i, name in enumerate(names)}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, *within, entry = key.split("/")
        i = number[name]
        entries = states.setdefault(i, {})
        for outer in within:
            entries = entries.setdefault(outer, {})
        # in the order in which its parameter lies in memory, which fused kernels go by
        as_parameter = value.shape == parameters[i].shape and value.dtype == parameters[i].dtype
        entries[entry] = torch.empty_like(parameters[i]).copy_(value) if as_parameter else value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
