"""Small runs of the trainer for tests: settings that take seconds, a stub base, and `pcm` in a process of its own."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from accelerate.state import AcceleratorState

from phased_consistency.samplers.lora_file import read_header
from phased_consistency.trainer.config.config import Config
from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.reporting.progress import Reporter
from support.bases import make_speck

TINY = "tiny-sd15"
SMALL = {
    "base.dtype": "fp32",
    "data.count": 6,
    "data.teacher_steps": 2,
    "data.teacher_guidance": 3,
    "data.resolution": 32,
    "data.batch_size": 3,
    "lora.rank": 4,
    "lora.alpha": 2,
    "objective.guidance": [3, 4],
    "train.batch_size": 3,
    "train.steps": 4,
    "train.lr": 1e-2,
    "train.save_every": 4,
    "train.trackers": "[]",
    "train.report": "false",
    "preview.every": 0,
    "validation.every": 0,
}


@cache
def speck(family: str = "sd15") -> tempfile.TemporaryDirectory:
    """The folder of the base that small runs learn from, as long as this process lives (support/bases.py)."""
    folder = tempfile.TemporaryDirectory(prefix="speck-")
    make_speck(Path(folder.name), family)
    return folder


def settings(output: Path, **changes) -> list[str]:
    """Overrides of a small run in a folder; changes: "section__key" -> value, where None leaves the key out."""
    values = (
        SMALL
        | {"base.path": speck().name, "output": output}
        | {key.replace("__", "."): value for key, value in changes.items()}
    )
    return [f"{key}={value}" for key, value in values.items() if value is not None]


def small_config(output: Path, **changes) -> Config:
    return load_config(overrides=settings(output, **changes))


class Notes(Reporter):
    """Keeps what a run says, and the updates that it shows."""

    def __init__(self):
        self.said, self.steps = [], []

    def say(self, text):
        self.said.append(text)

    def update(self, status):
        self.steps.append(status.step)


@contextmanager
def other_precision() -> Iterator[None]:
    """accelerate has one precision for each process: forgotten before and after a run in another than the rest."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def start_pcm(*args, cwd: Path | None = None) -> subprocess.Popen:
    """`pcm ...` in its own process, with its output kept apart."""
    command = [sys.executable, "-m", "phased_consistency.trainer", *map(str, args)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metadata(path: Path) -> dict[str, str]:
    return read_header(path).metadata
