"""A run's network made ready to train: its base quantised, its blocks compiled, offloaded, computed again."""

from __future__ import annotations

import torch
from packaging import version

from .adapter import Learner
from .blocks import Offload, blocks_of, check_compiler, compile_blocks, recompute, shard
from .config import Config
from .families import Base
from .folding import fold_where_cheaper
from .memory import GIB, recomputed
from .quantize import Trial, check_quantizer, guided_error, predictions, quantize


def check_prepare(config: Config, base: type[Base], device: torch.device, processes: int) -> None:
    """Raise ValueError for what `prepare` cannot do here, before anything is loaded or cached."""
    train, asked = config.train, config.base.quantize
    if base.whole:
        for setting, value in (
            ("base.quantize", asked),
            ("train.offload", train.offload),
            ("train.shard", train.shard),
        ):
            if value:
                raise ValueError(f"{setting} is for a frozen base, and all of {base.title} is trained. Leave it out.")
    if train.shard:
        _check_shard(config, processes)
    if asked:
        check_quantizer(asked)
    if train.compile:
        check_compiler(device)
    recomputed(config, base)


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


def _check_shard(config: Config, processes: int) -> None:
    others = {"base.quantize": config.base.quantize, "train.offload": config.train.offload}
    others |= {"train.compile": config.train.compile}
    if set_too := [name for name, value in others.items() if value]:
        raise ValueError(f"train.shard does not go with {' or '.join(set_too)}: leave one of them out.")
    if version.parse(torch.__version__).release < (2, 8):
        raise ValueError(f"train.shard needs torch 2.8 or newer, and this is {torch.__version__}.")
    if processes == 1:
        raise ValueError(
            "train.shard=true shares the frozen weights among processes, and there is one. Start several with "
            "accelerate launch, or leave it out."
        )


def _quantize(config: Config, base: Base, learner: Learner, trial: Trial) -> list[str]:
    guidance = max(config.objective.guidance) if config.objective.guided() else config.data.teacher_guidance
    before = predictions(base, learner, trial, guidance)
    sentence = quantize(base.network, config.base.quantize)
    plain, guided = guided_error(before, predictions(base, learner, trial, guidance))
    return [sentence, f"Its prediction is off by {plain:.2%}, its guided one at CFG {guidance:g} by {guided:.2%}."]
