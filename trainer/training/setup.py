"""What a run is made of before its first update, each part checked as early as it can be."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator

from ..config.config import Config
from ..data.cache import LatentCache, build_cache
from ..data.held_out import hold_out
from ..efficiency.prepare import prepare
from ..efficiency.quantize import Probe
from ..families import Base, load_base
from ..families.base import DTYPES
from ..lora.adapter import Learner
from ..lora.recipe import recipe_for
from ..reporting.log import without_places
from ..reporting.progress import Reporter
from ..system.clock import Clock
from ..system.locks import only_filler
from ..system.machine import examine, package_version
from ..system.processes import Processes
from . import whole
from .adversary import Adversary
from .batches import Batches, Split
from .checkpoint import State
from .checks import check_prepare, check_start
from .engine import Engine

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
LEFT_OUT = 20  # lines on samples left out that are kept

Say = Callable[[str], None]


def open_base(config: Config, processes: Processes, say: Say) -> Base:
    """The frozen base. What cannot be trained or sampled, raises ValueError here, before anything is cached."""
    b, device = config.base, processes.accelerator.device
    say(f"Loading {b.path}.")
    options = b.model_dump(exclude={"path", "dtype", "quantize"}, exclude_none=True)
    base = load_base(b.path, dtype=DTYPES[b.dtype], device=device, in_turn=True, **options)
    base.latent_shape(config.data.resolution)
    if base.whole:
        whole.check_whole(config)
    else:
        recipe_for(config, base)
    check_prepare(config, type(base), device, processes.count)
    if config.lora.init:
        check_start(config, base)
    for note in config.notes():
        say(note)
    return base


def fill_cache(config: Config, base: Base, processes: Processes, reporter: Reporter) -> LatentCache:
    """The run's cache, made where it lacks something; the encoders are dropped afterwards."""
    share = {"rank": processes.rank, "processes": processes.count, "wait": processes.wait}
    with processes.by_first(only_filler(config.cache_folder, reporter.say)):
        cache = build_cache(config, base, reporter.caching, **share)
    for line in cache.skipped:
        reporter.say(f"Left out {line}.")
    for note in cache.notes:
        reporter.say(f"{note}.")
    reporter.say(f"{len(cache)} samples in {cache.folder}, {len(cache.skipped)} left out.")
    base.drop_encoders()
    return cache


def split_of(config: Config, processes: Processes, kept: State | None, changed: bool, say: Say) -> Split:
    """How each update is shared out. A run that goes on takes as many samples as before, whatever the number of
    processes, unless settings may have `changed`; raises ValueError where they cannot share them."""
    train, count, folder = config.train, processes.count, config.run_folder
    split = Split(train.batch_size, train.accumulation, count)
    if kept is None:
        return split
    facts, asked = kept[2], train.batch_size * train.accumulation
    then = facts["samples per update"]
    if then == split.update or (changed and facts["samples per process"] != asked):
        return split
    if facts["samples per process"] != asked:
        raise ValueError(
            f"{folder} holds a run of {then} samples an update, and these settings take {split.update}: "
            "train.batch_size times train.accumulation in each process. Keep the product to go on, use another "
            "output folder, or --accept-changes."
        )
    split = Split.of_update(then, count, train.batch_size)
    shared = f"{count} process{'es' * (count > 1)}, {split.accumulation} passes of {split.size} each"
    say(f"The run takes {then} samples an update: {shared}.")
    return split


def make_batches(config: Config, base: Base, cache: LatentCache, split: Split, rank: int, say: Say) -> Batches:
    """The run's own stream of batches, without the samples that are held out."""
    asked, seed = config.validation.count, config.train.seed
    found = hold_out(cache.captions.numbers, cache.buckets, asked, seed)
    if told := found.sentence(asked, len(cache)):
        say(told)
    draws = {"split": split, "updates": config.train.steps, "seed": seed, "rank": rank}
    draws |= {"judged": config.adversarial.weight > 0, "held_out": found}
    return Batches(cache, base, config.objective, cache.encoding([""]), **draws)


def make_engine(
    config: Config, accelerator: Accelerator, base: Base, adapter: Learner, batches: Batches, clock: Clock, say: Say
) -> Engine:
    """The engine, once the base is seen to predict what it is said to on the run's own data, and is made ready."""
    a, cache = config.adversarial, batches.cache
    null = {k: v.to(base.device) for k, v in base.null_condition(batches.empty).items()}
    some = [int(n) for n in cache.buckets[0][:8]]
    x0 = cache.latents(some, [torch.Generator().manual_seed(n) for n in some]).to(base.device)
    condition = {k: v.to(base.device) for k, v in batches.condition(some).items()}
    if not base.whole:
        with adapter.off(), accelerator.autocast():
            base.check_prediction(x0, condition)
    with accelerator.autocast():
        for line in prepare(config, base, adapter, Probe(x0, condition, null)):
            say(line)
    adversary = None
    if a.weight:
        adversary = Adversary(base, adapter, null, config.data.resolution, a.width, config.train.seed)
    engine = Engine(base, adapter, config.objective, null, adversary, clock)
    engine.whole_target = config.train.compile
    return engine


def facts_of(config: Config, processes: Processes, batches: Batches) -> dict[str, Any]:
    """What a start of a run tells of itself."""
    cache, device = batches.cache, examine()["device"]
    left_out = [without_places(line) for line in cache.skipped[:LEFT_OUT]]
    return {
        "device": device | {"processes": processes.count},
        "versions": {"phased-consistency": package_version()} | {name: version(name) for name in LIBRARIES},
        "preset": config.preset,
        "samples per update": batches.split.update,
        "settings": config.for_others(),
        "data": {
            "samples": len(cache),
            "held out": len(batches.held_out),
            "known captions": batches.held_out.known,
            "prompts": len(cache.prompts) - 1,
            "left out": len(cache.skipped),
            "left out lines": left_out,
        },
        "notes": [without_places(note) for note in (*config.notes(), *cache.notes)],
    }
