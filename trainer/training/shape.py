"""`train.batch_size=auto`: how an update's samples are divided into passes on the card that is there, decided once."""

from __future__ import annotations

from typing import Any

from ..config.config import Config
from ..config.load import load_config
from ..config.sections import AUTO
from ..efficiency.memory import advice, fitting_batch, limit_bytes, switches
from ..families import look_at_base
from ..system.machine import GIB
from ..system.processes import Processes
from .checkpoint import latest_facts

USUAL = ("sd15-4step", "sdxl-4step", "sd3-4step")  # presets that stand for their family


def settle_batch(config: Config, processes: Processes | None = None) -> tuple[Config, str]:
    """The configuration with numbers in place of train.batch_size=auto, and a sentence on them, "" where it has them.

    The samples of an update stay as they are. A run that goes on keeps its passes as they were, so that it goes on
    exactly on another card too. processes: those of the run, which all take what fits each of them.

    Raises ValueError where there is no GPU and train.memory_limit_gib is not set, and what a base that cannot be, or a
    damaged checkpoint, raises.
    """
    train = config.train
    if train.batch_size != AUTO:
        return config, ""
    samples = train.accumulation
    if before := _shape_before(config, samples):
        size, passes = before
        return config.shaped(size, passes), f"{_shape(size, passes)}, as the run in {config.run_folder} was begun."

    family = look_at_base(config.base.path, **config.base.reading()).family
    limit = limit_bytes(config, "train.batch_size", "a number")
    if processes:
        limit = processes.least(limit)
    size, tried = fitting_batch(config, family, limit)
    return config.shaped(size, samples // size), f"{_shape(size, samples // size)}{fit_words(size, tried, limit)}."


def _shape_before(config: Config, samples: int) -> tuple[int, int] | None:
    """The passes of the run in the folder, where it has as many samples an update; else None."""
    newest = latest_facts(config.run_folder / "checkpoints")
    before = newest[1].get("settings", {}).get("train", {}) if newest else {}
    size, passes = before.get("batch_size"), before.get("accumulation")
    return (size, passes) if size and passes and size * passes == samples else None


def _shape(size: int, passes: int) -> str:
    return f"train.batch_size={AUTO}: {passes} pass{'es' * (passes > 1)} of {size} an update"


def fit_words(size: int, tried: dict[int, float], limit: float) -> str:
    """What `fitting_batch` went by, as the rest of a sentence."""
    needs, there = f"{tried[size] / GIB:.1f} GiB by estimate", f"{limit / GIB:.1f} that may be filled"
    if tried[size] > limit:
        return f", {needs}, which is more than the {there}: expect it to run out of memory"
    larger = min((n for n in tried if n > size), default=None)
    more = f"; {larger} at a time would take {tried[larger] / GIB:.1f}" if larger else ""
    return f", {needs}, of {there}{more}"


def fitting_shapes() -> dict[str, dict[str, Any]]:
    """The passes of an update that fit the free memory of the GPU, by the name of each family's usual preset.

    JSON-ready: "batch_size", "accumulation", "gib" by estimate, whether it "fits", "advice" where it does not, and as
    "preset" batch_size and accumulation of its own.
    """
    shapes = {}
    for name in USUAL:
        preset = load_config(preset=name)
        config = load_config(preset=name, overrides=["train.batch_size=auto"])
        family = look_at_base(config.base.path, **config.base.reading()).family
        limit = limit_bytes(config)
        size, tried = fitting_batch(config, family, limit)
        settled = config.shaped(size, config.train.accumulation // size)
        fits = tried[size] <= limit
        shapes[name] = {
            "batch_size": size,
            "accumulation": settled.train.accumulation,
            "gib": round(tried[size] / GIB, 1),
            "fits": fits,
            "advice": "" if fits else advice(switches(settled, family)),
            "preset": [preset.train.batch_size, preset.train.accumulation],
        }
    return shapes
