"""What a run will do and need, worked out without loading a weight: the plan behind `--dry-run` and `pcm doctor`."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from typing import Any

import torch

from ..config.config import Config
from ..data.held_out import most_held_out
from ..data.size import cache_bytes, count_captions
from ..efficiency.memory import ADAMW_BYTES, OPTIMIZER_BYTES, estimate_memory, switches
from ..families import Base
from ..families.base import DTYPES
from ..lora.adapter import rank_text
from ..objectives import Objective
from ..system.machine import GIB, best_device
from .checks import Checked, check_run, notes_on_device
from .duration import Duration, expected_duration, passes_of_sample
from .settle import SETTLED, settle
from .state import Trained
from .validation import passes_of


def plan(config: Config, accept_changes: bool = False) -> dict[str, Any]:
    """The plan and the memory estimate as JSON-ready values, with `text` for people.

    Raises ValueError and FileNotFoundError for whatever the run itself would refuse, see `check_run`.
    """
    device = best_device()
    config, settled = settle(config, device)
    # as many processes as a launcher has started; else the one that this is
    checked = check_run(config, device, int(os.environ.get("WORLD_SIZE", 1)), accept_changes)

    family, samples = checked.base.family, checked.samples
    memory = estimate_memory(config, family)
    saving = switches(config, family)
    train = config.train
    seen = train.steps * train.batch_size * train.accumulation
    passes = passes_of_sample(config)
    time = duration(config, checked, device)
    captions = None if samples.number is None else count_captions(samples.folder, config)
    cached = {} if captions is None else cache_bytes(config, checked.base, samples.number, captions)
    bytes_each = 4 if family.whole else DTYPES[config.lora.dtype].itemsize
    facts = {
        "base": config.base.path,
        "family": family.name,
        "data": samples.source,
        "updates": train.steps,
        "settled": {key: getattr(train, key) for key in SETTLED},
        "samples_seen": seen,
        "passes_over_the_data": round(seen / samples.number, 1) if samples.number else None,
        "forward_passes_per_sample": passes.number,
        "validation": _measurements(config, checked),
        "expected": asdict(time) if time else None,
        "lora_modules": memory["lora_modules"],
        "trained_parameters": memory["trained_parameters"],
        "file_bytes": memory["trained_parameters"] * bytes_each,
        "phase_starts": [t - 1 for t in config.grid().edges[1:]],
        "output": str(config.run_folder / (config.name if family.whole else f"{config.name}.safetensors")),
        "notes": [
            *settled,
            *config.notes(),
            *notes_on_device(config, device),
            *_cache_note(config, sum(cached.values())),
        ],
        "captions": captions,
        "cache_gib": {what: round(size / GIB, 3) for what, size in cached.items()},
        "memory_gib": memory["gib"],
        "blocks_computed_again": memory["blocks_computed_again"],
        "would_save_gib": dict(saving),
    }
    return facts | {"text": _text(config, checked, facts, duration_text(time, device))}


def duration(config: Config, checked: Checked, device: torch.device) -> Duration | None:
    """How long what is left of the run may take, with what it measures on its way; None as `expected_duration`."""
    measuring = _measurements(config, checked)["share_of_training"]
    step = checked.newest[0] if checked.newest else 0
    return expected_duration(config, checked.base.family, device, measuring, step)


def duration_text(time: Duration | None, device: torch.device) -> str:
    """The sentence on it, and where it is not known on that."""
    return time.sentence(device) if time else "not estimated: the GPU has no memory free to measure its speed in."


def _text(config: Config, checked: Checked, facts: dict[str, Any], time: str) -> str:
    """The plan for people. time: the sentence on it."""
    train, objective, family = config.train, config.objective, checked.base.family
    edges = ", ".join(str(t) for t in reversed(facts["phase_starts"]))
    lines = [
        "Plan",
        f"  base      {facts['base']}, {family.title}",
        f"  data      {facts['data']}",
        f"  train     {train.steps} updates of {train.batch_size * train.accumulation} samples, "
        f"{facts['samples_seen']} in all ({facts['passes_over_the_data'] or 'not yet known how many'} passes)",
        f"  a sample  {passes_of_sample(config).words}",
        f"  objective {objective.name}: {_summary(objective)}",
        f"  phases    {config.grid().phases}, starting at timesteps {edges}; {objective.points} points",
        f"  trains    {_learner(config, family, facts)}",
        f"  writes    {facts['output']}; checkpoints every {train.save_every}, previews every "
        f"{config.preview.every} updates",
        f"  caches    {_cached(facts)}",
        f"  measures  {_measures(facts)}",
        f"  time      {time}",
        *([f"  use       {checked.recipe.usage_hint()}"] if checked.recipe else []),
        *(f"  note      {note}" for note in facts["notes"]),
        "Memory estimate (GiB)",
        *(f"  {name:48} {gib:6.2f}" for name, gib in facts["memory_gib"].items()),
        *(["Would save, each alone (GiB)"] if facts["would_save_gib"] else []),
        *(f"  {setting:48} {gib:6.2f}" for setting, gib in facts["would_save_gib"].items()),
    ]
    return "\n".join(lines)


def _cache_note(config: Config, needed: int) -> list[str]:
    """A sentence where the disk has less room than a cache of so many bytes takes, of which there is nothing yet."""
    folder = config.cache_folder
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
    if needed <= free or any(folder.glob("*/latents-*")):
        return []
    return [
        f"The cache will take about {needed / GIB:.2g} GiB, and {free / GIB:.2g} are free where {folder} is: set "
        "data.cache to a folder on another disk."
    ]


def _cached(facts: dict[str, Any]) -> str:
    gib, captions = facts["cache_gib"], facts["captions"]
    if not gib:
        return "what is counted while it is made"
    return f"{gib['latents']:.2f} GiB of latents and {gib['encodings']:.2f} GiB of {captions} encoded captions, on disk"


def _learner(config: Config, family: type[Base], facts: dict[str, Any]) -> str:
    size = f"{facts['trained_parameters'] / 1e6:.1f} M parameters, {facts['file_bytes'] / 1e6:.0f} MB"
    if family.whole:
        return f"the whole network, {size}"
    lora = config.lora
    rank = rank_text(lora.rank, lora.ranks or {})
    kind = "DoRA" if lora.dora else "LoRA"
    return f"a {kind} of rank {rank}, alpha {lora.alpha:g}, {facts['lora_modules']} modules, {size} in {lora.dtype}"


def _summary(objective: Objective) -> str:
    """The first sentence of what an objective says of itself."""
    return " ".join(objective.__doc__.split("\n\n")[0].split()).rstrip(".")


def _measurements(config: Config, checked: Checked) -> dict[str, Any]:
    """How often a run is measured, on how many held-out samples, and what that takes; a backward pass counts as two."""
    passes = passes_of_sample(config).number
    train, settings, number = config.train, config.validation, checked.samples.number
    held_out = settings.count if number is None else most_held_out(number, settings.count)
    teacher = checked.recipe if config.objective.needs_teacher else None
    each, once = passes_of(config, teacher, held_out, passes)
    times = 1 + -(-train.steps // settings.every) if settings.every and each else 0
    training = train.steps * train.batch_size * train.accumulation * (passes + 2)
    return {
        "held_out": held_out,
        "measurements": times,
        "passes_each": each if times else 0,
        "share_of_training": round(((each * times + once) if times else 0) / training, 4),
    }


def _measures(facts: dict[str, Any]) -> str:
    validation = facts["validation"]
    held_out = f"{validation['held_out']} samples are held out"
    if not validation["measurements"]:
        return f"nothing; {held_out}"
    passes = f"{validation['measurements']} times, {validation['passes_each']} forward passes each"
    return f"{passes}: about {validation['share_of_training']:.1%} of the training's; {held_out}"


def short_of_space(config: Config, trained: Trained, step: int) -> str | None:
    """A sentence where the disk of the run folder has less room than the updates after `step` will take; else None.

    Pictures and logs are not counted, nor what is deleted on the way.
    """
    sizes = {name: sum(p.numel() for p in parameters.values()) for name, parameters in trained.learners().items()}
    copies = 1 + bool(trained.average) + bool(trained.engine.average)
    moments = OPTIMIZER_BYTES.get(config.train.optimizer, ADAMW_BYTES) / 4  # of four bytes each
    checkpoint = 4 * (sum(sizes.values()) * (1 + moments) + sizes["adapter"] * (copies - 1))
    lora = sizes["adapter"] * (4 if trained.engine.base.whole else DTYPES[config.lora.dtype].itemsize)

    there = len(list(config.run_folder.glob("checkpoints/step-*.safetensors")))
    # a new one is whole before an old one is deleted
    checkpoints = max(1, config.train.keep_checkpoints + 1 - there)
    loras = -(-(config.train.steps - step) // config.train.save_every) + (config.validation.best > 0)
    needed = checkpoints * checkpoint + loras * lora
    free = shutil.disk_usage(config.run_folder).free
    if needed <= free or step >= config.train.steps:
        return None
    return (
        f"The run will write about {needed / GIB:.2g} GiB, {checkpoints} checkpoints of {checkpoint / GIB:.2g} and "
        f"{loras} times {lora / GIB:.2g}, and {free / GIB:.2g} are free where {config.run_folder} is: it will stop "
        "when the disk is full. Free space, raise train.save_every, or set output to another disk."
    )
