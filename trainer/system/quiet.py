"""The libraries' notices about other things, kept off stderr: a run's own lines are what a user should read there."""

from __future__ import annotations

import logging
import os

LOGGERS = ("torchao", "bitsandbytes", "torch.utils._pytree")  # heard when peft or diffusers import what is installed
VARIABLES = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def quiet_libraries() -> None:
    """Let the libraries that the trainer loads tell errors alone, where nobody has asked for more.

    Variables that are set and loggers with a level of their own stay as they are. The libraries read the variables when
    they are imported, so this comes before: one that was imported earlier stays as talkative as it is.
    """
    for variable, value in VARIABLES.items():
        os.environ.setdefault(variable, value)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.ERROR)
