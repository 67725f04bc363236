"""A run's network made ready to train: its base quantised, its blocks compiled, offloaded, computed again."""

from __future__ import annotations

from ..config.config import Config
from ..families import Base
from ..lora.adapter import Learner
from ..system.machine import GIB
from .blocks import Offload, blocks_of, compile_blocks, recompute, shard
from .folding import fold_where_cheaper
from .memory import recomputed
from .quantize import Trial, guided_error, predictions, quantize


def prepare(config: Config, base: Base, learner: Learner, trial: Trial) -> list[str]:
    """Do what base.quantize, train.compile, train.offload and train.gradient_checkpointing ask for; sentences on it.

    learner: injected, with its first weights. trial: the run's own data, on which a quantised base is measured.
    """
    said = []
    if config.base.quantize:
        said += _quantize(config, base, learner, trial)
    elif not (base.whole or config.train.compile):
        fold_where_cheaper(learner)
    if config.train.compile:
        if not base.whole:
            learner.switch_by_number()
        said.append(f"{compile_blocks(base.network)} blocks are compiled; the first updates take minutes.")
    # before the weights leave the GPU, whose free memory decides how many
    again = recomputed(config, type(base))
    if config.train.offload:
        offload = Offload(base.network, base.device)
        said.append(f"{offload.bytes / GIB:.2f} GiB of frozen weights wait in main memory for their block's pass.")
    if config.train.shard:
        held = shard(base.network, learner)
        said.append(f"{held / GIB:.2f} GiB of the frozen weights are held here, the rest by the other processes.")
    if again:
        recompute(learner, again)
        said.append(f"{len(again)} of {len(blocks_of(base.network))} blocks are computed again for the backward pass.")
    return said


def _quantize(config: Config, base: Base, learner: Learner, trial: Trial) -> list[str]:
    guidance = max(config.objective.guidance) if config.objective.guided() else config.data.teacher_guidance
    before = predictions(base, learner, trial, guidance)
    sentence = quantize(base.network, config.base.quantize)
    plain, guided = guided_error(before, predictions(base, learner, trial, guidance))
    return [sentence, f"Its prediction is off by {plain:.2%}, its guided one at CFG {guidance:g} by {guided:.2%}."]
