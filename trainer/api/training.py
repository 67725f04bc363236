"""Runs from Python: a configuration, what it would do, and the run itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config.config import Config
from ..config.load import load_config
from ..reporting.progress import Callback, Progress
from ..training.loop import train as run
from ..training.plan import plan as plan_run


def configure(
    file: str | Path | None = None,
    *,
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Config:
    """A run's configuration: a preset, then a TOML file, then settings, each laid over the one before.

    settings: by their dotted keys, such as {"train.steps": 2000}; docs/config.md has them all.
    Raises ValueError that lists every problem at once.
    """
    values = {key: _plain(value) for key, value in (settings or {}).items()}
    return load_config(None if file is None else os.fspath(file), values, preset)


def plan(config: Config, *, accept_changes: bool = False) -> dict[str, Any]:
    """What a run would do, and the memory it would take, as JSON-ready values; nothing is loaded or written.

    Raises ValueError for what the run would refuse.
    """
    return plan_run(config, accept_changes)


def train(
    config: Config,
    *,
    progress: Callable[[Progress], None] | None = None,
    accept_changes: bool = False,
) -> Path:
    """Train as configured, and return the path of what was made: a LoRA's file, or a whole network's folder.

    The same call goes on where an earlier one stopped. progress: called with each update, and with what the run says;
    without it the run is silent. accept_changes: go on although settings or data have changed since.
    Raises ValueError for bad input, and `RuntimeError` for a run that cannot go on, with what is kept of it.
    """
    return run(config, progress and Callback(progress), accept_changes)


def _plain(value: Any) -> Any:
    """A setting's value as TOML would have it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
