"""Stub networks with closed forms: a Gaussian has an exact denoiser and an exact flow, and so has a single point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from phased_consistency.samplers import FlowSchedule, Schedule, VPSchedule, output_from_x0_eps
from phased_consistency.trainer.families import Base

MEAN, NULL_MEAN, STD = 0.7, -0.2, 0.4  # of the data: with their prompt, without one; and their spread
NULL = {"hidden": torch.full((1, 1), NULL_MEAN)}
VP, ZERO_SNR, FLOW = VPSchedule.from_betas(), VPSchedule.from_betas(zero_terminal_snr=True), FlowSchedule(3.0)
SCHEDULES = pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(VP, "epsilon"), (ZERO_SNR, "v_prediction"), (FLOW, "flow")],
    ids=["vp-eps", "zero-snr-v", "flow"],
)
Network = Callable[[Tensor, Tensor, dict], tuple[Tensor, Tensor]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Switch:
    """Stands for the adapter: on, or off inside `off()`."""

    on = True

    @contextmanager
    def off(self) -> Iterator[None]:
        self.on = False
        try:
            yield
        finally:
            self.on = True


class Gaussian:
    """Exact (x0, eps) and exact probability-flow map for N(m, std^2) data; the prompt says m. std 0 is one picture."""

    def __init__(self, schedule: Schedule, std: float = STD):
        self.schedule, self.std = schedule, std

    def level(self, tick: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(c(tick).view(-1, 1, 1, 1) for c in (self.schedule.alpha, self.schedule.sigma))

    def __call__(self, x: Tensor, tick: Tensor, condition: dict) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.level(tick)
        mean, variance = condition["hidden"].view(-1, 1, 1, 1), self.std**2
        x0 = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)
        return x0, (x - alpha * x0) / sigma

    def flow(self, x: Tensor, tick: Tensor, to: Tensor, mean: float = MEAN) -> Tensor:
        (alpha, sigma), (alpha_to, sigma_to) = self.level(tick), self.level(to)
        std, std_to = ((a**2 * self.std**2 + s**2).sqrt() for a, s in ((alpha, sigma), (alpha_to, sigma_to)))
        return alpha_to * mean + std_to / std * (x - alpha * mean)

    def landing(self, to: Callable[[Tensor], Tensor], shift: Callable[[Tensor], Tensor] | float = 0.0) -> Network:
        """What a perfect training would give: the jump from each tick to `to(tick)` lands on the exact flow.

        shift: how far x0 is moved off that, at each tick (B,).
        """

        def network(x: Tensor, tick: Tensor, condition: dict) -> tuple[Tensor, Tensor]:
            end = condition["target_time"] if "target_time" in condition else to(tick)
            (alpha, sigma), (alpha_to, sigma_to) = self.level(tick), self.level(end)
            x0 = (self.flow(x, tick, end) - sigma_to / sigma * x) / (alpha_to - sigma_to / sigma * alpha)
            x0 = x0 + (shift(tick).view(-1, 1, 1, 1) if callable(shift) else shift)
            return x0, (x - alpha * x0) / sigma

        return network


class StubBase:
    """What the engine asks of a base; notes each call's rows, switch and gradient mode.

    tells_time: whether the network is told where its jump ends.
    """

    with_null = staticmethod(Base.with_null)
    device = torch.device("cpu")

    def __init__(
        self, schedule: Schedule, prediction: str, switch: Switch, teacher: Network, student: Network, tells_time=False
    ):
        self.schedule, self.prediction, self.switch = schedule, prediction, switch
        self.teacher, self.student, self.tells_time, self.calls = teacher, student, tells_time, []

    def target_time(self, tick: Tensor) -> dict[str, Tensor]:
        return {"target_time": tick} if self.tells_time else {}

    def denoise(self, x: Tensor, tick: Tensor, condition: dict) -> Tensor:
        assert len(x) == len(tick) == len(condition["hidden"])
        self.calls.append((len(x), self.switch.on, torch.is_grad_enabled()))
        x0, eps = (self.student if self.switch.on else self.teacher)(x, tick, condition)
        level = self.schedule.alpha(tick), self.schedule.sigma(tick)
        return output_from_x0_eps(x0, eps, *level, self.prediction)
