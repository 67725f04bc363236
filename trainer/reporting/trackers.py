"""TensorBoard, W&B and trackio, as accelerate drives them: the figures of a run and its pictures, as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from ..system.saying import Say

PROJECT, DEFAULT = "phased-consistency", "tensorboard"


def available(names: Iterable[str], say: Say) -> list[str]:
    """The trackers of these names whose packages are here. Says so where that of the default one is missing.

    Raises ValueError where another's is missing: that one was set by the user.
    """
    names = list(dict.fromkeys(names))
    missing = [name for name in names if find_spec(name) is None]
    absent = [name for name in missing if name != DEFAULT]
    if absent:
        packages = " and ".join(absent)
        raise ValueError(f"train.trackers: {packages} not installed: pip install {' '.join(absent)}, or leave it out.")
    if missing:
        say("No TensorBoard logs: pip install tensorboard, or set train.trackers=[].")
    return [name for name in names if name not in missing]


class Trackers:
    """The trackers of one run. Where one fails on the way, this is said, it is dropped, and the run goes on.

    names: as in `train.trackers`. folder, name, settings: the run's; the settings are shown to others. Raises
    ValueError as `available`.
    """

    def __init__(self, names: Iterable[str], folder: Path, name: str, settings: dict[str, Any], say: Say):
        self.names = available(names, say)
        self.folder, self.name, self.settings, self.say = folder, name, settings, say
        self.open: list[GeneralTracker] = []

    def start(self, step: int) -> None:
        """Open them for a run that goes on from an update. Raises RuntimeError for one that cannot be opened."""
        online = {"name": self.name, "config": self.settings}
        options: dict[str, dict[str, Any]] = {
            # TensorBoard drops the figures of updates that come again
            "tensorboard": {"logging_dir": self.folder / "logs", "purge_step": step + 1 if step else 0},
            "wandb": {**online, "dir": str(self.folder)},
            "trackio": {**online, "embed": False},
        }
        for name in self.names:
            try:
                tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, **options[name])
                tracker.start()
            except Exception as error:  # each service has errors of its own
                raise RuntimeError(
                    f"train.trackers: {name} could not be started: {error}. Mend that, or leave it out."
                ) from error
            self.open.append(tracker)

    def figures(self, values: dict[str, float], step: int) -> None:
        """Pass on an update's numbers by name."""
        self._each(lambda tracker: tracker.log(values, step=step))

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Pass on a picture that was made after an update."""
        pixels = np.asarray(image.convert("RGB"))

        def show(tracker: GeneralTracker) -> None:
            if tracker.name == "tensorboard":
                tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [pixels]}, step=step)
            else:
                import trackio

                tracker.log({name: trackio.Image(pixels)}, step=step)

        self._each(show)

    def finish(self) -> None:
        """Close them, so that all is written that they still hold."""
        self._each(lambda tracker: tracker.finish())
        self.open = []

    def _each(self, do: Callable[[GeneralTracker], None]) -> None:
        """Do this with every open tracker, and drop those with which it fails."""
        for tracker in list(self.open):
            try:
                do(tracker)
            except Exception as error:
                self.say(f"{tracker.name} failed ({error}) and is left out from here on.")
                self.open.remove(tracker)
