"""Is it small: whole runs on a card that gives no more memory than the one that is promised to be enough."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ...reporting.progress import Reporter
from ...system.machine import GIB
from ...training.failure import RunFailed, RunStopped
from ...training.loop import train
from .section import Unfit, Verdict, Workplace, gib


@dataclass(frozen=True)
class Fit:
    """What is promised to fit: a preset with settings, on a card that gives torch `usable` of its `card` GiB.

    pictures: whether the data are pictures, so that the VAE encodes; else the teacher draws latents.
    """

    card: int
    usable: float
    preset: str
    settings: tuple[str, ...] = ()
    pictures: bool = True


FITS = {  # the promises of docs/memory.md
    "sd3 in 16 GB": Fit(16, 15.0, "sd3-4step", ("base.t5=true",), pictures=False),
    "sdxl in 12 GB": Fit(12, 11.1, "sdxl-4step", ("base.quantize=int8", "train.accumulation=1")),
    "sd15 in 8 GB": Fit(8, 7.2, "sd15-4step", ("train.batch_size=10", "train.accumulation=2", "data.batch_size=8")),
}
# All that a run does, once: two updates, previews, a checkpoint, the file and its self-test.
WHOLE_RUN = ("train.steps=2", "train.save_every=2", "preview.every=2", "preview.steps=[1,4]")
WHOLE_RUN += ("validation.teacher_steps=2",)
PICTURES = 8


class _Peaks(Reporter):
    """Keeps the most memory that the GPU had given by each sentence of a run."""

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu
        self.peaks: list[tuple[str, int]] = []

    def say(self, text: str) -> None:
        if self.on_gpu:
            self.peaks.append((text[:60], torch.cuda.max_memory_reserved()))


def fits(place: Workplace, name: str) -> Verdict:
    """A whole small run within the memory of a smaller card. Raises `Unfit` on a card that is smaller still."""
    fit = FITS[name]
    settings = [*WHOLE_RUN, *fit.settings]
    if place.tiny:
        settings.append("base.t5=false" if fit.preset.startswith("sd3") else "data.batch_size=2")
    if fit.pictures:
        side = place.config(fit.preset).data.resolution
        settings.append(f"data.images={_pictures(place.new_folder(), side)}")
    config = place.config(fit.preset, *settings)

    reporter = _Peaks(place.on_gpu)
    limit = _limit(place, fit)
    try:
        train(config, reporter)
    except RunStopped:
        raise
    except RunFailed as error:
        return Verdict(f"{gib(limit)} are not enough: {error}", {"peaks": reporter.peaks}, place.judged(False))
    finally:
        if place.on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)
    if not place.on_gpu:
        raise Unfit("CUDA")  # after the run, which is tried anywhere
    peak = torch.cuda.max_memory_reserved()
    return Verdict(f"{gib(peak)} at most, of {gib(limit)}", {"peaks": reporter.peaks, "peak": peak}, place.judged(True))


def _limit(place: Workplace, fit: Fit) -> float:
    """Let torch take no more than the smaller card gives; that many bytes."""
    if place.on_gpu:
        total = torch.cuda.get_device_properties(place.device).total_memory
        if fit.usable * GIB > total:
            raise Unfit(f"a card of {fit.card} GB")
        if sys.platform == "win32":  # where a run sets a limit of its own
            raise Unfit("Linux")
        torch.cuda.set_per_process_memory_fraction(fit.usable * GIB / total)
    return fit.usable * GIB


def _pictures(folder: Path, side: int) -> Path:
    """Write pictures of noise, with captions."""
    for number in range(PICTURES):
        generator = torch.Generator().manual_seed(number)
        noise = torch.randint(0, 255, (side, side, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    return folder
