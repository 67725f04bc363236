"""What a run will do and need, worked out without loading a weight: the plan behind `--dry-run` and `pcm doctor`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from ..samplers.lora_file import read_header
from .adapter import Adapter
from .config import Config
from .data import find_pictures, read_prompts
from .data.cache import own_prompts
from .export import recipe_for
from .families import bundled_folder
from .families.loading import diffusers_folder, is_hub_id
from .families.sd15 import SD15

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# CLIP-L and SD1.5's VAE, in parameters; both stay in fp32.
ENCODER_PARAMETERS = 123_060_480 + 83_653_863
# What diffusers recomputes with gradient checkpointing, keeping only its input.
CHECKPOINTED = (ResnetBlock2D, BasicTransformerBlock)
OUTSIDE = 0
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2}


def plan(config: Config) -> dict[str, Any]:
    """The plan and the memory estimate as JSON-ready values, with `text` for people. Raises ValueError for bad data."""
    _check_base(config.base.path)
    memory = estimate_memory(config)
    train, data = config.train, config.data
    if data.images:
        pictures, skipped = find_pictures(data.images, data.skip_bad)
        samples = len(pictures)
        source = f"{samples} pictures with captions from {data.images}, {len(skipped)} left out"
    else:
        samples = data.count
        prompts = min(samples, len(read_prompts(data.prompts or own_prompts(config.base.path))))
        source = (
            f"{samples} latents that the teacher makes from {prompts} prompts "
            f"({data.teacher_steps} DDIM steps, CFG {data.teacher_guidance:g})"
        )
    seen = train.steps * train.batch_size * train.accumulation
    edges = ", ".join(str(t - 1) for t in reversed(config.grid().edges[1:]))
    low, high = config.objective.guidance
    facts = {
        "base": config.base.path,
        "data": source,
        "updates": train.steps,
        "samples_seen": seen,
        "passes_over_the_data": round(seen / samples, 1),
        "forward_passes_per_sample": 4,
        "lora_modules": memory["lora_modules"],
        "lora_parameters": memory["lora_parameters"],
        "lora_file_bytes": memory["lora_parameters"] * BYTES[config.lora.dtype],
        "phase_starts": [t - 1 for t in config.grid().edges[1:]],
        "output": str(config.run_folder / f"{config.name}.safetensors"),
        "memory_gib": memory["gib"],
    }
    lines = [
        "Resolved configuration",
        *(f"  {line}" for line in _flatten(config.model_dump(mode="json"))),
        "Plan",
        f"  base      {facts['base']}",
        f"  data      {source}",
        f"  train     {train.steps} updates of {train.batch_size * train.accumulation} samples, {seen} in all "
        f"({facts['passes_over_the_data']} passes)",
        f"  a sample  teacher conditional and unconditional in one batch (CFG {low:g} to {high:g}), target, student: "
        "4 forward passes and 1 backward",
        f"  phases    {config.objective.phases}, starting at timesteps {edges}; "
        f"{config.objective.points} solver points",
        f"  LoRA      rank {config.lora.rank}, alpha {config.lora.alpha:g}, {facts['lora_modules']} modules, "
        f"{facts['lora_parameters'] / 1e6:.1f} M parameters, {facts['lora_file_bytes'] / 1e6:.0f} MB "
        f"in {config.lora.dtype}",
        f"  writes    {facts['output']}; checkpoints every {train.save_every}, previews every "
        f"{config.preview.every} updates",
        f"  use       {memory['usage']}",
        "Memory estimate (GiB)",
        *(f"  {name:28} {value:6.2f}" for name, value in memory["gib"].items()),
    ]
    return facts | {"text": "\n".join(lines)}


def _check_base(path: str) -> None:
    """A local base must be there and whole; hub ids are left to the run."""
    if path.endswith(".safetensors"):
        read_header(path)
    elif bundled_folder(path) is None and not is_hub_id(path):
        diffusers_folder(path, SD15.components, "SD1.5")


def estimate_memory(config: Config) -> dict[str, Any]:
    """GiB of each thing a run holds at its peak, from a copy of the network without weights (meta device).

    Activations are the tensors that autograd would keep for the student's pass; with gradient checkpointing, the
    inputs of the blocks and the largest block. Libraries, fragmentation and kernels' workspaces come on top.
    """
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(_unet_config(config))
    SD15.latent_shape_of(network.config, config.data.resolution)
    parameters = sum(p.numel() for p in network.parameters())
    with torch.device("meta"):
        adapter = Adapter(network, SD15.lora_targets, config.lora.rank, config.lora.alpha, seed=0)
    lora = sum(p.numel() for p in adapter.parameters())
    width = BYTES[config.base.dtype]
    activations = _activation_bytes(network, config) * config.train.batch_size * width / 4
    per_parameter = 4 + 4 + OPTIMIZER_BYTES[config.train.optimizer] + (4 if config.train.ema else 0)
    held = {
        "frozen UNet": parameters * width,
        "LoRA, gradients, optimizer": lora * per_parameter,
        f"activations, batch {config.train.batch_size}": activations,
    }
    gib = {name: value / GIB for name, value in held.items()}
    gib["training in all, at least"] = sum(gib.values())
    gib["before: UNet and encoders"] = (parameters * width + ENCODER_PARAMETERS * 4) / GIB
    return {
        "gib": {k: round(v, 3) for k, v in gib.items()},
        "lora_modules": len(adapter.layers),
        "lora_parameters": lora,
        "usage": _usage(config),
    }


def _activation_bytes(network: UNet2DConditionModel, config: Config) -> float:
    """fp32 bytes that autograd keeps for one sample of the student's forward pass."""
    kept: dict[int, int] = defaultdict(int)
    inside, inputs = [OUTSIDE], 0

    def enter(block, given) -> None:
        nonlocal inputs
        inside.append(id(block))
        inputs += given[0].numel() * given[0].element_size()

    for block in network.modules():
        if isinstance(block, CHECKPOINTED):
            block.register_forward_pre_hook(enter)
            block.register_forward_hook(lambda *_: inside.pop() and None)

    side = config.data.resolution // 8
    keys = {77, *((side >> level) ** 2 for level in range(len(network.down_blocks)))}
    heads = network.config.attention_head_dim

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # without weights, attention falls back to the form that keeps its matrices; the fused kernels keep none
        matrix = tensor.ndim == 4 and tensor.shape[1] == heads and tensor.shape[3] in keys
        if not matrix and not isinstance(tensor, torch.nn.Parameter):
            kept[inside[-1]] += tensor.numel() * tensor.element_size()
        return tensor

    make = lambda *shape: torch.empty(*shape, device="meta")  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        prompt = make(1, 77, network.config.cross_attention_dim)
        network(make(1, network.config.in_channels, side, side), make(1), prompt)
    if config.train.gradient_checkpointing:
        return inputs + kept.pop(OUTSIDE) + max(kept.values())
    return sum(kept.values())


def _unet_config(config: Config) -> dict[str, Any]:
    """The base's UNet config where it can be read here; SD1.5's own for single files and hub ids."""
    folder = Path(config.base.config or bundled_folder(config.base.path) or config.base.path)
    path = folder / "unet" / "config.json"
    return json.loads((path if path.is_file() else SD15.configs / "unet" / "config.json").read_text())


def _usage(config: Config) -> str:
    stand_in = SD15(None, None, [], [], None, config.base.prediction or "epsilon", False, "empty", config.base.path, "")
    return recipe_for(config, stand_in).usage_hint()


def _flatten(values: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += _flatten(value, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key} = {json.dumps(value)}")
    return lines
