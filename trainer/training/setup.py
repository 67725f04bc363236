"""What a run is made of before its first update, each part checked as early as it can be."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator

from ..config.config import Config
from ..data.cache import build_cache
from ..data.held_out import hold_out
from ..data.store import LatentCache
from ..efficiency.prepare import prepare
from ..efficiency.quantize import Trial
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
from .checks import check_prepare, check_start
from .engine import Engine

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
LEFT_OUT = 20  # lines on samples left out that are kept
TRIED = 8  # samples on which the base is tried

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
    with processes.by_first(only_filler(config.cache_folder, reporter.say)):
        cache = build_cache(
            config,
            base,
            reporter.caching,
            rank=processes.rank,
            processes=processes.count,
            wait=processes.wait,
        )
    for line in cache.skipped:
        reporter.say(f"Left out {line}.")
    for note in cache.notes:
        reporter.say(f"{note}.")
    reporter.say(f"{len(cache)} samples in {cache.folder}, {len(cache.skipped)} left out.")
    base.drop_encoders()
    return cache


def split_of(config: Config, count: int, facts: dict[str, Any] | None, changed: bool, say: Say) -> Split:
    """How each update is shared out among `count` processes.

    facts: of the newest checkpoint, None for a new run. A run that goes on takes as many samples an update as before,
    whatever the number of processes, unless settings may have `changed`. Raises ValueError where the processes cannot
    share them, and for a run of another product of train.batch_size and train.accumulation.
    """
    train = config.train
    split = Split(train.batch_size, train.accumulation, count)
    if facts is None or facts["samples per update"] == split.update:
        return split

    before = facts["samples per update"]
    if facts["samples per process"] != train.batch_size * train.accumulation:
        if changed:
            return split
        raise ValueError(
            f"{config.run_folder} holds a run of {before} samples an update, and these settings take {split.update}: "
            "train.batch_size times train.accumulation in each process. Keep the product to go on, use another "
            "output folder, or --accept-changes."
        )
    split = Split.of_update(before, count, train.batch_size)
    shares = f"{count} process{'es' * (count > 1)}, {split.accumulation} passes of {split.size} each"
    say(f"The run takes {before} samples an update: {shares}.")
    return split


def make_batches(config: Config, base: Base, cache: LatentCache, split: Split, rank: int, say: Say) -> Batches:
    """The run's own stream of batches, without the samples that are held out."""
    number, seed = config.validation.count, config.train.seed
    held_out = hold_out(cache.captions.numbers, cache.buckets, number, seed)
    if sentence := held_out.sentence(number, len(cache)):
        say(sentence)
    return Batches(
        cache,
        base,
        config.objective,
        cache.encoding([""]),
        split=split,
        updates=config.train.steps,
        seed=seed,
        rank=rank,
        judged=config.adversarial.weight > 0,
        held_out=held_out,
    )


def make_engine(
    config: Config, accelerator: Accelerator, base: Base, adapter: Learner, batches: Batches, clock: Clock, say: Say
) -> Engine:
    """The engine, once the base is seen to predict what it is said to on the run's own data, and is made ready.

    Raises ValueError for a base that predicts the other of eps and v.
    """
    null = {k: v.to(base.device) for k, v in base.null_condition(batches.empty).items()}

    # a few samples of the run's own, the same at every start
    cache = batches.cache
    samples = [int(n) for n in cache.buckets[0][:TRIED]]
    x0 = cache.latents(samples, [torch.Generator().manual_seed(n) for n in samples]).to(base.device)
    condition = {k: v.to(base.device) for k, v in batches.condition(samples).items()}
    if not base.whole:
        with adapter.off(), accelerator.autocast():
            base.check_prediction(x0, condition)
    with accelerator.autocast():
        for line in prepare(config, base, adapter, Trial(x0, condition, null)):
            say(line)

    adversary = None
    if config.adversarial.weight:
        adversary = Adversary(base, adapter, null, config.data.resolution, config.adversarial.width, config.train.seed)
    engine = Engine(base, adapter, config.objective, null, adversary, clock)
    engine.whole_target = config.train.compile
    return engine


def facts_of(config: Config, processes: Processes, batches: Batches) -> dict[str, Any]:
    """What a start of a run writes of itself into its log: machine, versions, settings, data."""
    cache = batches.cache
    return {
        "device": examine()["device"] | {"processes": processes.count},
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
            "left out lines": [without_places(line) for line in cache.skipped[:LEFT_OUT]],
        },
        "notes": [without_places(note) for note in (*config.notes(), *cache.notes)],
    }
