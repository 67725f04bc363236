"""TensorBoard, W&B and trackio, as accelerate drives them: the figures of a run and its pictures, as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from ..config.config import Config

PROJECT, DEFAULT = "phased-consistency", "tensorboard"
Say = Callable[[str], None]


def available(names: Iterable[str], say: Say) -> list[str]:
    """The trackers of these names whose packages are here; that the default one's is not, is said.

    Raises ValueError where another one's is missing.
    """
    names = list(dict.fromkeys(names))
    missing = [name for name in names if find_spec(name) is None]
    asked = [name for name in missing if name != DEFAULT]
    if asked:
        wanted = " and ".join(asked)
        raise ValueError(f"train.trackers: {wanted} not installed: pip install {' '.join(asked)}, or leave it out.")
    if missing:
        say("No TensorBoard logs: pip install tensorboard, or set train.trackers=[].")
    return [name for name in names if name not in missing]


class Trackers:
    """Those of one run. One that fails on the way is said and dropped, and the run goes on."""

    def __init__(self, config: Config, say: Say):
        self.config, self.say = config, say
        self.names = available(config.train.trackers, say)
        self.open: list[GeneralTracker] = []

    def start(self, step: int) -> None:
        """Open them for a run that goes on from an update. Raises RuntimeError for one that cannot be opened."""
        config = self.config
        online = {"name": config.name, "config": config.for_others()}
        how: dict[str, dict[str, Any]] = {
            "tensorboard": {"logging_dir": config.run_folder / "logs", "purge_step": step + 1 if step else 0},
            "wandb": {**online, "dir": str(config.run_folder)},
            "trackio": {**online, "embed": False},
        }
        for name in self.names:
            try:
                tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, **how[name])
                tracker.start()
            except Exception as error:  # each service has errors of its own
                failed = f"train.trackers: {name} could not be started: {error}. Mend that, or leave it out."
                raise RuntimeError(failed) from error
            self.open.append(tracker)

    def figures(self, values: dict[str, float], step: int) -> None:
        """Numbers by name, of an update."""
        self._each(lambda tracker: tracker.log(values, step=step))

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """A picture of an update."""
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
        """Close them; what they still hold is written."""
        self._each(lambda tracker: tracker.finish())
        self.open = []

    def _each(self, do: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self.open):
            try:
                do(tracker)
            except Exception as error:
                self.say(f"{tracker.name} failed ({error}) and is left out from here on.")
                self.open.remove(tracker)
