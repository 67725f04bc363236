"""What a section of the check is given, and what it gives back."""

from __future__ import annotations

import gc
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from ...config.config import Config
from ...config.load import load_config
from ...system.machine import GIB, native_bf16
from .bases import TINY, base_folder

TRAINER = Path(__file__).parents[2]
# A run that does nothing beside training, on four samples of the teacher's.
QUIET = ("train.trackers=[]", "train.report=false", "preview.every=0", "validation.every=0", "validation.count=0")
SMALL_DATA = ("data.count=4", "data.teacher_steps=1", "data.batch_size=2")
SMALL = ("data.resolution=64", "train.batch_size=2", "train.accumulation=1", "lora.rank=4")
SPECK = ("data.resolution=32", "train.batch_size=2", "train.accumulation=1", "lora.rank=2", "adversarial.width=8")


@dataclass(frozen=True)
class Verdict:
    """What a section yields. sentence: for people. figures: JSON-ready. holds: whether its promise does; None where it
    has none, or none that can be judged here."""

    sentence: str
    figures: dict[str, Any]
    holds: bool | None = None


class Unfit(Exception):
    """Raised by a section that this machine cannot run; the message is what it needs."""


@dataclass(frozen=True)
class CheckSection:
    """One section of the check. seconds: on an H200, by guess. promise: what it holds the project to, or nothing."""

    name: str
    seconds: float
    promise: str
    run: Callable[[Workplace], Verdict]


@dataclass(frozen=True)
class Workplace:
    """Where the sections run: a folder that goes with the check, and a device.

    tiny: whether the least bases stand in for those of full size, and speed and memory are not judged. ceilings: what
    the device reaches in FLOP/s ("matmul") and bytes/s ("copy"), once the first section has measured it.
    """

    folder: Path
    device: torch.device
    tiny: bool
    ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def half(self) -> str:
        """The 16 bits that the device computes in: presets have bf16, which older cards only emulate."""
        return "fp16" if self.on_gpu and not native_bf16() else "bf16"

    def config(self, preset: str, *overrides: str) -> Config:
        """A preset's configuration on a base that needs no files, of full size unless all is tiny."""
        base = base_folder(preset.partition("-")[0], self.folder / "bases", speck=self.tiny)
        return self._config(preset, [f"base.path={base}", *overrides, *(SPECK if self.tiny else ())])

    def tiny_config(self, preset: str, *overrides: str) -> Config:
        """A preset's configuration on its family's bundled base, or on a smaller one if all is tiny."""
        if self.tiny:
            return self.config(preset, *overrides)
        return self._config(preset, [f"base.path={TINY[preset.partition('-')[0]]}", *SMALL, *overrides])

    def new_folder(self) -> Path:
        """A folder of its own, in the check's."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def clean(self) -> None:
        """Forget what a section leaves: memory, the peak of it, compiled code, the precision that accelerate keeps."""
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.compiler.reset()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def judged(self, holds: bool) -> bool | None:
        """Whether a promise on speed or memory holds; None on a tiny base or without a GPU, which say nothing of it."""
        return holds if self.on_gpu and not self.tiny else None

    def need_gpu(self) -> None:
        """Raise `Unfit` without a GPU."""
        if not self.on_gpu:
            raise Unfit("CUDA")

    def _config(self, preset: str, overrides: list[str]) -> Config:
        settings = [f"output={self.new_folder()}/run", f"base.dtype={self.half}", *SMALL_DATA, *QUIET]
        if preset.startswith("sd3"):
            settings.append("base.t5=false")
        return load_config(None, [*settings, *overrides], preset)


def place_of(error: BaseException) -> str:
    """The innermost line of this package that an error came through, as `trainer/training/update.py:120`."""
    places = [
        f"trainer/{Path(frame.filename).relative_to(TRAINER).as_posix()}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(TRAINER)
    ]
    return places[-1] if places else ""


def gib(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / GIB:.2f} GiB"
