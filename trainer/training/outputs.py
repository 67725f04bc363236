"""What a run leaves in its folder: checkpoints, LoRAs with their self-test, previews, and the best so far."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..config.config import Config
from ..data.store import LatentCache
from ..lora.selftest import self_test
from ..lora.write import export
from ..pictures import save_image
from ..reporting.journal import Journal
from ..system.clock import Clock
from ..system.machine import out_of_memory
from ..system.processes import Processes
from ..system.saying import Say
from . import whole
from .checkpoint import save_state
from .engine import Engine
from .failure import RunFailed, what_is_kept
from .previews import Previews
from .state import Trained


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "Out of memory.")


class Outputs:
    """Writes what a run leaves, each file whole or not at all, by the first process.

    Whatever passes through the network (self-tests, previews) may need the other processes too: all of them call
    these methods alike, at the same updates. facts: of the run, for its checkpoints, the same for all of them.
    """

    def __init__(
        self,
        config: Config,
        cache: LatentCache,
        engine: Engine,
        trained: Trained,
        facts: dict[str, Any],
        processes: Processes,
        journal: Journal,
        clock: Clock,
        say: Say,
    ):
        self.config = config
        self.folder = config.run_folder
        self.cache = cache
        self.engine = engine
        self.base = engine.base
        self.trained = trained
        self.facts = facts
        self.processes = processes
        self.journal = journal
        self.clock = clock
        self.say = say

    @cached_property
    def previews(self) -> Previews:
        """Made with the first grid: a run without any encodes and keeps nothing for them."""
        return Previews(self.config, self.base, self.cache, self.engine.null)

    @property
    def best_file(self) -> Path:
        """The LoRA, or the network that is trained whole, of the best update so far."""
        return self._file("-best")

    def file_of(self, step: int) -> Path:
        """The LoRA, or the network that is trained whole, of an update; the last one has no number."""
        return self._file("" if step == self.config.train.steps else f"-{step:07d}")

    def preview_of(self, step: int) -> Path:
        return self.config.previews / f"step-{step:07d}.png"

    def _file(self, suffix: str) -> Path:
        name = f"{self.config.name}{suffix}"
        return self.folder / (name if self.base.whole else f"{name}.safetensors")

    def save(self, step: int, best: dict[str, Any] | None, export_too: bool) -> None:
        """Checkpoint, and LoRA with its self-test where `export_too`. best: the state of the run's `Validation`.

        Raises `RunFailed` for what cannot be written, and for a LoRA that is not what was trained.
        """
        with self._writing():
            # the checkpoint first: a run that is killed between the two makes the LoRA of it at its next start
            if self.processes.first:
                groups, facts = self.trained.state()
                facts |= self.facts | {"best": best}
                save_state(self.folder / "checkpoints", step, groups, facts, self.config.train.keep_checkpoints)
            if export_too:
                self._export(step, self.file_of(step))

    def save_file(self, step: int) -> None:
        """The LoRA of an update that has its checkpoint already. Raises as `save`."""
        with self._writing():
            self._export(step, self.file_of(step))

    def save_best(self, step: int) -> None:
        """The weights as they are, as the best so far, with a picture of them. Raises as `save`."""
        with self._writing():
            self._export(step, self.best_file)
        if self.config.preview.every:
            self._draw(step, self.config.picture_of(f"{self.config.name}-best"), cover=True)

    def preview(self, step: int) -> None:
        """Draw the run's fixed grid with the weights that would be saved."""
        self._draw(step, self.preview_of(step))

    def preview_beside_file(self, step: int) -> None:
        """The grid of what was trained alone, under the name where other programs look for a LoRA's picture."""
        self._draw(step, self.config.picture_of(self.config.name), cover=True)

    def passes_here(self) -> bool:
        """Whether this process takes part in the first one's passes: none can run alone that lacks some weights."""
        if self.config.train.shard:
            self.processes.wait()
        return self.config.train.shard or self.processes.first

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A block whose time counts as that of saving, and in which what cannot be written ends the run."""
        try:
            with self.clock.part("saving"):
                yield
        except OSError as error:
            raise RunFailed(f"{error} {what_is_kept(self.folder)}; the same command goes on from there.") from error

    def _export(self, step: int, path: Path) -> None:
        """Write the weights as they would be used, then read the file again and compare."""
        write, test = (whole.export, whole.self_test) if self.base.whole else (export, self_test)
        if self.processes.first:
            changes = self.facts["changes"]
            write(path, self.trained.weights(), self.config, self.base, step, len(self.cache), changes)
        if not self.passes_here():
            return

        # eager: the test's few passes would be compiled for themselves
        with self.trained.adapter.using(self.trained.weights()), torch.compiler.set_stance("force_eager"):
            result = test(path, self.base, self.trained.adapter, self.cache.encoding([""]))
        self.say(f"{path}: {result.sentence()}.")
        self.journal.saved(step, path, result.sentence())
        if not result.passed:
            raise RunFailed(
                f"What was saved does not give the trained output when diffusers loads it ({result.sentence()}). "
                f"The checkpoint in {self.folder / 'checkpoints'} is good; please report this with the versions that "
                "pcm doctor prints."
            )

    def _draw(self, step: int, path: Path, cover: bool = False) -> None:
        if not self.passes_here():
            return
        weights = self.trained.adapter.using(self.trained.weights())
        autocast = self.processes.accelerator.autocast()
        eager = torch.compiler.set_stance("force_eager")  # its batches would be compiled for themselves
        try:
            with self.clock.part("previews"), weights, autocast, eager:
                image = self.previews.cover() if cover else self.previews.grid()
        except (RuntimeError, MemoryError) as error:  # a run needs no picture; but no pass of shards stops alone
            if not out_of_memory(error) or self.config.train.shard:
                raise
            self.say(f"No preview: {_first_line(error)} Fewer preview.prompts take less, preview.every=0 draws none.")
            return

        if not cover:
            self.journal.picture(step, image)
        if self.processes.first:
            try:
                save_image(image, path)
            except OSError as error:  # a run needs no picture
                self.say(f"No preview: {error}.")
