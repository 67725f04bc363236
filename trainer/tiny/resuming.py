"""Long makings that can be killed: what they save, how far they are, and how fast their rates fall.

A making draws every random number of a step from the step's own generator (`random_of`), so that its state is no
more than tensors and a few numbers, and a run that was killed goes on to the same bits.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ...samplers.writing import written_whole

LINE_EVERY = 30.0  # seconds between two lines on the progress
SAVE_EVERY = 120.0  # seconds between two states written


class Stage:
    """How far a stage is, in steps or, with minutes, in the time that it has run; it times its lines and states too.

    minutes: of wall-clock time for the whole stage, however many steps they hold; those of earlier starts count.
    """

    def __init__(self, name: str, steps: int, minutes: float | None = None):
        self.name, self.steps, self.minutes = name, steps, minutes
        self.step, self.before = 0, 0.0  # steps done, and seconds that earlier starts took
        self.start = self.line_at = self.save_at = time.monotonic()
        self.first = 0  # the step that this start began with

    @property
    def seconds(self) -> float:
        """What the stage has taken so far, all starts together."""
        return self.before + time.monotonic() - self.start

    @property
    def share(self) -> float:
        """The part of the stage that is done, 0 to 1."""
        return min(1.0, self.seconds / (60 * self.minutes) if self.minutes else self.step / self.steps)

    def go_on(self, facts: Mapping[str, Any]) -> None:
        """Continue where the state with these facts (`facts`) was written."""
        self.step = self.first = facts["step"]
        self.before = facts["seconds"]

    @property
    def facts(self) -> dict[str, Any]:
        """What a later start must know."""
        return {"step": self.step, "seconds": self.seconds}

    def advance(self, loss: float) -> None:
        """Count a step, and say how far the stage is where the last line is half a minute old."""
        self.step += 1
        now = time.monotonic()
        if now - self.line_at >= LINE_EVERY or self.share >= 1:
            self.line_at = now
            speed = (self.step - self.first) / max(now - self.start, 1e-9)
            left = self.minutes * 60 - self.seconds if self.minutes else (self.steps - self.step) / speed
            print(
                f"{self.name}: step {self.step}, {100 * self.share:.1f} %, loss {loss:.4f}, {speed:.2f} steps/s, "
                f"{max(left, 0) / 60:.1f} minutes left",
                flush=True,
            )

    def is_due(self) -> bool:
        """Whether it is time to write the state."""
        if time.monotonic() - self.save_at < SAVE_EVERY:
            return False
        self.save_at = time.monotonic()
        return True


def random_of(name: str, step: int) -> torch.Generator:
    """The random numbers of one step of a stage."""
    seed = int.from_bytes(name.encode()[:4], "big") << 24
    return torch.Generator().manual_seed(seed + step)


def rate(share: float, step: int, warm_up: int = 100, constant: float = 0.4) -> float:
    """The learning rate's factor: a warm-up in steps, constant up to this share of the stage, then a cosine to zero."""
    fall = max(0.0, share - constant) / (1 - constant)
    return min(1.0, (step + 1) / warm_up) * math.cos(fall * math.pi / 2)


def save_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and facts (what JSON holds) as one .safetensors file, whole or not at all."""
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"facts": json.dumps(facts)})
    with written_whole(path) as part:
        part.write_bytes(content)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and facts of a file that `save_state` wrote; None where there is none."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["facts"])


def tensors_of(modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All tensors of modules and optimizers under names that tell them apart."""
    tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{number}.{key}": value for key, value in state.items()}
    return tensors


def put_back(
    tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> None:
    """Load what `tensors_of` gave into the same modules and optimizers."""
    for name, module in modules.items():
        module.load_state_dict({key: tensors[f"{name}.{key}"] for key in module.state_dict()})
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"{name}."):
                _, number, leaf = key.split(".", 2)
                state.setdefault(int(number), {})[leaf] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
