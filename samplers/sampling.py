"""The samplers, in the host's form: `sample_<name>(model, x, sigmas, *, ...)` with `model(x, sigma) -> x0`.

model: called with x (B, C, H, W) and sigma (B,), and with `extra_args` as keywords; returns x0 (B, C, H, W).
x: (B, C, H, W), a point at level sigmas[0] in the host's convention.
sigmas: (n + 1,), decreasing, in that convention (`Schedule.k_sigma`); n evaluations of the model.
callback: called at each step with x, i, sigma, sigma_hat and denoised (the step's x0), as k-diffusion does.
disable: the host's progress-bar switch, which no sampler here has a use for.
The result is in fp32, and so is all algebra. When the last sigma is 0 the result is the last x0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .schedule import Schedule, VPSchedule, eps_of, extrapolated, jump, renoise

INDEX_STEP = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: no two indices of a batch have near seeds
Denoiser = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], None]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]  # sigma from and to -> unit noise like x
Projection = Callable[[Tensor, int], Tensor]  # x0, steps still to come -> the x0 that agrees with an edit


def seeded_noise(x: Tensor, seed: int, indices: Sequence[int] | None = None) -> NoiseSampler:
    """A source of noise like x for each re-noising, drawn on the CPU: a seed is one picture on every device.

    Each picture has its own generator, by the seed and its index in the batch that it is of (`indices`, (B,); None:
    its place in x): it comes out the same alone, and in any batch. The first one's starts at seed + 1, as the host's
    does: seed itself has usually drawn the starting noise.
    """
    indices = range(len(x)) if indices is None else indices
    generators = [torch.Generator().manual_seed((seed + 1 + INDEX_STEP * index) % 2**64) for index in indices]
    if len(generators) != len(x):
        raise ValueError(f"{len(generators)} indices were given for a batch of {len(x)}; expected one for each.")

    def noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in generators]).to(x.device)

    return noise


def block_noise(x: Tensor, seed: int) -> NoiseSampler:
    """Noise as core's samplers draw it, one block for the whole batch: a picture is another one in another batch."""
    generator = torch.Generator().manual_seed((seed + 1) % 2**64)
    return lambda sigma, sigma_next: torch.randn(x.shape, generator=generator).to(x.device)


@torch.no_grad()
def sample_phased(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    schedule: Schedule,
    gamma: float = 0.0,
    min_alpha: float = 0.0,
    project: Projection | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Phase jumps from edge to edge (PCM, arXiv 2405.18407, Sec. 3.1), with TCD's noise (2402.19159, Alg. 4).

    The step from level t to the next level n makes x0 and eps of the model's output, jumps with them to level
    p between n and the clean end, x_p = alpha_p * x0 + sigma_p * eps, and re-noises from p to n. As ticks,
    p = (1 - gamma) * n. gamma 0 lands on n itself and takes no noise (DDIM, PCM's deterministic mode); gamma
    1 lands on the clean end and takes all noise fresh (LCM's, PCM's stochastic mode).

    min_alpha: the clamp of `x0_eps_from_output`, for a model that returns the unclamped x0 as the host's do.
    project: makes each x0 agree with what an edit keeps (`editing.Projected`).
    Raises ValueError for gamma outside [0, 1], for gamma > 0 without a `noise_sampler` or a seed in
    `extra_args`, and for a min_alpha on a flow schedule.
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

    # fp32 whatever the network runs in: bf16 would round a VP point at SD1.5's first sigma, 14.6, in steps of
    # 1/16, and eps at the last ones is the small difference of x and x0 over a small sigma.
    x = x.float()
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        alpha = schedule.k_alpha(sigma)
        x0 = model(x, sigma * x.new_ones(x.shape[0]), **extra_args).float()

        # eps before the clamp: it is the network's own output, which the clamp of x0 leaves as it is.
        eps = eps_of(x, x0, alpha, sigma)
        x0 = x0 * clamp_factor(schedule, sigma, min_alpha)

        if project is not None:
            steps_left = len(sigmas) - 2 - i
            x0 = project(x0, steps_left)
            # Beside another x0, x holds another noise. The old eps would bring back what was projected out.
            eps = eps_of(x, x0, alpha, sigma)
        _report(callback, x, i, sigma, x0)

        # Sigma 0 is the clean end, where the point is x0 itself. No noise is drawn for it, whatever gamma is.
        if sigma_next == 0:
            x = x0
            continue

        sigma_p = _landing_level(schedule, sigma_next, gamma)
        alpha_p = schedule.k_alpha(sigma_p)
        x = jump(x0, eps, alpha_p, sigma_p)
        if gamma > 0:
            noise = noise_sampler(sigma_p, sigma_next)
            x = renoise(x, noise, alpha_p, sigma_p, schedule.k_alpha(sigma_next), sigma_next)
    return x


def _landing_level(schedule: Schedule, sigma_next: Tensor, gamma: float) -> Tensor:
    """The level p that a step to sigma_next jumps to, in the host's convention: tick (1 - gamma) * n."""
    if gamma == 0:
        return sigma_next  # as it is: through ticks and back it would lose its last bits
    tick_next = schedule.tick(sigma_next.cpu())  # where the schedule's tables are
    return schedule.k_sigma((1 - gamma) * tick_next).to(sigma_next)


@torch.no_grad()
def sample_consistency(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    schedule: Schedule,
    min_alpha: float = 0.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Multistep consistency sampling (CM, arXiv 2303.01469, Alg. 1): to x0, then fresh noise, in turn.

    It is PCM's stochastic mode and LCM's sampler: `sample_phased` at gamma 1, whose arguments these are.
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
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    schedule: Schedule,
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, Alg. 2), for models that were not distilled.

    It is of second order at one evaluation a step: the x0 of the step before stands in for a second one. The
    first step has none before it and is of first order, and so is a step that ends at the clean level.
    """
    before = None
    x = x.float()
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        x0 = model(x, sigma * x.new_ones(x.shape[0]), **(extra_args or {})).float()
        _report(callback, x, i, sigma, x0)

        level = (schedule.k_alpha(sigma), sigma)
        level_next = (schedule.k_alpha(sigma_next), sigma_next)
        x0_before, level_before = before or (x0, level)
        x0_halfway = extrapolated(x0, x0_before, level_before, level, level_next)
        before = (x0, level)
        x = jump(x0_halfway, eps_of(x, x0_halfway, *level), *level_next)
    return x


SAMPLERS = {"phased": sample_phased, "consistency": sample_consistency}


def clamp_factor(schedule: Schedule, k_sigma: Tensor, min_alpha: float) -> Tensor:
    """alpha / max(alpha, min_alpha): PCM's clamp (arXiv 2405.18407, Eq. 39) as a factor of the unclamped x0."""
    # k_scale is alpha in the network's convention, where the division is. In
    # the host's a VP point has alpha 1.
    alpha = schedule.k_scale(k_sigma)
    return alpha / alpha.clamp(min=min_alpha)


def _noise_from_seed(x: Tensor, extra_args: dict[str, Any]) -> NoiseSampler:
    """Noise by the seed that the host hands on in `extra_args`; ValueError where there is none."""
    seed = extra_args.get("seed")
    if seed is None:
        raise ValueError("Stochastic sampling needs a noise_sampler, or a seed in extra_args; got neither.")
    return seeded_noise(x, seed)


def _report(callback: Callback | None, x: Tensor, i: int, sigma: Tensor, x0: Tensor) -> None:
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": x0})
