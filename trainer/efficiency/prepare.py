"""A run's network made ready to train: its base quantised, its blocks compiled, offloaded, computed again."""

from __future__ import annotations

import torch

from ..config.config import Config
from ..families import Base
from ..lora.adapter import Learner
from ..system.machine import GIB
from .blocks import InputOffload, Offload, blocks_of, compile_blocks, recompute, shard
from .folding import fold_where_cheaper
from .half import run_in_half
from .memory import recomputed
from .quantize import Probe, check_products, guided_error, predictions, quantize


def prepare(config: Config, base: Base, learner: Learner, probe: Probe | None) -> list[str]:
    """Do what base.quantize and train's compile, offload, shard and gradient_checkpointing ask for; sentences on it.

    learner: in the network already, with its first weights. probe: the run's own data, on which a quantised base is
    measured; None: it is not. The order matters: weights are quantised before anything takes them along, and each of
    the others puts itself around what a block does so far, compiled graphs innermost and computing again outermost.
    """
    sentences = []
    if config.base.quantize:
        sentences += _quantize(config, base, learner, probe)
    if not base.whole:
        if base.dtype != torch.float32:
            run_in_half(learner)
        elif not (config.base.quantize or config.train.compile):
            fold_where_cheaper(learner)

    if config.train.compile:
        if not base.whole:
            learner.switch_by_number()
        sentences.append(f"{compile_blocks(base.network)} blocks are compiled; the first updates take minutes.")

    # before the weights leave the GPU, whose free memory decides how many blocks
    blocks = blocks_of(base.network)
    paths = recomputed(config, type(base), blocks)
    if config.train.offload:
        offload = Offload(base.network, base.device)
        sentences.append(f"{offload.bytes / GIB:.2f} GiB of frozen weights wait in main memory for their block's pass.")
    if config.train.shard:
        share = shard(base.network, learner)
        sentences.append(f"{share / GIB:.2f} GiB of the frozen weights are held here, the rest by the other processes.")
    if paths:
        inputs = InputOffload(base.device) if config.train.offload_activations else None
        recompute(learner, paths, inputs)
        until = ", and until then their inputs wait in main memory" if inputs else ""
        sentences.append(f"{len(paths)} of {len(blocks)} blocks are computed again for the backward pass{until}.")
    return sentences


def _quantize(config: Config, base: Base, learner: Learner, probe: Probe | None) -> list[str]:
    """Quantise the base; sentences on how much of it, and by how much its predictions on the probe are off since."""
    check_products(config.base.quantize, config.base.dtype, base.device)
    if probe is None:
        return [quantize(base.network, config.base.quantize)]
    guidance = max(config.objective.guidance) if config.objective.guided() else config.data.teacher_guidance
    before = predictions(base, learner, probe, guidance)
    sentence = quantize(base.network, config.base.quantize)
    plain, guided = guided_error(before, predictions(base, learner, probe, guidance))
    return [sentence, f"Its prediction is off by {plain:.2%}, its guided one at CFG {guidance:g} by {guided:.2%}."]
