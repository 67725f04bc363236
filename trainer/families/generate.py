"""Sampling over a loaded base with the very functions that run inside ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...samplers import Recipe, sample_dpmpp_2m, sample_phased, x0_eps_from_output
from ...samplers.editing import noised
from ...samplers.sampling import NoiseSampler, Projection
from ...samplers.schedule import rows
from ..objectives import tells_target_time
from . import Base, Condition
from .base import Alone


def unit_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Noise of this shape from a seed, drawn on the CPU, so that it is the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def probe(base: Base) -> tuple[Tensor, Tensor]:
    """A noisy point (1, C, h, w) and its tick (1,), halfway up the schedule: where two forms of a network are compared.

    It is the same for every call, so that a figure of one run can be set beside that of another.
    """
    x = unit_noise((1, *base.latent_shape(base.default_resolution)), seed=0)
    tick = torch.tensor([base.schedule.ticks // 2])
    return x.to(base.device), tick.to(base.device)


def predict(base: Base, x: Tensor, tick: Tensor, condition: Condition, min_alpha: float = 0.0) -> tuple[Tensor, Tensor]:
    """(x0, eps) that the network sees in points x at ticks (B,); min_alpha: see `x0_eps_from_output`."""
    schedule = base.schedule
    output = base.denoise(x, tick, condition)
    return x0_eps_from_output(output, x, schedule.alpha(tick), schedule.sigma(tick), base.prediction, min_alpha)


def sampling_model(
    base: Base,
    condition: Condition,
    null: Condition | None = None,
    guidance: float = 1.0,
    ends: dict[int, int] | None = None,
) -> Callable[..., Tensor]:
    """The host's `model(x, sigma) -> x0` over a base, with its adapter as it stands, for the functions of `samplers`.

    condition: prompts' encodings (B, ...); null: (1, ...), needed where guidance is not 1. x is in the host's
    convention: x / alpha for VP. One batch holds both halves of the guidance. ends: for a network that is to be told
    where its jumps end, the tick of that by the tick of the start.
    """
    schedule = base.schedule

    def model(x: Tensor, sigma: Tensor, **_) -> Tensor:
        tick = schedule.tick(sigma).round().long()
        point = x * rows(schedule.k_scale(sigma).to(x.device), x)
        inputs = condition
        if ends:
            inputs = condition | base.target_time(tick.new_tensor([ends[t] for t in tick.tolist()]))
        if guidance == 1:
            return predict(base, point, tick, inputs)[0]
        both = base.with_null(inputs, null)
        cond, uncond = predict(base, torch.cat([point, point]), tick.repeat(2), both)[0].chunk(2)
        return uncond + guidance * (cond - uncond)

    return model


def generate(
    base: Base,
    condition: Condition,
    null: Condition,
    noise: Tensor,
    ticks: tuple[int, ...],
    guidance: float = 1.0,
    gamma: float = 0.0,
    min_alpha: float = 0.0,
    seed: int | None = None,
    solver: str = "ddim",
    target_time: bool = False,
    start: Tensor | None = None,
    project: Projection | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Latents (B, C, h, w) sampled from unit noise like them at the levels `ticks`, with the adapter as it stands.

    solver: "dpm++" is DPM-Solver++(2M), which knows neither gamma nor min_alpha; any other is first order, the phase
    jump that DDIM and Euler are too. target_time: tell the network where each jump ends, if it has an input for it, as
    the objective of the same class variable trained it. start: clean latents that the noise is put on, for an edit.
    project, noise_sampler: see `sample_phased`.
    """
    schedule, device = base.schedule, base.device
    sigmas = schedule.k_sigma(torch.tensor(ticks)).to(device)
    noise = noise.to(device)
    x = noised(torch.zeros_like(noise) if start is None else start.to(device), noise, sigmas[0], schedule)
    ends = {tick: round((1 - gamma) * end) for tick, end in zip(ticks[:-1], ticks[1:], strict=True)}
    model = sampling_model(base, condition, null, guidance, ends if target_time else None)
    if solver == "dpm++":
        return sample_dpmpp_2m(model, x, sigmas, schedule=schedule)
    return sample_phased(
        model,
        x,
        sigmas,
        schedule=schedule,
        extra_args={} if seed is None else {"seed": seed},
        gamma=gamma,
        min_alpha=min_alpha,
        project=project,
        noise_sampler=noise_sampler,
    )


def draw(
    base: Base,
    usual: Recipe | Alone,
    condition: Condition,
    null: Condition,
    noise: Tensor,
    ticks: tuple[int, ...],
    *,
    guidance: float | None = None,
    gamma: float | None = None,
    seed: int | None = None,
    start: Tensor | None = None,
    project: Projection | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Latents (B, C, h, w) by `generate`, as a LoRA's recipe says, or as the base is sampled `alone`.

    Whatever draws with a LoRA does it by this function, so that previews, `pcm sample`, `pcm evaluate` and `pcm edit`
    cannot differ. guidance, gamma: None is what `usual` says.
    """
    return generate(
        base,
        condition,
        null,
        noise,
        ticks,
        guidance=usual.guidance if guidance is None else guidance,
        gamma=usual.gamma if gamma is None else gamma,
        min_alpha=usual.min_alpha,
        seed=seed,
        target_time=isinstance(usual, Recipe) and tells_target_time(usual.objective),
        start=start,
        project=project,
        noise_sampler=noise_sampler,
    )
