"""The run: cache, then train, save, preview, and go on exactly where a killed run stopped."""

from __future__ import annotations

import signal
from collections import deque
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from . import whole
from .adapter import learner
from .checkpoint import State, check_same_run, load_latest_state, save_state
from .clock import Clock
from .config import MAY_CHANGE, Config
from .export import export, self_test
from .families import family_class
from .initial import start_from
from .memory import explain_out_of_memory, out_of_memory
from .parts import fill_cache, make_batches, make_engine, open_base, split_of
from .previews import preview_grid, save_image
from .processes import Processes, ProcessLost
from .reporter import Pace, Reporter
from .trained import Trained
from .update import Outcome, Updater, lr_factor

# Updates under way before the first one's numbers are read, so that no GPU waits for the host.
LAG = 1


class RunFailed(RuntimeError):
    """The run could not be finished; the message says why, what is kept, and what to do."""


def train(config: Config, reporter: Reporter | None = None) -> Path:
    """Train as configured and return the path of what was made: a LoRA's file, or the folder of a network that was
    trained whole. The same call goes on where an earlier one stopped.

    Raises ValueError for bad input, `RunFailed` for a run that cannot go on (NaN, too little memory, a failed
    self-test, an interrupt).
    """
    try:
        return Run(config, reporter or Reporter()).go()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        family = family_class(config.base.path, config.base.family)
        raise RunFailed(explain_out_of_memory(error, config, family)) from error


class Run:
    """One run's parts, and the loop over them."""

    def __init__(self, config: Config, reporter: Reporter):
        self.config, self.folder = config, config.run_folder
        precision = {"fp32": "no"}.get(config.base.dtype, config.base.dtype)
        # caching may take one process hours longer than another
        patience = InitProcessGroupKwargs(timeout=timedelta(days=2))
        self.accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[patience])
        self.processes = Processes(self.accelerator)
        self.reporter = reporter if self.accelerator.is_main_process else Reporter()
        if self.accelerator.is_main_process:
            check_same_run(self.folder, config.what_decides_the_weights(), MAY_CHANGE)
        self.base = open_base(config, self.processes, self.reporter.say)
        self.cache = fill_cache(config, self.base, self.processes, self.reporter)
        lora = config.lora
        self.adapter = learner(self.base.network, type(self.base), lora.rank, lora.alpha, config.train.seed)
        self.reporter.say(self.adapter.sentence())
        if config.lora.init:
            self.reporter.say(start_from(config, self.base, self.adapter))
        kept = load_latest_state(self.folder / "checkpoints")
        self.split = split_of(config, self.processes, kept, self.reporter.say)
        self.batches = make_batches(
            config, self.base, self.cache, self.split, self.processes.rank, self.reporter.say
        )
        self.clock = Clock(self.base.device)
        parts = (self.accelerator, self.base, self.adapter, self.batches, self.clock, self.reporter.say)
        self.engine = make_engine(config, *parts)
        self.trained = Trained(config, self.accelerator, self.adapter, self.engine)
        self.step = self._resume(kept)
        self.processes.check_together(self.step, self.adapter.parameters())
        coming, passes = self.batches.ahead(self.step * self.split.accumulation), self.split.accumulation
        how = (self.trained.optimizer, self.trained.learners(), self.processes)
        self.updater = Updater(config, self.engine, coming, passes, *how)
        self.unread: deque[Outcome] = deque()
        self.stop_asked = self.stopping = False
        self.pace, self.writer = Pace(self.step, self.split.update), None

    @property
    def lora_path(self) -> Path:
        return self._file(self.config.name)

    def _file(self, name: str) -> Path:
        """Where a LoRA, or a network that is trained whole, is saved under this name."""
        return self.folder / (name if self.base.whole else f"{name}.safetensors")

    def go(self) -> Path:
        """Train to the end; on SIGINT or SIGTERM save and stop."""
        self.writer = self._tensorboard()
        handlers = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        self.clock.reset()
        self.pace = Pace(self.step, self.split.update)
        try:
            while self.step < self.config.train.steps:
                self.update()
                self._between_updates()
            self._read(keep=0)
            if self.step > self.pace.first:
                self.reporter.say(self._where_time_went())
        finally:
            self.updater.coming.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if self.writer:
                self.writer.close()
        return self._finish()

    def update(self) -> None:
        """One optimizer update of all that is trained; the numbers of the one before it are read."""
        try:
            outcome = self.updater(self.step + 1, self.stop_asked)
        except ProcessLost as error:
            kept = f"{error}. {self._kept()}; the same command goes on from there, with fewer processes too."
            raise RunFailed(kept) from error
        self.step += 1
        self.trained.updated(self.step, self.config.train.steps)
        self.unread.append(outcome)
        self._read(keep=LAG)

    def _read(self, keep: int) -> None:
        """Show what the updates gave, but for the last `keep`. Raises `RunFailed` for numbers that are not finite."""
        while len(self.unread) > keep:
            outcome = self.unread.popleft()
            shown = outcome.read()
            if shown.pop("bad"):
                raise RunFailed(self._not_finite(outcome))
            self.stopping = bool(shown.pop("stop")) or self.stopping
            shown["lr"] = self.config.train.lr * lr_factor(self.config, outcome.step)
            status = self.pace.after(outcome.step, self.config.train.steps, shown["loss"])
            self.reporter.update(status)
            if self.writer:
                for tag, value in (shown | {"samples per second": status.samples_per_second}).items():
                    self.writer.add_scalar(tag, value, outcome.step)

    def _not_finite(self, outcome: Outcome) -> str:
        bad = outcome.bad_samples()
        named = "; ".join(f"{n}: {self.cache.captions[n]!r}" for n in (bad or outcome.samples)[:4])
        what = f"The loss is not finite at update {outcome.step}, samples {named}"
        if not bad:
            others = ", or another process's loss" * (self.processes.count > 1)
            what = f"The gradient{others} is not finite at update {outcome.step}, samples {named}"
        return f"{what}. {self._kept()}. Lower train.lr, use base.dtype=bf16 or fp32, or remove these samples."

    def _kept(self) -> str:
        folder = self.folder / "checkpoints"
        return f"The last checkpoint is kept in {folder}" if folder.is_dir() else "No checkpoint was due yet"

    def _where_time_went(self) -> str:
        """One sentence on the parts of the time since the start, the largest first."""
        seconds = self.clock.seconds()
        whole = sum(seconds.values()) or 1.0
        parts = sorted(seconds.items(), key=lambda item: -item[1])
        return "Time: " + ", ".join(f"{name} {part / whole:.0%}" for name, part in parts) + "."

    def _between_updates(self) -> None:
        config, last = self.config, self.step == self.config.train.steps
        if not last and self.step % config.train.save_every == 0:
            self._save(export_too=True)
        if config.preview.every and self.step % config.preview.every == 0 and not last:
            self.preview(self.folder / "previews" / f"step-{self.step:07d}.png")
        if self.processes.count == 1:  # several must agree first
            self.stopping = self.stop_asked
        if self.stopping and not last:
            self._save(export_too=False)
            where = f"Stopped at update {self.step} of {config.train.steps}"
            raise RunFailed(f"{where}; all is saved. The same command goes on from here.")

    def _finish(self) -> Path:
        self._save(export_too=True)
        if self.config.preview.every:
            self.preview(self.folder / "previews" / f"step-{self.step:07d}.png")
            self.preview(self.folder / f"{self.config.name}.preview.png", captions=False)
        return self.lora_path

    def _save(self, export_too: bool) -> None:
        """Checkpoint, LoRA and self-test, once all that led here is seen to be finite."""
        self._read(keep=0)
        if self.accelerator.is_main_process:
            self._save_state()
        if export_too:
            self._export()

    def _save_state(self) -> None:
        groups, facts = self.trained.state()
        facts |= {
            "samples per update": self.split.update,
            "samples per process": self.config.train.batch_size * self.config.train.accumulation,
            "cache": self.cache.folder.name,
        }
        save_state(self.folder / "checkpoints", self.step, groups, facts, self.config.train.keep_checkpoints)

    def _export(self) -> None:
        final = self.step == self.config.train.steps
        path = self.lora_path if final else self._file(f"{self.config.name}-{self.step:07d}")
        write, test = (whole.export, whole.self_test) if self.base.whole else (export, self_test)
        if self.accelerator.is_main_process:
            write(path, self.trained.weights(), self.config, self.base, self.step, len(self.cache))
        if not self._passes_here():
            return
        with self.adapter.using(self.trained.weights()), torch.compiler.set_stance("force_eager"):
            result = test(path, self.base, self.adapter, self.cache.encoding([""]))
        self.reporter.say(f"{path}: {result.sentence()}.")
        if not result.passed:
            raise RunFailed(
                f"What was saved does not give the trained output when diffusers loads it ({result.sentence()}). "
                f"The checkpoint in {self.folder / 'checkpoints'} is good; please report this with the versions that "
                "pcm doctor prints."
            )

    def _resume(self, kept: State | None) -> int:
        if kept is None:
            return 0
        step, groups, facts = kept
        if facts["cache"] != self.cache.folder.name:
            raise ValueError(
                f"{self.folder} holds a run on other data: the base, the pictures or the captions have changed since. "
                "Restore them to go on, use another output folder to start anew, or delete the folder."
            )
        self.trained.load(groups, facts)
        self.reporter.say(f"Going on from update {step} of {self.config.train.steps}.")
        return step

    def preview(self, path: Path, captions: bool = True) -> None:
        """Draw the run's fixed grid with the weights that would be saved, by the first process."""
        if not self._passes_here():
            return
        eager = torch.compiler.set_stance("force_eager")  # its batches would be compiled for themselves
        with self.adapter.using(self.trained.weights()), self.accelerator.autocast(), eager:
            image = preview_grid(self.config, self.base, self.cache, self.engine.null, captions)
        if self.accelerator.is_main_process:
            save_image(image, path)

    def _passes_here(self) -> bool:
        """Whether this process takes part in the first one's passes: none can run alone that lacks some weights."""
        if self.config.train.shard:
            self.processes.wait()
        return self.config.train.shard or self.accelerator.is_main_process

    def _tensorboard(self):
        if not ("tensorboard" in self.config.train.trackers and self.accelerator.is_main_process):
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.reporter.say("No TensorBoard logs: pip install tensorboard, or set train.trackers=[].")
            return None
        return SummaryWriter(self.folder / "logs", purge_step=self.step + 1)

    def _ask_to_stop(self, *_) -> None:
        self.reporter.say("Stopping after this update." if self.processes.count == 1 else "Stopping with the others.")
        self.stop_asked = True
