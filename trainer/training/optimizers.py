"""The optimizers that a run may take, each from a library that keeps it, and the learning rate's way."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.config import Config
from ..lora.adapter import Learner
from .opponent import Opponent

STUDENT = "adapter"
# "adapter", or the opponent's name -> its parameters by name
Learners = dict[str, dict[str, torch.nn.Parameter]]
LEAST_FACTOR = 0.1  # of Prodigy's rate, below which it hardly learns
SCHEDULE_FREE, PRODIGY = "schedulefree", "prodigy"


class Library(NamedTuple):
    """Where an optimizer comes from: its class, the module, the package to install, and the extra that brings it."""

    name: str
    module: str
    package: str = ""
    extra: str = ""


SOURCES = {
    "adamw": Library("AdamW", "torch.optim"),
    "adafactor": Library("Adafactor", "torch.optim"),
    "adamw8bit": Library("AdamW8bit", "bitsandbytes.optim", "bitsandbytes", "quantize"),
    "lion": Library("Lion", "lion_pytorch", "lion-pytorch", "optimizers"),
    PRODIGY: Library("Prodigy", "prodigyopt", "prodigyopt", "optimizers"),
    SCHEDULE_FREE: Library("AdamWScheduleFree", "schedulefree", "schedulefree", "optimizers"),
}
# in torch.optim, and not for a LoRA: they want a function of the loss, or gradients that are mostly 0
UNFIT = ("LBFGS", "SparseAdam")
OF_TORCH = [  # the classes of torch.optim that may be named
    name
    for name, kind in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer and name not in UNFIT
]


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer of this name: of `SOURCES`, or a class of torch.optim.

    Raises ValueError where its package is not installed, with the extra that brings it, and for another name.
    """
    if name not in SOURCES:
        if name in OF_TORCH:
            return getattr(torch.optim, name)
        plain = {other.lower(): other for other in (*OF_TORCH, *SOURCES)}
        near = difflib.get_close_matches(name.lower().removeprefix("torch.optim."), plain, n=1)
        hint = f" Did you mean {plain[near[0]]}?" if near else ""
        raise ValueError(
            f"train.optimizer is {name!r}; available: {', '.join(SOURCES)}, and the classes of torch.optim but for "
            f"{' and '.join(UNFIT)}.{hint}"
        )
    source = SOURCES[name]
    try:
        return getattr(importlib.import_module(source.module), source.name)
    except ImportError as error:
        raise ValueError(
            f'train.optimizer={name} needs {source.package}: pip install "phased-consistency[{source.extra}]", or use '
            "adamw."
        ) from error


def check_optimizer(config: Config) -> None:
    """Raise ValueError as `optimizer_class`, and for settings that the optimizer makes nothing of."""
    train = config.train
    optimizer_class(train.optimizer)
    if train.optimizer in (PRODIGY, SCHEDULE_FREE) and config.objective.matching:
        raise ValueError(
            f"train.optimizer={train.optimizer} counts every update as one of all weights, and the critic of "
            f"{config.objective.name} has more of them than the student: use another optimizer."
        )
    if train.optimizer == PRODIGY:
        if train.lr < LEAST_FACTOR:
            raise ValueError(
                f"train.optimizer=prodigy finds the learning rate itself and multiplies it by train.lr, which is "
                f"{train.lr:g}: set train.lr=1."
            )
        if config.adversarial.weight:
            raise ValueError(
                "train.optimizer=prodigy finds one learning rate, and adversarial.weight trains a discriminator at its "
                "own: use another optimizer, or set adversarial.weight=0."
            )
    if train.optimizer == SCHEDULE_FREE and (train.ema or train.lr_schedule != "constant"):
        setting = f"train.ema={train.ema:g}" if train.ema else f"train.lr_schedule={train.lr_schedule}"
        raise ValueError(
            f"train.optimizer=schedulefree averages the weights itself, in place of a falling rate and of an average: "
            f"{setting} does not go with it. Leave it out."
        )


def check_takes(config: Config, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Raise ValueError where the optimizer does not take these parameters, which need no memory."""
    try:
        optimizer_class(config.train.optimizer)([{"params": parameters}])
    except (ValueError, TypeError) as error:
        raise not_taken(config, error) from error


def not_taken(config: Config, error: Exception) -> ValueError:
    """What to raise where an optimizer fails so at what it is to train."""
    return ValueError(
        f"train.optimizer={config.train.optimizer} does not take the weights of this run: {error} Use another."
    )


def make_optimizer(
    config: Config, learners: Learners, opponent: Opponent | None, device: torch.device
) -> torch.optim.Optimizer:
    """One optimizer with a group for each learner, so that fp16's one gradient scaler serves both.

    Raises ValueError as `optimizer_class`, and where it does not take weights such as these.
    """
    kind = optimizer_class(config.train.optimizer)
    known = inspect.signature(kind.__init__).parameters
    student = {"lr": config.train.lr, "weight_decay": config.train.weight_decay}
    if config.objective.matching:
        student["betas"] = (config.objective.beta1, 0.999)
    settings = {STUDENT: student} | ({opponent.name: opponent.optimizer_settings(config)} if opponent else {})
    groups = [
        {"params": list(parameters.values()), "learner": name, "full_lr": settings[name]["lr"]}
        | {key: value for key, value in settings[name].items() if key in known}
        for name, parameters in learners.items()
    ]
    fused = {"fused": True} if kind is torch.optim.AdamW and device.type in ("cpu", "cuda") else {}
    try:
        optimizer = kind(groups, **fused)
    except (ValueError, TypeError) as error:
        raise not_taken(config, error) from error
    if config.train.optimizer == SCHEDULE_FREE:
        optimizer.train()
    return optimizer


class ScheduleFreeWeights:
    """The averaged weights that a schedule-free optimizer keeps beside those that it steps on.

    It takes the place of `adapter.Average`, and nothing of it is saved: it is in the optimizer's state.
    """

    def __init__(self, adapter: Learner, optimizer: torch.optim.Optimizer):
        self.adapter, self.optimizer = adapter, optimizer

    def update(self, step: int) -> None:
        """Nothing: the optimizer has done it."""

    @property
    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """A copy of the averaged weights by name, where they are; those that are trained stay as they are."""
        present = self.adapter.copy()
        self.optimizer.eval()
        averaged = self.adapter.copy()
        self.optimizer.train()
        for name, parameter in self.adapter.named_parameters().items():
            parameter.copy_(present[name])
        return averaged


def lr_factor(config: Config, step: int) -> float:
    """Warm-up and schedule at update `step` (from 1), the same for every learner."""
    train, objective = config.train, config.objective
    warm = min(1.0, step / (train.warmup + 1))
    done = (step - 1) / train.steps
    if train.lr_schedule == "restarts":
        done = done * (train.lr_restarts + 1) % 1
    if train.lr_schedule == "stages":
        done = done * objective.stage_count() - objective.stage(done)
    by_cosine = 0.5 * (1 + math.cos(math.pi * done))
    falling = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": by_cosine,
        "restarts": by_cosine,
        "stages": by_cosine,
    }
    return warm * falling[train.lr_schedule]
