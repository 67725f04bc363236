"""What a run is made of before its first update, each part checked as early as it can be."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator

from ..config.config import Config
from ..data.cache import build_cache, teacher_trial
from ..data.held_out import hold_out
from ..data.store import LatentCache
from ..efficiency.prepare import prepare
from ..efficiency.quantize import Probe
from ..families import Base, BaseFacts, Condition, load_base
from ..families.base import DTYPES
from ..lora.adapter import Learner
from ..lora.merged import merge_into
from ..lora.recipe import recipe_for
from ..objectives import Objective
from ..reporting.journal import Journal
from ..reporting.log import without_places
from ..reporting.progress import Reporter
from ..reporting.trackers import Trackers
from ..system.clock import Clock
from ..system.locks import only_filler
from ..system.machine import examine, package_version
from ..system.processes import Processes
from ..system.saying import Say
from .adversary import Adversary
from .batches import Batches, Split
from .checks import check_loaded
from .critic import Critic
from .engine import Engine
from .matching import MatchingEngine

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
LEFT_OUT = 20  # lines on samples left out that are kept
TRIED = 8  # samples on which the base is tried


def open_journal(config: Config, processes: Processes, say: Say) -> Journal:
    """The run's journal, in which only the first process writes.

    Raises ValueError for a tracker whose package is missing.
    """
    trackers = None
    if processes.first:
        trackers = Trackers(config.train.trackers, config.run_folder, config.name, config.for_others(), say)
    return Journal(config.run_folder, trackers, config.train.report, say)


def open_base(config: Config, processes: Processes, say: Say) -> Base:
    """The frozen base, loaded. Raises ValueError, before anything is cached, for what only its files could tell."""
    say(f"Loading {config.base.path}.")
    base = load_base(
        config.base.path,
        dtype=DTYPES[config.base.dtype],
        device=processes.accelerator.device,
        in_turn=True,
        **config.base.reading(),
    )
    check_loaded(config, base)
    for line in merge_into(base, config.base.loras):
        say(line)
    for note in config.notes():
        say(note)
    return base


def fill_cache(config: Config, base: Base, processes: Processes, reporter: Reporter) -> LatentCache:
    """The run's cache, made where it lacks something; the encoders are dropped afterwards."""
    # a batch of pictures or of the teacher's latents may itself take minutes, on a CPU hours
    with processes.by_first(only_filler(config.cache_folder, reporter.say)), reporter.stage("filling the cache"):
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


def make_batches(config: Config, base: Base, cache: LatentCache, split: Split, rank: int, say: Say) -> Batches:
    """The run's own stream of batches, without the samples that are held out."""
    number, seed = config.validation.count, config.train.seed
    held_out = hold_out(cache.captions.groups, cache.buckets, number, seed)
    if sentence := held_out.sentence(number, len(cache)):
        say(sentence)
    return Batches(
        cache,
        base,
        objective_of(config, base.facts),
        cache.encoding([""]),
        split=split,
        updates=config.train.steps,
        seed=seed,
        rank=rank,
        judged=config.adversarial.weight > 0,
        held_out=held_out,
        shape=base.latent_shape(config.data.resolution),
    )


def objective_of(config: Config, base: BaseFacts) -> Objective:
    """The objective, which drops no prompts where the LoRA that the run goes on from has guidance in its weights.

    Such a LoRA is sampled without the empty prompt, and so is what comes of it.
    """
    objective, start = config.objective, config.lora.init
    if start is None or objective.prompt_dropout is not None or recipe_for(config, base).negative_prompts:
        return objective
    return objective.model_copy(update={"prompt_dropout": 0.0})


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
    condition = {k: v.to(base.device) for k, v in batches.condition(samples).items()}
    probe, critic = None, None
    if config.objective.matching:  # what the base predicts is seen when its prompts are cached
        if config.base.quantize:
            with adapter.off(), accelerator.autocast():
                probe = Probe(teacher_trial(base, condition, batches.shape), condition, null)
        critic = Critic(config, base, adapter)
    else:
        x0 = cache.latents(samples, [torch.Generator().manual_seed(n) for n in samples]).to(base.device)
        probe = Probe(x0, condition, null)
        if not base.whole:
            with adapter.off(), accelerator.autocast():
                base.check_prediction(x0, condition)
    with accelerator.autocast():
        for line in prepare(config, base, adapter, probe):
            say(line)
    engine = assemble(config, base, adapter, null, critic, clock)
    engine.whole_target = config.train.compile
    return engine


def assemble(
    config: Config, base: Base, adapter: Learner, null: Condition, critic: Critic | None, clock: Clock
) -> Engine:
    """The engine of these parts, with the opponent that the objective asks for; critic: of one that matches."""
    if critic:
        return MatchingEngine(base, adapter, config.objective, null, critic, clock)
    adversary = None
    if config.adversarial.weight:
        adversary = Adversary(base, adapter, null, config.data.resolution, config.adversarial.width, config.train.seed)
    return Engine(base, adapter, config.objective, null, adversary, clock)


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
