"""The one gate: what a run refuses before anything is loaded or cached.

`check_run` is asked by the run and by its dry run alike, so that one cannot refuse what the other lets through. What
only the weights or the pictures themselves can tell is left to the run: numbers that are not finite, a file that
cannot be decoded, a base whose outputs are not what it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from ...samplers import Recipe
from ...samplers.lora_file import read_header
from ...samplers.lora_info import recipe_of
from ..config.config import Config
from ..config.presets import PRESETS
from ..data.buckets import buckets_for
from ..data.captions import chosen
from ..data.folders import Folder
from ..data.prompts import prompts_of
from ..data.reading import stop_or_skip
from ..data.shards import check_end, list_shards, local_path
from ..data.sources import absent, pictures_of
from ..data.tags import Tags
from ..efficiency.attention import IN_HALF
from ..efficiency.blocks import check_compiler
from ..efficiency.footprint import trained_parameters
from ..efficiency.memory import check_network_settings
from ..efficiency.quantize import check_products, check_quantizer, storage
from ..families import Base, BaseFacts, look_at_base
from ..lora.install import check_fit, check_plain, header_of_family, is_all_dora
from ..lora.merged import check_merged
from ..lora.recipe import recipe_for
from ..objectives import OBJECTIVES
from ..reporting.trackers import available
from ..system.machine import NO_BF16, lacking_capability, native_bf16, unseen_gpu
from ..tiny.digits import NAME as DIGITS
from .batches import Split
from .checkpoint import Facts, agreed_changes, latest_facts
from .optimizers import OF_TORCH, check_optimizer, check_takes

FP8_KERNELS = (8, 9)  # the compute capability from which Triton makes kernels in fp8


@dataclass(frozen=True)
class Samples:
    """What a run learns from. number: how many there are, None where they are counted when they are cached; source:
    where they come from, for people; folder: of pictures, where they are in one."""

    number: int | None
    source: str
    folder: Folder | None = None


@dataclass(frozen=True)
class Checked:
    """What is known of a run that may begin.

    base: what it is trained on. recipe: how its LoRA must be sampled, None for a network that is trained whole.
    samples: what it learns from. newest: step and facts of the checkpoint that it goes on from, if any. changes: of
    settings on the way, see `agreed_changes`.
    """

    base: BaseFacts
    recipe: Recipe | None
    samples: Samples
    newest: Facts | None
    changes: list[dict[str, Any]]


def check_run(config: Config, device: torch.device, processes: int, accept_changes: bool = False) -> Checked:
    """Everything that can be refused before anything is loaded or cached, the cheapest first.

    Raises ValueError for settings that cannot be, or not with this base, this data, this machine or the run that is in
    the folder; FileNotFoundError for what is not there.
    """
    _check_preset(config)
    newest = latest_facts(config.run_folder / "checkpoints")
    changes = _check_folder(config, newest, processes, accept_changes)
    _check_packages(config)

    base = look_at_base(config.base.path, **config.base.reading())
    check_merged(config.base.loras, base.family)
    if base.family.whole:
        check_whole(config)
    recipe = None if base.family.whole else recipe_for(config, base)
    if config.lora.init:
        check_start(config, base)
    check_prepare(config, base.family, device, processes)

    samples = _check_data(config, base)
    return Checked(base, recipe, samples, newest, changes)


def notes_on_device(config: Config, device: torch.device) -> list[str]:
    """Sentences on settings that this device takes badly, though it does what they say."""
    if device.type == "cuda" and config.base.dtype == "bf16" and not native_bf16():
        return [NO_BF16]
    unseen = [sentence] if device.type == "cpu" and (sentence := unseen_gpu()) else []
    slow = {}
    if config.base.dtype != "fp32":
        slow[f"base.dtype={config.base.dtype}"] = "base.dtype=fp32"
    if config.train.gradient_checkpointing is True:
        slow["train.gradient_checkpointing=true"] = "train.gradient_checkpointing=false"
    if device.type != "cpu" or not slow:
        return unseen
    slower = "are for a GPU's memory and make every update about twice as slow" if len(slow) > 1 else "makes it slower"
    return [*unseen, f"This runs on the CPU, where {' and '.join(slow)} {slower}: add {' '.join(slow.values())}."]


def check_loaded(config: Config, base: Base) -> None:
    """Once the base is here: what `check_run` could only assume of one on the hub, and whether the network has the
    layers of `lora.init`, and they are trained. Raises ValueError."""
    base.latent_shape(config.data.resolution)
    if not base.whole:
        recipe_for(config, base.facts)
    if config.lora.init:
        check_start(config, base.facts)
        header = read_header(Path(config.lora.init))
        paths = [target.layer.path for target in check_fit(header, base).layers]
        trained = tuple(f".{name}" for name in base.lora_targets)
        if others := [path for path in paths if not f".{path}".endswith(trained)]:
            raise ValueError(
                f"{header.path.name}: {len(others)} of its {len(paths)} layers are not trained here, such as "
                f"{others[0]}. Start from a LoRA without them."
            )


def split_of(config: Config, processes: int, facts: dict[str, Any] | None, changed: bool) -> Split:
    """How each update is shared out among the processes.

    facts: of the newest checkpoint, None for a new run. A run that goes on takes as many samples an update as before,
    whatever the number of processes, unless settings may have `changed`. Raises ValueError where the processes cannot
    share them, and for a run of another product of train.batch_size and train.accumulation.
    """
    train = config.train
    split = Split(train.batch_size, train.accumulation, processes)
    if facts is None or facts["samples per update"] == split.update:
        return split

    before = facts["samples per update"]
    if facts["samples per process"] == train.batch_size * train.accumulation:
        return Split.of_update(before, processes, train.batch_size)
    if changed:
        return split
    raise ValueError(
        f"{config.run_folder} holds a run of {before} samples an update, and these settings take {split.update}: "
        "train.batch_size times train.accumulation in each process. Keep the product to go on, use another "
        "output folder, or --accept-changes."
    )


def _check_folder(config: Config, newest: Facts | None, processes: int, accept: bool) -> list[dict[str, Any]]:
    """The changes of settings since the run in the folder began; ValueError for one that cannot go on so."""
    if newest is None:
        return []
    step, facts = newest
    changes = agreed_changes(config.run_folder, newest, config.what_decides_the_weights(), config.may_change, accept)
    if step > config.train.steps:
        raise ValueError(
            f"train.steps is {config.train.steps}, and the run in {config.run_folder} has come to update {step} "
            "already: set it to that or more, or use another output folder."
        )
    split_of(config, processes, facts, changed=accept)
    return changes


def _check_preset(config: Config) -> None:
    """Raise ValueError where the preset lacks a setting that it is nothing without."""
    needs = PRESETS[config.preset].needs if config.preset else ()
    for key in needs:
        section, name = key.split(".")
        if getattr(getattr(config, section), name) is None:
            raise ValueError(
                f"The preset {config.preset} goes on from a few-step LoRA: set {key}=FILE to the one to refine, and "
                "objective.phases to its own number."
            )


def _check_packages(config: Config) -> None:
    """Raise ValueError for a setting whose package is not installed, or that its package cannot do."""
    available(config.train.trackers, say=lambda _: None)
    check_optimizer(config)
    if config.base.quantize:
        check_quantizer(config.base.quantize)


def check_whole(config: Config) -> None:
    """Raise ValueError for settings that need a teacher or a LoRA, where a network is trained whole and has neither."""
    base, objective = Path(config.base.path).name, config.objective
    problems = []
    if objective.needs_teacher or config.adversarial.weight:
        able = [n for n, row in OBJECTIVES.items() if not row.needs_teacher and row.adversarial != "required"]
        what = objective.name if objective.needs_teacher else "the adversarial loss"
        problems.append(
            f"{what} needs a teacher, and {base} starts from nothing: use objective.name=ct (without a teacher: "
            f"{', '.join(able)})."
        )
    if not config.data.has_pictures:
        problems.append(
            f"data.images is not set, and {base} has no teacher that makes pictures of prompts: set "
            f"data.images={DIGITS}, or a folder of pictures with a digit as caption."
        )
    if config.lora.model_fields_set:
        keys = ", ".join(f"lora.{key}" for key in sorted(config.lora.model_fields_set))
        problems.append(f"{keys}: there is no LoRA, {base} is trained whole. Leave it out.")
    if problems:
        raise ValueError("\n".join(problems))


def check_start(config: Config, base: BaseFacts) -> Recipe | None:
    """The recipe of the LoRA in `lora.init`, or None for one that has none.

    Raises FileNotFoundError, or ValueError for a LoRA of another family, prediction or shift, for a greater rank than
    the run's, for a DoRA where the run trains none or at another strength than 1, and for one whose jumps end
    elsewhere.
    """
    header = header_of_family(Path(config.lora.init), base.family.name)
    check_plain(header, header.network, dora=True)
    recipe, file = recipe_of(header), header.path.name
    if is_all_dora(header) and not config.lora.dora:
        raise ValueError(f"{file} is a DoRA, and this run trains a LoRA without magnitudes. Set lora.dora=true.")
    rank = max((module.rank or 0 for module in header.network.values()), default=0)
    if rank > config.lora.rank:
        raise ValueError(f"{file} has rank {rank}, more than lora.rank = {config.lora.rank}. Set lora.rank={rank}.")
    if smaller := {pattern: r for pattern, r in (config.lora.ranks or {}).items() if r < rank}:
        raise ValueError(
            f"{file} has rank {rank}, and lora.ranks gives {', '.join(smaller)} less. Leave that out, or go on from a "
            "smaller one (pcm resize)."
        )
    critic = getattr(config.objective, "critic_rank", None)
    if critic and rank > critic:
        raise ValueError(
            f"{file} has rank {rank}, more than objective.critic_rank = {critic}, and the critic begins as it does. "
            f"Set objective.critic_rank={rank}, or leave it out."
        )
    if recipe is None:
        return None
    if is_all_dora(header) and recipe.strength != 1:
        raise ValueError(
            f"{file} is a DoRA that is sampled at strength {recipe.strength:g}, and magnitudes have no such share to "
            "go on from. Start from one that is sampled at strength 1, or from a plain LoRA."
        )

    # a base that is still on the hub may predict what the LoRA was made for: its own files will tell
    comparable = recipe.source == "header" and not base.assumed
    if comparable and (recipe.prediction, recipe.shift) != (base.prediction, base.shift):
        raise ValueError(
            f"{file} was made for a base with {_reading(recipe.prediction, recipe.shift)}, and this one has "
            f"{_reading(base.prediction, base.shift)}. Use its own base, or set base.prediction or base.shift."
        )
    edges = recipe.grid(trained=True).edges
    if edges != config.grid().edges:
        points = f" and objective.points={recipe.points}" if recipe.source == "header" else ""
        raise ValueError(
            f"{file} jumps to the ticks {_joined(edges)}, and this run to {_joined(config.grid().edges)}: it would "
            f"unlearn them. Set objective.phases={recipe.phases}{points}; the objectives pcm and lcf have phases."
        )
    return recipe


def _joined(ticks: Sequence[int]) -> str:
    return ", ".join(map(str, ticks))


def _reading(prediction: str, shift: float | None) -> str:
    return prediction + ("" if shift is None else f", shift {shift:g}")


def check_prepare(config: Config, family: type[Base], device: torch.device, processes: int) -> None:
    """Raise ValueError for what `prepare` cannot do here, and for a resolution that the network cannot take."""
    train = config.train
    if family.whole:
        frozen_only = {
            "base.quantize": config.base.quantize,
            "train.offload": train.offload,
            "train.shard": train.shard,
        }
        if set_too := [name for name, value in frozen_only.items() if value]:
            raise ValueError(f"{set_too[0]} is for a frozen base, and all of {family.title} is trained. Leave it out.")
    if config.base.quantize:
        check_products(config.base.quantize, config.base.dtype, device)
    if config.lora.dora:
        # its magnitudes are of whole weights as they are, at hand, and have no strength for compiled code to switch off
        _check_alone(config, "lora.dora", ("base.quantize", "train.compile", "train.shard"))
    if train.shard:
        _check_shard(config, processes)
        if config.objective.matching:
            raise ValueError(
                f"train.shard does not go with the objective {config.objective.name}, whose critic is a second adapter "
                "in every block. Leave it out; base.quantize and train.gradient_checkpointing save memory too."
            )
    if train.compile:
        check_compiler(device)
        if problem := fp8_problem(config, device):
            raise ValueError(f"train.compile=true, but {problem}. Set base.quantize=int8, or train.compile=false.")
    if train.offload_activations and not (train.gradient_checkpointing or train.offload):
        raise ValueError(
            "train.offload_activations=true is for the inputs of blocks that are computed again, and none is: set "
            "train.gradient_checkpointing=true, or auto."
        )
    if train.attention:
        _check_attention(config, device)
    check_network_settings(config, family)
    if config.train.optimizer in OF_TORCH:
        check_takes(config, trained_parameters(config, family))


def _check_attention(config: Config, device: torch.device) -> None:
    """Raise ValueError for a kernel of attention that can take nothing of this run."""
    kernel = config.train.attention
    if device.type != "cuda":
        raise ValueError(f"train.attention={kernel} is a kernel for CUDA GPUs, and this runs on the CPU: leave it out.")
    if kernel in IN_HALF and config.base.dtype == "fp32":
        raise ValueError(
            f"train.attention={kernel} takes bf16 and fp16, and base.dtype=fp32: leave one of them out, or set "
            "train.attention=efficient."
        )


def fp8_problem(config: Config, device: torch.device) -> str:
    """Why an fp8 base's blocks cannot be compiled on this device; "" where they can, or the base is none."""
    if storage(config.base.quantize or "") != "fp8" or device.type != "cuda":
        return ""
    lack = lacking_capability(device, FP8_KERNELS)
    if lack is None:
        return ""
    needed, here = lack
    return (
        f"base.quantize={config.base.quantize} needs a GPU of compute capability {needed} (Ada) or later, and this one "
        f"has {here}: Triton makes no fp8 kernels for it"
    )


def _check_alone(config: Config, setting: str, others: Sequence[str]) -> None:
    """Raise ValueError where one of these other settings is on beside this one, which does not go with it."""
    if set_too := [key for key in others if attrgetter(key)(config)]:
        raise ValueError(f"{setting} does not go with {' or '.join(set_too)}: leave one of them out.")


def _check_shard(config: Config, processes: int) -> None:
    _check_alone(config, "train.shard", ("base.quantize", "train.offload", "train.compile"))
    if processes == 1:
        raise ValueError(
            "train.shard=true shares the frozen weights among processes, and there is one. Start several with "
            "accelerate launch, or leave it out."
        )


def _check_data(config: Config, base: BaseFacts) -> Samples:
    """What the run learns from, listed but not read; it is listed again when it is cached, which takes seconds."""
    data, family = config.data, base.family
    if isinstance(data.buckets, tuple):
        network = family.network_config(config.base.path, config.base.config)
        buckets_for(data.buckets, data.resolution, lambda side: family.latent_shape_of(network, side))
    family.check_side(config.base.path, data.resolution)
    family.check_prompts(config.base.path, config.preview.prompts)

    if data.shards:
        return _check_shards(config)
    if data.images:
        folder = pictures_of(config)
        pictures, skipped, notes = folder
        captions = (
            caption for picture in pictures for caption in chosen(picture.caption, data.captions, Tags.of(data))
        )
        family.check_prompts(config.base.path, captions)
        left_out = "; ".join([f"{len(skipped)} left out", *notes])
        source = f"{len(pictures)} pictures with captions from {data.images}, {left_out}"
        return Samples(len(pictures), source, folder)
    number = len(prompts_of(config))
    if config.objective.matching:
        return Samples(number, f"{number} prompts; what the student draws of them stands in for pictures")
    source = (
        f"{data.count} latents that the teacher makes from {number} prompts "
        f"({data.teacher_steps} DDIM steps, CFG {data.teacher_guidance:g})"
    )
    return Samples(data.count, source)


def _check_shards(config: Config) -> Samples:
    data = config.data
    shards = list_shards(data.shards)
    bad = absent(shards)
    if not data.skip_bad:
        here = {shard: path for shard in shards if (path := local_path(shard)) and path.is_file()}
        bad += [f"{shard}: {problem}" for shard in here if (problem := check_end(shard))]
    stop_or_skip(bad, data.skip_bad, f"{len(bad)} of the {len(shards)} shards in data.shards cannot be read")
    source = f"{len(shards)} shards, {len(bad)} left out; their samples are counted when they are cached"
    return Samples(None, source)
