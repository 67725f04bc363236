"""The samplers, in the host's form: `sample_<name>(model, x, sigmas, *, ...)` with `model(x, sigma) -> x0`.

x: (B, C, H, W), a point at level sigmas[0] in the host's convention. sigmas: (n + 1,), decreasing, in that convention
(`Schedule.k_sigma`). The result is in fp32, and so is all algebra. When the last sigma is 0 the result is the last x0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .schedule import Schedule, VPSchedule, eps_of, extrapolated, jump, renoise

NoiseSampler = Callable[[Tensor, Tensor], Tensor]
Projection = Callable[[Tensor, int], Tensor]  # x0 and the number of steps still to come -> x0 as it may be


def seeded_noise(x: Tensor, seed: int) -> NoiseSampler:
    """Noise like x for each re-noising, drawn on the CPU so that a seed gives one picture on every device.

    The generator starts at seed + 1, as the host's does: seed itself has usually drawn the starting noise.
    """
    generator = torch.Generator().manual_seed((seed + 1) % 2**64)
    return lambda sigma, sigma_next: torch.randn(x.shape, generator=generator).to(x.device)


@torch.no_grad()
def sample_phased(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    *,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    schedule: Schedule,
    gamma: float = 0.0,
    min_alpha: float = 0.0,
    project: Projection | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Phase jumps from edge to edge (PCM, arXiv 2405.18407, Sec. 3.1), with TCD's noise (arXiv 2402.19159, Alg. 4).

    Each step jumps to level p between the next level n and the clean end, then re-noises from p to n:
    tick_p = (1 - gamma) * tick_n. gamma 0 lands on n with no noise (DDIM, PCM's deterministic mode); gamma 1 takes all
    noise fresh (LCM's). min_alpha: the clamp that `x0_eps_from_output` has, for a model that hands back the unclamped
    x0 as the host's do. project: what every x0 must agree with (`editing`); eps is then the noise that x holds beside
    the projected x0. `disable` is the host's progress-bar switch and is not used here.
    Raises ValueError for gamma outside [0, 1], for gamma > 0 without a `noise_sampler` or a seed in `extra_args`, and
    for a min_alpha on a flow schedule.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be between 0 (deterministic) and 1 (all noise fresh); got {gamma}.")
    if min_alpha and not isinstance(schedule, VPSchedule):
        raise ValueError(
            f"min_alpha {min_alpha:g} is for eps-prediction; a flow model divides by no alpha. Set it to 0."
        )
    extra_args = extra_args or {}
    if gamma > 0 and noise_sampler is None:
        noise_sampler = _noise_from_seed(x, extra_args)
    x = x.float()
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        x0 = model(x, sigma * x.new_ones(x.shape[0]), **extra_args).float()
        eps = (x - schedule.k_alpha(sigma) * x0) / sigma
        x0 = x0 * clamp_factor(schedule, sigma, min_alpha)
        if project is not None:
            x0 = project(x0, len(sigmas) - 2 - i)
            eps = (x - schedule.k_alpha(sigma) * x0) / sigma
        _report(callback, x, i, sigma, x0)
        if sigma_next == 0:
            x = x0
            continue
        sigma_p = (
            sigma_next if gamma == 0 else schedule.k_sigma((1 - gamma) * schedule.tick(sigma_next.cpu())).to(sigma)
        )
        x = schedule.k_alpha(sigma_p) * x0 + sigma_p * eps
        if gamma > 0:
            levels = (schedule.k_alpha(sigma_p), sigma_p, schedule.k_alpha(sigma_next), sigma_next)
            x = renoise(x, noise_sampler(sigma_p, sigma_next), *levels)
    return x


@torch.no_grad()
def sample_consistency(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    *,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    schedule: Schedule,
    min_alpha: float = 0.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Multistep consistency sampling (CM, arXiv 2303.01469, Alg. 1): to x0, then fresh noise at the next level.

    This is PCM's stochastic mode and LCM's sampler, and `sample_phased` at gamma 1.
    """
    return sample_phased(
        model,
        x,
        sigmas,
        extra_args=extra_args,
        callback=callback,
        disable=disable,
        schedule=schedule,
        gamma=1.0,
        min_alpha=min_alpha,
        noise_sampler=noise_sampler,
    )


@torch.no_grad()
def sample_dpmpp_2m(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    *,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    schedule: Schedule,
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, Alg. 2): second order at one evaluation a step, for models that were not
    distilled. The first step, and one that ends at 0, are of first order. `disable` is not used here."""
    before = None
    x = x.float()
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        x0 = model(x, sigma * x.new_ones(x.shape[0]), **(extra_args or {})).float()
        _report(callback, x, i, sigma, x0)
        level, level_next = (schedule.k_alpha(sigma), sigma), (schedule.k_alpha(sigma_next), sigma_next)
        along = extrapolated(x0, *(before or (x0, level)), level, level_next)
        before = (x0, level)
        x = jump(along, eps_of(x, along, *level), *level_next)
    return x


SAMPLERS = {"phased": sample_phased, "consistency": sample_consistency}


def clamp_factor(schedule: Schedule, k_sigma: Tensor, min_alpha: float) -> Tensor:
    """What the clamp of arXiv 2405.18407, Eq. 39, multiplies an unclamped x0 by: alpha / max(alpha, min_alpha)."""
    alpha = schedule.k_scale(k_sigma)  # of a VP point in the network's convention; flow has no clamp
    return alpha / alpha.clamp(min=min_alpha)


def _noise_from_seed(x: Tensor, extra_args: dict[str, Any]) -> NoiseSampler:
    seed = extra_args.get("seed")
    if seed is None:
        raise ValueError("Stochastic sampling needs a noise_sampler, or a seed in extra_args; got neither.")
    return seeded_noise(x, seed)


def _report(callback: Callable[[dict[str, Any]], None] | None, x: Tensor, i: int, sigma: Tensor, x0: Tensor) -> None:
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": x0})
