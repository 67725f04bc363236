"""The emoji base's autoencoder: TAESD's kind with sixteen channels, from the four of the SD1.5-type base's.

Drawings have sharper edges than shapes, so it has more blocks at low resolution, where they cost little. The new ones
start as blocks that pass their input on, and both layers at the latents as random ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from .making import SD15, bf16
from .resuming import Stage, load_state, put_back, random_of, rate, save_state, tensors_of
from .taesd import layers_of

BLOCKS = {"encoder": (1, 1, 3, 3), "decoder": (3, 3, 1, 1)}  # in each stage; none is more than TAESD's own
CROP = 64  # pixels of a side that it trains on
BATCH = 32
RATE = 1e-3
NOISE = 0.05  # added to the latents, so that the decoder is smooth


def new_vae() -> AutoencoderTiny:
    """The SD1.5-type base's autoencoder with further blocks that change nothing yet, for latents of more channels."""
    old = AutoencoderTiny.from_pretrained(SD15 / "vae", torch_dtype=torch.float32)
    vae = AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        num_encoder_blocks=BLOCKS["encoder"],
        num_decoder_blocks=BLOCKS["decoder"],
    )
    for side, blocks in BLOCKS.items():
        sources, targets = getattr(old, side).layers, getattr(vae, side).layers
        convs, stages = layers_of(side, old.config[f"num_{side}_blocks"])
        new_convs, new_stages = layers_of(side, blocks)
        for source, target in zip(convs, new_convs, strict=True):
            if sources[source].weight.shape == targets[target].weight.shape:
                targets[target].load_state_dict(sources[source].state_dict())
        for stage, new_stage in zip(stages, new_stages, strict=True):
            for source, target in zip(stage, new_stage, strict=False):
                targets[target].load_state_dict(sources[source].state_dict())
            for added in new_stage[len(stage) :]:
                nn.init.zeros_(targets[added].conv[4].weight)
                nn.init.zeros_(targets[added].conv[4].bias)
    return vae.to(memory_format=torch.channels_last)


def train_vae(pixels: Tensor, stage: Stage, state: Path) -> AutoencoderTiny:
    """Train it on crops of uint8 pixels (N, 3, H, W), going on from `state` where that file is."""
    torch.manual_seed(0)  # for the added blocks
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, weight_decay=1e-4)
    if saved := load_state(state):
        put_back(saved[0], {"vae": vae}, {"adamw": optimizer})
        stage.go_on(saved[1])
    while stage.share < 1:
        random = random_of("vae", stage.step)
        loss = vae_loss(vae, crops(pixels, random), random)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * rate(stage.share, stage.step)
        optimizer.step()
        stage.advance(loss.item())
        if stage.is_due() or stage.share >= 1:
            save_state(state, tensors_of({"vae": vae}, {"adamw": optimizer}), stage.facts)
    return vae.eval().requires_grad_(False)


def kept_vae(state: Path) -> AutoencoderTiny:
    """The autoencoder that `train_vae` wrote there. Raises FileNotFoundError where it did not."""
    saved = load_state(state)
    if saved is None:
        raise FileNotFoundError(f"There are encoded pictures, but no autoencoder at {state}: remove {state.parent}.")
    vae = new_vae()
    put_back(saved[0], {"vae": vae}, {})
    return vae.eval().requires_grad_(False)


def crops(pixels: Tensor, random: torch.Generator) -> Tensor:
    """A batch of random crops, (BATCH, 3, CROP, CROP) in [-1, 1]."""
    index = torch.randint(len(pixels), (BATCH,), generator=random)
    corners = torch.randint(pixels.shape[-1] - CROP + 1, (BATCH, 2), generator=random)
    cut = [pixels[i, :, y : y + CROP, x : x + CROP] for i, (y, x) in zip(index, corners, strict=True)]
    return torch.stack(cut).to(memory_format=torch.channels_last).float().div(127.5).sub(1)


def vae_loss(vae: AutoencoderTiny, image: Tensor, random: torch.Generator) -> Tensor:
    """L1, squared error and the error of edges, in bf16; a little weight on the latents keeps their size."""
    with bf16():
        latents = vae.encoder(image)
        noise = torch.randn(latents.shape, generator=random)
        decoded = vae.decoder(latents + NOISE * noise).float()
    edges = sum(F.l1_loss(decoded.diff(dim=axis), image.diff(dim=axis)) for axis in (2, 3))
    size = latents.float().square().mean()
    return F.l1_loss(decoded, image) + 5 * F.mse_loss(decoded, image) + 1.5 * edges + 1e-2 * size


@torch.no_grad()
def encode(vae: AutoencoderTiny, pixels: Tensor) -> Tensor:
    """Unscaled latents (N, 16, H/8, W/8) of uint8 pixels."""
    with bf16():
        images = (chunk.to(memory_format=torch.channels_last) for chunk in pixels.split(64))
        return torch.cat([vae.encoder(image.float().div(127.5).sub(1)).float() for image in images])


def psnr(vae: AutoencoderTiny, pixels: Tensor) -> float:
    """The reconstructions' peak signal-to-noise ratio in dB, averaged over uint8 pictures (N, 3, H, W)."""
    with torch.no_grad():
        decoded = vae.decoder(encode(vae, pixels)).clamp(-1, 1)
    error = (decoded.add(1).mul(127.5) - pixels.float()).div(255).square().mean((1, 2, 3))
    return (-10 * error.log10()).mean().item()
