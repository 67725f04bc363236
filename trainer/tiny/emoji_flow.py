"""The emoji base's transformer and text encoders: SD3 at depth 3, trained by flow matching without T5.

What makes it learn fast: Muon on the blocks' matrices, times that favour the middle, captions cut to their own length
until near the end, and no work on inputs that are always zero. What makes it hard to distil: in the last part of the
training three captions in eight are another picture's, so that, as in the real models, the prompt is followed only
with guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .making import bf16, clip_config, encode_words
from .muon import Muon
from .resuming import Stage, load_state, put_back, random_of, rate, save_state, tensors_of
from .sd3_parts import CONTEXT, SHIFT, new_transformer

WIDTH = 64  # channels of each text encoder's states
BATCH = 64
MATRIX_RATE, OTHER_RATE = 1e-2, 2e-3  # Muon's and AdamW's
TOKENS = 16  # of a prompt: the longest caption and the first of its padding; hosts feed 77
LONG_FROM = 0.94  # share of the training from which all 77 tokens are read
SWAPPED, SWAPPED_FROM = 0.38, 0.75  # share of the captions that are another picture's, from this share of the training
EMPTY = 0.1  # share of empty prompts
AVERAGE = 0.03  # share of the steps so far that the average of the weights spans


@dataclass
class Pool:
    """What is trained on: scaled latents (N, 16, H/8, W/8), and ids (N + 1, 77), the empty prompt's last."""

    latents: Tensor
    ids: Tensor


def new_parts(tokenizer: CLIPTokenizer) -> nn.ModuleList:
    """The transformer, with an embedder of only those channels that two small encoders fill, and the encoders."""
    transformer = new_transformer()
    config = dict(transformer.config) | {"joint_attention_dim": 2 * WIDTH}
    narrow = SD3Transformer2DModel.from_config(config)
    weights = transformer.state_dict()
    weights["context_embedder.weight"] = narrow.context_embedder.weight.data
    narrow.load_state_dict(weights)
    encoders = [CLIPTextModelWithProjection(clip_config(tokenizer, WIDTH, 2, width)) for width in (768, 1280)]
    return nn.ModuleList([narrow, *encoders])


def whole(parts: nn.ModuleList) -> nn.ModuleList:
    """A copy of the parts as hosts load them: the embedder of SD3's full width, and the padding's one place at each."""
    transformer, *encoders = deepcopy(parts)
    full = SD3Transformer2DModel.from_config(dict(transformer.config) | {"joint_attention_dim": CONTEXT})
    weights = transformer.state_dict()
    weight = weights["context_embedder.weight"]
    weights["context_embedder.weight"] = F.pad(weight, (0, CONTEXT - weight.shape[1]))
    full.load_state_dict(weights)
    for encoder in encoders:
        places = next(m for name, m in encoder.named_modules() if name.endswith("position_embedding"))
        places.weight.data[TOKENS:] = places.weight.data[TOKENS - 1]
    return nn.ModuleList([full, *encoders]).eval().requires_grad_(False)


def flow_of(parts: nn.ModuleList, noisy: Tensor, s: Tensor, ids: Tensor, network: Callable | None = None) -> Tensor:
    """The predicted flow of noisy latents (B, 16, h, w) at times s (B) under prompts' ids (B, L), in bf16.

    network: what is called in the transformer's place, such as its compiled form.
    """
    transformer, *encoders = parts
    places = torch.arange(ids.shape[1]).clamp(max=TOKENS - 1)[None]  # all padding stands at one place
    states, pooled = zip(*(encode_words(encoder, ids, places) for encoder in encoders), strict=True)
    call = transformer if network is None else network
    return call(noisy, torch.cat(states, -1), torch.cat(pooled, -1), 1000 * s, return_dict=False)[0]


def random_times(count: int, random: torch.Generator) -> Tensor:
    """Times in (0, 1): four fifths logit-normal about 0.62, one fifth uniform under SD3's shift, for high noise."""
    middle = torch.sigmoid(torch.randn(count, generator=random) + 0.5)
    u = torch.rand(count, generator=random)
    shifted = SHIFT * u / (1 + (SHIFT - 1) * u)
    return torch.where(torch.rand(count, generator=random) < 0.2, shifted, middle)


def random_prompts(index: Tensor, ids: Tensor, swapped: float, random: torch.Generator) -> Tensor:
    """The ids of the pictures' captions, this share of them another picture's, and a tenth empty."""
    count = len(index)
    others = torch.randint(len(ids) - 1, (count,), generator=random)
    chosen = torch.where(torch.rand(count, generator=random) < swapped, others, index)
    return ids[torch.where(torch.rand(count, generator=random) < EMPTY, len(ids) - 1, chosen)]


def flow_loss(parts: nn.ModuleList, pool: Pool, share: float, random: torch.Generator, compiled: Callable) -> Tensor:
    """The flow-matching loss of a random batch at this share of the training."""
    index = torch.randint(len(pool.latents), (BATCH,), generator=random)
    x0 = pool.latents[index]
    noise = torch.randn(x0.shape, generator=random)
    times = random_times(BATCH, random)
    s = times.view(-1, 1, 1, 1)
    ids = random_prompts(index, pool.ids, SWAPPED if share >= SWAPPED_FROM else 0.0, random)
    long = share >= LONG_FROM
    network = None if long else compiled  # compiling for another length takes longer than it saves
    with bf16():
        flow = flow_of(parts, (1 - s) * x0 + s * noise, times, ids if long else ids[:, :TOKENS], network)
    return F.mse_loss(flow.float(), noise - x0)


def train_flow(
    parts: nn.ModuleList, pool: Pool, stage: Stage, state: Path, save: Callable[[nn.ModuleList], None], compiles: bool
) -> nn.ModuleList:
    """Train the parts together, going on from `state` where that file is. Returns the average of their weights.

    save: called with that average, as hosts load it, whenever the state is written, so that a run cut short leaves a
    usable base. compiles: whether the transformer is compiled, which takes a minute and saves a fifth of the time.
    """
    average = deepcopy(parts).requires_grad_(False).eval()
    optimizers = new_optimizers(parts)
    modules = {"parts": parts, "average": average}
    if saved := load_state(state):
        put_back(saved[0], modules, optimizers)
        stage.go_on(saved[1])
    compiled = torch.compile(parts[0], dynamic=False) if compiles else parts[0]
    while stage.share < 1:
        share = stage.share
        loss = flow_loss(parts, pool, share, random_of("flow", stage.step), compiled)
        update(loss, parts, optimizers, rate(share, stage.step))
        follow(average, parts, stage.step)
        stage.advance(loss.item())
        if stage.is_due() or stage.share >= 1:
            save_state(state, tensors_of(modules, optimizers), stage.facts)
            save(whole(average))
    return whole(average)


def new_optimizers(parts: nn.ModuleList) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, but for the modulations; AdamW for all else."""
    blocks = parts[0].transformer_blocks.named_parameters()
    matrices = [parameter for name, parameter in blocks if parameter.ndim == 2 and "norm1" not in name]
    theirs = set(map(id, matrices))
    others = [parameter for parameter in parts.parameters() if id(parameter) not in theirs]
    return {
        "muon": Muon(matrices, MATRIX_RATE),
        "adamw": torch.optim.AdamW(others, OTHER_RATE, betas=(0.9, 0.98), weight_decay=1e-3, fused=True),
    }


def update(loss: Tensor, parts: nn.ModuleList, optimizers: dict[str, torch.optim.Optimizer], factor: float) -> None:
    """One clipped step of both optimizers at this factor of their rates."""
    parts.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
    for optimizer, full in zip(optimizers.values(), (MATRIX_RATE, OTHER_RATE), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = full * factor
        optimizer.step()


@torch.no_grad()
def follow(average: nn.ModuleList, parts: nn.ModuleList, step: int) -> None:
    """Move the average a little towards the weights of now, at every step less."""
    torch._foreach_lerp_(list(average.parameters()), list(parts.parameters()), 1 / (1 + AVERAGE * step))
