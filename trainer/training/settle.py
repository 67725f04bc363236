"""Settings that are "auto": decided on the card that is there when a run begins, and kept when it goes on."""

from __future__ import annotations

from typing import Any

import torch

from ..config.config import Config
from ..config.load import load_config
from ..config.sections import AUTO
from ..efficiency.attention import KERNELS, kernel_seconds
from ..efficiency.blocks import compiler_problem
from ..efficiency.memory import advice, fitting_batch, limit_bytes, switches
from ..efficiency.work import work_of
from ..families import look_at_base
from ..families.base import DTYPES
from ..system.machine import GIB, lacking_capability
from ..system.processes import Processes
from .checkpoint import latest_facts
from .checks import fp8_problem

SETTLED = ("batch_size", "accumulation", "compile", "attention")  # settings of `train` that are decided
USUAL = ("sd15-4step", "sdxl-4step", "sd3-4step")  # presets that stand for their family
COMPILED = 500  # updates from which a run compiles by itself: what it gains must make up for its first minutes
OWN_ORDER = "torch's own choice"
TRITON = (7, 0)  # the compute capability from which Triton makes kernels
Settled = tuple[dict[str, Any], str]  # values of settings, and a sentence on them


def settle(config: Config, device: torch.device, processes: Processes | None = None) -> tuple[Config, list[str]]:
    """The configuration with values in place of "auto" in train.batch_size, compile and attention, and sentences on
    them.

    A run that goes on keeps its values, so that it goes on exactly on another card too. processes: those of the run,
    which all take what suits each of them.

    Raises ValueError where there is no GPU and train.memory_limit_gib is not set, and what a base that cannot be, or a
    damaged checkpoint, raises.
    """
    if AUTO not in (config.train.batch_size, config.train.compile, config.train.attention):
        return config, []
    newest = latest_facts(config.run_folder / "checkpoints")
    step, before = newest[0] if newest else 0, newest[1].get("settings", {}).get("train", {}) if newest else {}
    deciding = {  # in this order: the shapes of attention are those of a pass
        "batch_size": lambda config: _settle_batch(config, before, processes),
        "compile": lambda config: _settle_compile(config, device, before, step, processes),
        "attention": lambda config: _settle_attention(config, device, before, processes),
    }
    sentences = []
    for setting, decide in deciding.items():
        if getattr(config.train, setting) == AUTO:
            values, sentence = decide(config)
            config = config.changed(train=values)
            sentences.append(sentence)
    return config, sentences


# --- train.batch_size


def _settle_batch(config: Config, before: dict[str, Any], processes: Processes | None) -> Settled:
    """The passes of an update, whose samples stay as they are. before: what the run was begun with, if it was."""
    samples = config.train.accumulation
    size, passes = before.get("batch_size"), before.get("accumulation")
    if size and passes and size * passes == samples:
        return _shape(size, passes), f"{_shape_words(size, passes)}, as the run in {config.run_folder} was begun."

    family = look_at_base(config.base.path, **config.base.reading()).family
    limit = limit_bytes(config, "train.batch_size", "a number")
    if processes:
        limit = processes.least(limit)
    size, tried = fitting_batch(config, family, limit)
    passes = samples // size
    return _shape(size, passes), f"{_shape_words(size, passes)}, {_why(size, tried, limit)}."


def _shape(size: int, passes: int) -> dict[str, int]:
    return {"batch_size": size, "accumulation": passes}


def _shape_words(size: int, passes: int) -> str:
    return f"train.batch_size={AUTO}: {passes} pass{'es' * (passes > 1)} of {size} an update"


def _why(size: int, tried: dict[int, float], limit: float) -> str:
    """What `fitting_batch` went by, as the rest of a sentence."""
    needs, there = f"{tried[size] / GIB:.1f} GiB by estimate", f"{limit / GIB:.1f} that may be filled"
    if tried[size] > limit:
        return f"{needs}, which is more than the {there}: expect it to run out of memory"
    larger = min((n for n in tried if n > size), default=None)
    return f"{needs}, of {there}" + (f"; {larger} at a time would take {tried[larger] / GIB:.1f}" if larger else "")


def fitting_shapes() -> dict[str, dict[str, Any]]:
    """The passes of an update that fit the free memory of the GPU, by the name of each family's usual preset.

    JSON-ready: "batch_size", "accumulation", "gib" by estimate, whether it "fits", "advice" where it does not, and as
    "preset" batch_size and accumulation of its own.
    """
    shapes = {}
    for name in USUAL:
        preset = load_config(preset=name)
        config = load_config(preset=name, overrides=[f"train.batch_size={AUTO}"])
        family = look_at_base(config.base.path, **config.base.reading()).family
        limit = limit_bytes(config)
        size, tried = fitting_batch(config, family, limit)
        shape, fits = _shape(size, config.train.accumulation // size), tried[size] <= limit
        shapes[name] = {
            **shape,
            "gib": round(tried[size] / GIB, 1),
            "fits": fits,
            "advice": "" if fits else advice(switches(config.changed(train=shape), family)),
            "preset": [preset.train.batch_size, preset.train.accumulation],
        }
    return shapes


# --- train.compile


def _settle_compile(
    config: Config, device: torch.device, before: dict[str, Any], step: int, processes: Processes | None
) -> Settled:
    """Whether blocks are compiled. before: what the run was begun with, if it was; step: the update it has come to."""
    reason = _against_compiling(config, device)
    if processes and not processes.least(float(not reason)):
        reason = reason or "another process of the run cannot"
    ahead = config.train.steps - step
    compiled = before.get("compile")
    if reason:
        compiled = False
    elif compiled is not None:
        reason = f"as the run in {config.run_folder} was begun"
    else:
        compiled = ahead >= COMPILED
        gain = "in which the first minutes pay" if compiled else f"and the first minutes pay from {COMPILED} on"
        reason = f"{ahead} updates are ahead, {gain}"
    return {"compile": compiled}, f"train.compile={AUTO}: {'on' if compiled else 'off'}, {reason}."


def _against_compiling(config: Config, device: torch.device) -> str:
    """Why blocks cannot be compiled here, or not to advantage; "" where nothing is against it."""
    if device.type != "cuda":
        return "it pays on a CUDA GPU alone"
    others = {"train.shard": config.train.shard, "lora.dora": config.lora.dora}
    if set_too := [name for name, value in others.items() if value]:
        return f"it does not go with {set_too[0]}"
    if lack := lacking_capability(device, TRITON):
        needed, here = lack
        return f"Triton needs a GPU of compute capability {needed}, and this one has {here}"
    return fp8_problem(config, device) or compiler_problem(device)


# --- train.attention


def _settle_attention(
    config: Config, device: torch.device, before: dict[str, Any], processes: Processes | None
) -> Settled:
    """The fastest kernel for the largest attention of a pass. before: what the run was begun with, if it was."""
    setting = f"train.attention={AUTO}"
    if "attention" in before:
        kernel = before["attention"]
        return {"attention": kernel}, f"{setting}: {kernel or OWN_ORDER}, as the run in {config.run_folder} was begun."
    shapes, reason = (), "it is chosen on a CUDA GPU alone"
    if device.type == "cuda":
        family = look_at_base(config.base.path, **config.base.reading()).family
        shapes, reason = work_of(config, family).largest, "the network has no attention"
    if not shapes:
        return {"attention": None}, f"{setting}: {OWN_ORDER}, {reason}."

    query, key = (torch.Size((config.train.batch_size, *shape[1:])) for shape in shapes)
    seconds = {name: kernel_seconds(name, query, key, DTYPES[config.base.dtype], device) for name in KERNELS}
    seconds = {name: time or float("inf") for name, time in seconds.items()}
    if processes:  # what is fastest on the slowest of their GPUs
        seconds = {name: -processes.least(-time) for name, time in seconds.items()}
    ranked = sorted((time, name) for name, time in seconds.items() if time != float("inf"))
    if not ranked:
        return {"attention": None}, f"{setting}: {OWN_ORDER}, since no fused kernel takes this network's tensors here."
    times, shape = ", ".join(f"{name} {time * 1e3:.3g} ms" for time, name in ranked), " x ".join(map(str, query))
    return {"attention": ranked[0][1]}, f"{setting}: {ranked[0][1]} (forward and backward of {shape}: {times})."
