"""The memory that a run takes, from copies of its networks without weights (meta device), and what would lower it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import Any

import torch

from ..config.config import Config
from ..families import Base
from ..families.base import DTYPES
from ..system.machine import GIB
from .footprint import Footprint, check_network, footprint

# of an optimizer's state a parameter, where it is not AdamW's two averages in fp32
ADAMW_BYTES = 8
OPTIMIZER_BYTES = {"adamw8bit": 2, "lion": 4, "prodigy": 16, "adafactor": 1, "SGD": 0}
NETWORKS = {"unet": "UNet", "transformer": "transformer"}
CONTEXT = GIB // 2  # what CUDA and its libraries are taken to hold; it differs between GPUs
MARGIN = 1.15  # for fragmentation and kernels' workspaces, where an estimate is held against what there is
TRAINING, PREVIEWS, BEFORE = "training in all, at least", "drawing previews in all", "before: "
EXCHANGE = "gradients in one piece"
CRITIC_MEMORY = "critic, gradients, optimizer"
PEAKS = (TRAINING, PREVIEWS, BEFORE)  # how the lines begin of which the largest is what a run needs


def estimate_memory(config: Config, family: type[Base]) -> dict[str, Any]:
    """GiB of each thing a run holds at its peak, the LoRA's modules, the parameters that are trained, and how many of
    the blocks are computed again for the backward pass.

    Activations are the tensors that autograd would keep for the student's pass, or where that is more, what the
    teacher's holds; of blocks that are computed again the inputs, and the largest block. Fragmentation and kernels'
    workspaces come on top. Raises ValueError for a resolution that the network cannot take.
    """
    sizes = footprint(config, family)
    again = recomputed(config, family, sizes.blocks)
    gib = {name: size / GIB for name, size in _bytes(config, family, sizes, again).items()}
    gib[TRAINING] = sum(gib.values())
    if config.preview.every and sizes.vae:
        passing = ("activations", "its features", EXCHANGE, TRAINING)
        standing = sum(v for k, v in gib.items() if not k.startswith(passing))
        # the weights that are drawn with are a copy
        gib[PREVIEWS] = standing + (4 * sizes.learnt + sizes.vae + sizes.decoding) / GIB
    network = sizes.parameters * DTYPES[config.base.dtype].itemsize
    pictures = sizes.encoding * config.data.batch_size if config.data.has_pictures else 0
    gib[f"{BEFORE}the larger of {NETWORKS[family.component]} and encoders"] = (
        max(network, sizes.text, pictures) + sizes.vae
    ) / GIB
    return {
        "gib": {k: round(v, 3) for k, v in gib.items()},
        "lora_modules": sizes.modules,
        "trained_parameters": sizes.learnt,
        "blocks_computed_again": len(again),
    }


def _bytes(config: Config, family: type[Base], sizes: Footprint, again: Collection[str]) -> dict[str, float]:
    """Bytes by what holds them while a run trains, with these blocks computed again."""
    train, batch = config.train, config.train.batch_size
    title = NETWORKS[family.component]
    per_parameter = 4 + 4 + OPTIMIZER_BYTES.get(train.optimizer, ADAMW_BYTES)  # weight, gradient, moments

    # teacher and student never hold their activations at the same time
    kept = sizes.activations.bytes(again, train.offload_activations) * batch
    teacher = sizes.pass_bytes * batch * (2 if config.objective.guided() else 1)

    parts: dict[str, float] = {} if family.whole else {f"frozen {title}": _frozen_bytes(config, sizes)}
    learner = title if family.whole else "LoRA"
    parts[f"{learner}, gradients, optimizer"] = sizes.learnt * (per_parameter + (4 if train.ema else 0))
    parts[f"activations, batch {batch}"] = max(kept, teacher)
    copies = bool(config.objective.target_decay()) + (config.objective.stage(1.0) > 0)
    if copies:
        parts["averaged or earlier weights"] = sizes.learnt * 4 * copies
    if config.objective.matching:
        # where its rank is another, so is its share of the same modules
        critic = sizes.learnt * (config.objective.critic_rank or config.lora.rank) / config.lora.rank
        averaged = 4 if config.objective.critic_ema else 0
        parts[CRITIC_MEMORY] = critic * (per_parameter + averaged)
    if sizes.features:
        parts["discriminator, gradients, optimizer"] = sizes.heads * per_parameter
        parts["its features' activations"] = sizes.features.bytes(again, train.offload_activations) * batch
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        parts[f"{EXCHANGE}, {processes} processes"] = 4 * (sizes.learnt + sizes.heads)
    return parts | {"CUDA context, assumed": CONTEXT}


def _frozen_bytes(config: Config, sizes: Footprint) -> int:
    """Bytes of frozen weights on the device: all of them; of blocks that are offloaded, as much as the largest three:
    one at work, one on its way, one that is not free yet; of those that are shared, this process's part and the
    largest."""
    width = DTYPES[config.base.dtype].itemsize
    blocks = [block.bytes(width, config.base.quantize) for block in sizes.blocks.values()]
    outside = (sizes.parameters - sum(block.parameters for block in sizes.blocks.values())) * width
    if config.train.shard:
        return (outside + sum(blocks)) // int(os.environ.get("WORLD_SIZE", 1)) + max(blocks, default=0)
    return outside + (sum(sorted(blocks)[-3:]) if config.train.offload else sum(blocks))


def check_network_settings(config: Config, family: type[Base]) -> None:
    """Raise ValueError for a resolution that the network cannot take, for lora.ranks that find no module of it, and for
    train.gradient_checkpointing=auto where nobody says how much memory there is.

    Measures nothing: that takes seconds with a network of full size.
    """
    check_network(config, family)
    if config.train.gradient_checkpointing == "auto" and not config.train.offload:
        limit_bytes(config)


def recomputed(config: Config, family: type[Base], blocks: Iterable[str]) -> list[str]:
    """Which of the network's blocks a run computes again for its backward pass: none, all, or for "auto" as few as it
    takes to fit, first those that save most for what they cost.

    Raises ValueError as `check_network_settings`.
    """
    wanted = config.train.gradient_checkpointing
    if config.train.offload or wanted is True:
        return list(blocks)
    if not wanted:
        return []

    limit, sizes, chosen = limit_bytes(config), footprint(config, family), []
    by_saving = sorted(blocks, key=sizes.activations.saving, reverse=True)
    while len(chosen) < len(by_saving) and sum(_bytes(config, family, sizes, chosen).values()) * MARGIN > limit:
        chosen.append(by_saving[len(chosen)])
    return chosen


def fitting_batch(config: Config, family: type[Base], limit: float) -> tuple[int, dict[int, float]]:
    """The most samples a pass, of those that divide the update's without a rest, whose training fits `limit` bytes by
    the estimate with its margin, and 1 where nothing does; the bytes of each that was tried, by samples.

    Where train.gradient_checkpointing=auto, all blocks count as computed again: it then takes as few as fit.
    """
    sizes, samples = footprint(config, family), config.train.accumulation
    again = list(sizes.blocks) if config.train.gradient_checkpointing or config.train.offload else []
    tried: dict[int, float] = {}
    for size in (n for n in range(samples, 0, -1) if samples % n == 0):
        shape = config.changed(train={"batch_size": size, "accumulation": samples // size})
        tried[size] = sum(_bytes(shape, family, sizes, again).values()) * MARGIN
        if tried[size] <= limit:
            return size, tried
    return 1, tried


def limit_bytes(config: Config, setting: str = "train.gradient_checkpointing", values: str = "true or false") -> int:
    """What a setting that is "auto" may fill. Raises ValueError where there is no GPU and nobody says it.

    setting, values: whose "auto" it is, and what it takes beside.
    """
    if config.train.memory_limit_gib:
        return int(config.train.memory_limit_gib * GIB)
    if not torch.cuda.is_available():
        raise ValueError(
            f"{setting}=auto asks how much memory the GPU has free, and there is no CUDA device. Set "
            f"train.memory_limit_gib, or {setting} to {values}."
        )
    free, _ = torch.cuda.mem_get_info()
    # what this process holds already is part of the estimate too
    return free + torch.cuda.memory_reserved() + CONTEXT


def switches(config: Config, family: type[Base]) -> list[tuple[str, float]]:
    """Settings that would lower the estimate, as key=value, and by how many GiB each; the best saving first."""
    train, now = config.train, estimate_memory(config, family)["gib"][TRAINING]
    changes: dict[str, dict[str, dict[str, Any]]] = {
        "train.gradient_checkpointing=true": {"train": {"gradient_checkpointing": True}},
        "train.optimizer=adamw8bit": {"train": {"optimizer": "adamw8bit"}},
    }
    if not (family.whole or train.shard):
        changes["train.offload=true"] = {"train": {"offload": True}}
        if config.base.quantize is None and not config.lora.dora:
            changes["base.quantize=int8"] = {"base": {"quantize": "int8"}}
    if train.gradient_checkpointing or train.offload:
        changes["train.offload_activations=true"] = {"train": {"offload_activations": True}}
    half = train.batch_size // 2
    if train.batch_size % 2 == 0:
        pair = {"batch_size": half, "accumulation": train.accumulation * 2}
        changes[" ".join(f"train.{key}={value}" for key, value in pair.items())] = {"train": pair}
    saved = {
        setting: now - estimate_memory(config.changed(**change), family)["gib"][TRAINING]
        for setting, change in changes.items()
    }
    useful = [(setting, round(gib, 3)) for setting, gib in saved.items() if gib >= 0.001]
    return sorted(useful, key=lambda item: -item[1])


def advice(saving: list[tuple[str, float]], most: int = 3) -> str:
    """The best of `switches` in words; where none is left, what else would help."""
    best = "; ".join(f"{setting} saves about {gib:.2g} GiB" for setting, gib in saving[:most])
    return best or "all that saves memory is on, so take a smaller data.resolution or lora.rank"


def explain_out_of_memory(error: BaseException, config: Config, family: type[Base]) -> str:
    """What the error said, and what would help this run."""
    first = next(iter(str(error).splitlines()), "Out of memory.")
    best = advice(switches(config, family))
    critic = estimate_memory(config, family)["gib"].get(CRITIC_MEMORY)
    if critic:
        best = f"the critic takes {critic:.2g} GiB, which a lower objective.critic_rank lowers; {best}"
    return f"{first}\nBy estimate: {best}. While it is still caching, a smaller data.batch_size helps."
