"""What a run will do and need, worked out without loading a weight: the plan behind `--dry-run` and `pcm doctor`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ...samplers import FlowSchedule, Recipe
from ..config.config import Config
from ..config.load import flat
from ..data.held_out import most_held_out
from ..data.prompts import read_prompts
from ..data.reading import stop_or_skip
from ..data.shards import list_shards
from ..data.sources import absent, pictures_of
from ..efficiency.memory import BYTES, estimate_memory, switches
from ..families import FAMILIES, Base, family_class
from ..families.base import DTYPES
from ..families.loading import checkpoint_header, is_hub_id
from ..families.prediction import found_in_header, found_in_scheduler, settle
from ..families.sd3 import SD3, check_flow, read_shift
from ..lora.recipe import recipe_for
from ..objectives import Objective
from ..system.machine import GIB
from ..tiny.bundled import bundled_folder, own_prompts
from .checks import check_start, check_whole
from .state import Trained
from .validation import passes_of


def plan(config: Config) -> dict[str, Any]:
    """The plan and the memory estimate as JSON-ready values, with `text` for people.

    Raises ValueError for bad data or a base that is not of its family, FileNotFoundError for one that is not there.
    """
    family = _family(config)
    memory, saving = estimate_memory(config, family), switches(config, family)
    samples, source = _data(config)
    train, objective = config.train, config.objective
    seen = train.steps * train.batch_size * train.accumulation
    passes, a_sample = _passes(config)
    if family.whole:
        check_whole(config)
    recipe = None if family.whole else recipe_for(config, _stand_in(config, family))
    if config.lora.init:
        check_start(config, _stand_in(config, family))
    facts = {
        "base": config.base.path,
        "family": family.name,
        "data": source,
        "updates": train.steps,
        "samples_seen": seen,
        "passes_over_the_data": round(seen / samples, 1) if samples else None,
        "forward_passes_per_sample": passes,
        "validation": _validation(config, recipe, samples, passes),
        "lora_modules": memory["lora_modules"],
        "trained_parameters": memory["trained_parameters"],
        "file_bytes": memory["trained_parameters"] * (4 if family.whole else BYTES[config.lora.dtype]),
        "phase_starts": [t - 1 for t in config.grid().edges[1:]],
        "output": str(config.run_folder / (config.name if family.whole else f"{config.name}.safetensors")),
        "memory_gib": memory["gib"],
        "blocks_computed_again": memory["blocks_computed_again"],
        "would_save_gib": dict(saving),
    }
    edges = ", ".join(str(t) for t in reversed(facts["phase_starts"]))
    lines = [
        "Resolved configuration",
        *(f"  {key} = {json.dumps(value)}" for key, value in flat(config.model_dump(mode="json")).items()),
        "Plan",
        f"  base      {facts['base']}, {family.title}",
        f"  data      {source}",
        f"  train     {train.steps} updates of {train.batch_size * train.accumulation} samples, {seen} in all "
        f"({facts['passes_over_the_data'] or 'not yet known how many'} passes)",
        f"  a sample  {a_sample}",
        f"  objective {objective.name}: {_summary(objective)}",
        f"  phases    {config.grid().phases}, starting at timesteps {edges}; {objective.points} points",
        f"  trains    {_learner(config, family, facts)}",
        f"  writes    {facts['output']}; checkpoints every {train.save_every}, previews every "
        f"{config.preview.every} updates",
        f"  measures  {_measures(facts)}",
        *([f"  use       {recipe.usage_hint()}"] if recipe else []),
        *(f"  note      {note}" for note in config.notes()),
        "Memory estimate (GiB)",
        *(f"  {name:48} {value:6.2f}" for name, value in memory["gib"].items()),
        *(["Would save, each alone (GiB)"] if saving else []),
        *(f"  {setting:48} {gib:6.2f}" for setting, gib in saving),
    ]
    return facts | {"text": "\n".join(lines)}


def _family(config: Config) -> type[Base]:
    """The base's family. A local base must be there; a hub id whose family is set is left to the run."""
    path, asked = config.base.path, config.base.family
    if asked and bundled_folder(path) is None and is_hub_id(path):
        return FAMILIES[asked]
    return family_class(path, asked)


def _learner(config: Config, family: type[Base], facts: dict[str, Any]) -> str:
    size = f"{facts['trained_parameters'] / 1e6:.1f} M parameters, {facts['file_bytes'] / 1e6:.0f} MB"
    if family.whole:
        return f"the whole network, {size}"
    lora = config.lora
    return f"a LoRA of rank {lora.rank}, alpha {lora.alpha:g}, {facts['lora_modules']} modules, {size} in {lora.dtype}"


def _data(config: Config) -> tuple[int | None, str]:
    """How many samples there are, where that is known before they are read, and where they come from."""
    data = config.data
    if data.shards:
        shards = list_shards(data.shards)
        gone = absent(shards)
        stop_or_skip(gone, data.skip_bad, f"of the {len(shards)} shards in data.shards cannot be read")
        return None, f"{len(shards)} shards, {len(gone)} left out; their samples are counted when they are cached"
    if data.images:
        pictures, skipped = pictures_of(data.images, data.count, data.skip_bad)
        source = f"{len(pictures)} pictures with captions from {data.images}, {len(skipped)} left out"
        return len(pictures), source
    prompts = min(data.count, len(read_prompts(data.prompts or own_prompts(config.base.path))))
    return data.count, (
        f"{data.count} latents that the teacher makes from {prompts} prompts "
        f"({data.teacher_steps} DDIM steps, CFG {data.teacher_guidance:g})"
    )


def _summary(objective: Objective) -> str:
    """The first sentence of what an objective says of itself."""
    return " ".join(objective.__doc__.split("\n\n")[0].split()).rstrip(".")


def _validation(config: Config, recipe: Recipe | None, samples: int | None, a_sample: int) -> dict[str, Any]:
    """How often it is measured, on how many held-out samples, and what that takes; a backward pass counts as two."""
    train, settings = config.train, config.validation
    held_out = settings.count if samples is None else most_held_out(samples, settings.count)
    teacher = recipe if config.objective.needs_teacher else None
    each, once = passes_of(config, teacher, held_out, a_sample)
    times = 1 + -(-train.steps // settings.every) if settings.every and each else 0
    training = train.steps * train.batch_size * train.accumulation * (a_sample + 2)
    facts = {"held_out": held_out, "measurements": times, "passes_each": each if times else 0}
    return facts | {"share_of_training": round(((each * times + once) if times else 0) / training, 4)}


def _measures(facts: dict[str, Any]) -> str:
    told = facts["validation"]
    held_out = f"{told['held_out']} samples are held out"
    if not told["measurements"]:
        return f"nothing; {held_out}"
    passes = f"{told['measurements']} times, {told['passes_each']} forward passes each"
    return f"{passes}: about {told['share_of_training']:.1%} of the training's; {held_out}"


def _passes(config: Config) -> tuple[int, str]:
    """Forward passes that one sample takes, and what they are."""
    objective = config.objective
    parts = ["target", "student"] if objective.target_network else ["student"]
    passes = len(parts)
    if objective.needs_teacher:
        solver, steps = objective.teacher_solver()
        times = steps * (2 if solver == "heun" else 1)
        passes += times * (2 if objective.guided() else 1)
        low, high = objective.guidance
        halves = f"conditional and unconditional (CFG {low:g} to {high:g})"
        teacher = f"teacher {halves if objective.guided() else 'without guidance'}"
        parts.insert(0, teacher + (f" {times} times ({solver})" if times > 1 else ""))
    if config.adversarial.weight:
        passes += 2
        parts.append("the discriminator's features of both")
    return passes, f"{', '.join(parts)}: {passes} forward passes and 1 backward"


def _stand_in(config: Config, family: type[Base]) -> Base:
    """What `recipe_for` asks of a base, as far as it is known before the base is loaded."""
    folder = family.config_folder(config.base.path, config.base.config)
    scheduler = next(
        p / "scheduler" / "scheduler_config.json" for p in (folder, family.configs) if (p / "scheduler").is_dir()
    )
    told = config.base.prediction, config.base.zero_terminal_snr
    if family is SD3:
        check_flow(*told)
        schedule, settled = FlowSchedule(config.base.shift or read_shift(scheduler)), ("flow", False)
    else:
        schedule, settled = None, _settled(Path(config.base.path), scheduler, *told)
    return family(None, None, [], [], schedule, *settled, "empty", config.base.path, "")


def _settled(base: Path, scheduler: Path, *told) -> tuple[str, bool]:
    """Prediction and zero terminal SNR as `UNetBase.load` settles them. Raises ValueError for contradictions."""
    _, default = found_in_scheduler(scheduler)
    found = found_in_header(checkpoint_header(base)) if base.suffix == ".safetensors" else default
    return settle(found, default, *told)


def short_of_space(config: Config, trained: Trained, step: int) -> str | None:
    """A sentence where the disk of the run folder has less room than the updates after `step` will take; else None.

    Pictures and logs are not counted, nor what is deleted on the way.
    """
    learnt = {name: sum(p.numel() for p in own.values()) for name, own in trained.learners().items()}
    copies = 1 + bool(trained.average) + bool(trained.engine.average)
    moments = 2 if config.train.optimizer == "adamw" else 0.5  # of four bytes each
    checkpoint = 4 * (sum(learnt.values()) * (1 + moments) + learnt["adapter"] * (copies - 1))
    lora = learnt["adapter"] * (4 if trained.engine.base.whole else DTYPES[config.lora.dtype].itemsize)
    there = len(list(config.run_folder.glob("checkpoints/step-*.safetensors")))
    # a new one is whole before an old one is deleted
    checkpoints = max(1, config.train.keep_checkpoints + 1 - there)
    loras = -(-(config.train.steps - step) // config.train.save_every) + (config.validation.best > 0)
    needed, free = checkpoints * checkpoint + loras * lora, shutil.disk_usage(config.run_folder).free
    if needed <= free or step >= config.train.steps:
        return None
    return (
        f"The run will write about {needed / GIB:.2g} GiB, {checkpoints} checkpoints of {checkpoint / GIB:.2g} and "
        f"{loras} times {lora / GIB:.2g}, and {free / GIB:.2g} are free where {config.run_folder} is: it will stop "
        "when the disk is full. Free space, raise train.save_every, or set output to another disk."
    )
