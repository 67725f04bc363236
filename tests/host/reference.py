"""What diffusers makes of the same weights, noise, text and steps, at the start that the host tests use: seed 7."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    TCDScheduler,
    UNet2DConditionModel,
)
from torch import Tensor

from host.helper_nodes import TestConditioning
from phased_consistency.samplers.schedule import TERMINAL_ALPHA_BAR


def noise(channels: int) -> Tensor:
    return torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(7))


def conditioning(width: int, pooled: int = 2048) -> tuple[Tensor, Tensor]:
    """Text and pooled text as the graphs' positive prompt has them."""
    ((text, extra),) = TestConditioning().make(1, width, pooled)[0]
    return text, extra["pooled_output"]


@torch.no_grad()
def ddim(unet: UNet2DConditionModel, text: Tensor, steps: int = 4, added: Any = None, **options: Any) -> Tensor:
    """The latent by diffusers' DDIM, as the model works on it; with zero terminal SNR it ends where the host does."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        **options,
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.clamp(min=TERMINAL_ALPHA_BAR)
    scheduler.set_timesteps(steps)
    x = noise(4)
    for t in scheduler.timesteps:
        output = unet(x, t, encoder_hidden_states=text, added_cond_kwargs=added).sample
        x = scheduler.step(output, t, x).prev_sample
    return x


@torch.no_grad()
def tcd(unet: UNet2DConditionModel, text: Tensor, gamma: float, steps: int = 4) -> Tensor:
    """The latent by diffusers' TCD, with the noise that our nodes draw, and its last step taken on to x0 as theirs."""
    scheduler = TCDScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(steps)
    x, generator = noise(4), torch.Generator().manual_seed(8)
    for t in scheduler.timesteps:
        eps = unet(x, t, encoder_hidden_states=text).sample
        x = scheduler.step(eps, t, x, eta=gamma, generator=generator).prev_sample
    alpha_bar = scheduler.alphas_cumprod[0]
    return (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()


@torch.no_grad()
def flow_euler(transformer: SD3Transformer2DModel, text: Tensor, pooled: Tensor, sigmas: list[float]) -> Tensor:
    """The latent by diffusers' Euler for flow at these sigmas (without the last, 0), as the model works on it."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=sigmas)
    x = noise(16)
    for t in scheduler.timesteps:
        output = transformer(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t.expand(1)).sample
        x = scheduler.step(output, t, x).prev_sample
    return x
