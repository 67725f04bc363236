"""How long a whole run will take, before its first update: its passes, what they cost, and how fast the device is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config.config import Config
from ..efficiency.work import LAUNCH, Work, usual_speed, work_of
from ..families import Base
from ..objectives import Matching
from ..reporting.progress import roughly
from ..system.machine import out_of_memory


@dataclass(frozen=True)
class Passes:
    """A sample's passes in one update: forward ones through the whole network and, for a discriminator, through its
    first blocks; those among the first that have a backward pass. words: what they are."""

    forward: int
    features: int
    backward: int
    words: str

    @property
    def number(self) -> int:
        """All forward passes."""
        return self.forward + self.features


@dataclass(frozen=True)
class Duration:
    """How long a run is expected to take, by its operations. seconds: of all that is left of it, of which `caching` are
    the teacher's, making latents. update: of one update. flops: of all. speed, share: see `usual_speed`."""

    seconds: float
    caching: float
    update: float
    flops: float
    speed: float
    share: float

    def sentence(self, device: torch.device) -> str:
        """The figure in words, with how it was made."""
        place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type.upper()}"
        caching = f"; {roughly(self.caching)} of it for the teacher's latents" if self.caching else ""
        return (
            f"about {roughly(self.seconds)} on {place}{caching}. Rough: {_count(self.flops)}FLOP, at {self.share:.0%} "
            f"of the {_count(self.speed)}FLOP/s that it reaches in large products; the first updates will tell better."
        )


def passes_of_sample(config: Config) -> Passes:
    """The passes that a sample takes in an update; an objective that matches distributions has a trajectory for one."""
    objective = config.objective
    if objective.matching:
        return _passes_of_matching(objective)
    parts = ["target", "student"] if objective.target_network else ["student"]
    forward = len(parts)
    if objective.needs_teacher:
        solver, steps = objective.teacher_solver()
        times = steps * (2 if solver == "heun" else 1)
        forward += times * (2 if objective.guided() else 1)
        low, high = objective.guidance
        halves = f"conditional and unconditional (CFG {low:g} to {high:g})"
        teacher = f"teacher {halves if objective.guided() else 'without guidance'}"
        parts.insert(0, teacher + (f" {times} times ({solver})" if times > 1 else ""))
    features = 0
    if config.adversarial.weight:
        features = 2
        parts.append("the discriminator's features of both")
    return Passes(forward, features, 1, f"{', '.join(parts)}: {forward + features} forward passes and 1 backward")


def _passes_of_matching(objective: Matching) -> Passes:
    """`passes_of_sample` of one trajectory, all its jumps together."""
    forward = objective.passes()
    jumps, updates = objective.jumps, objective.critic_updates
    backward = jumps * (1 + updates)
    guided = f"CFG {objective.matched_scale:g}" if objective.matched_scale > 1 else "without guidance"
    return Passes(
        forward,
        0,
        backward,
        f"a trajectory of {jumps} jumps from noise, without gradient; {updates} updates of the critic on its landings; "
        f"critic, teacher ({guided}) and student at each: {forward} forward passes and {backward} backward",
    )


def flops_of_sample(config: Config, family: type[Base]) -> float:
    """FLOPs of a sample's passes in an update, with the blocks that are computed again; without the LoRA's own, which
    are less than a tenth."""
    passes, train = passes_of_sample(config), config.train
    again = bool(train.gradient_checkpointing or train.offload)

    def flops(work: Work, forward: int, backward: int) -> float:
        return forward * work.forward + backward * (work.backward(family.whole) + again * work.forward)

    whole = flops(work_of(config, family), passes.forward, passes.backward)
    if not passes.features:
        return whole
    return whole + flops(work_of(config, family, features=True), passes.features, 1)


def expected_duration(
    config: Config, family: type[Base], device: torch.device, measuring: float, step: int = 0
) -> Duration | None:
    """How long the run will take from update `step` on; None where the device has no memory to measure its speed in.

    measuring: the share of the training's passes that measurements take on top. Not counted: pictures that are read and
    encoded, previews and files.
    """
    train, data = config.train, config.data
    try:
        speed, share = usual_speed(device, config.base.dtype)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None

    work, passes = work_of(config, family), passes_of_sample(config)
    flops = flops_of_sample(config, family) * train.batch_size
    update = flops / (speed * share)
    if device.type != "cpu":  # a small network waits for the host; a backward pass is about two
        update = max(update, (passes.number + 2 * passes.backward) * work.launches * LAUNCH)
    update *= train.accumulation

    latents = 0 if step or data.has_pictures or config.objective.matching else data.count
    making = latents * data.teacher_steps * (2 if data.teacher_guidance > 1 else 1) * work.forward
    caching, updates = making / (speed * share), (train.steps - step) * (1 + measuring)
    all_flops = making + updates * train.accumulation * flops
    return Duration(caching + updates * update, caching, update, all_flops, speed, share)


def _count(number: float) -> str:
    """A large number with its prefix, such as "890 P", to three digits."""
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z"]
    while number >= 1000 and len(prefixes) > 1:
        number, prefixes = number / 1000, prefixes[1:]
    return f"{number:.3g} {prefixes[0]}"
