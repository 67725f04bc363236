"""Whether what a run will write fits its disk, said before the first update and not in the night."""

from __future__ import annotations

import shutil

from .config import Config
from .export import DTYPES
from .memory import GIB
from .trained import Trained


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
