"""The run: cache, then train, save, preview, and go on exactly where a killed run stopped."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..config.config import MAY_CHANGE, Config
from ..efficiency.memory import explain_out_of_memory
from ..families import family_class
from ..lora.adapter import learner
from ..lora.selftest import self_test
from ..lora.write import export
from ..pictures import save_image
from ..reporting.journal import Journal
from ..reporting.progress import Pace, Reporter
from ..system.clock import Clock
from ..system.files import write_text
from ..system.locks import only_run
from ..system.machine import out_of_memory, peak_memory
from ..system.processes import Processes, ProcessLost
from ..system.stopping import Stopper
from . import whole
from .checkpoint import Facts, State, agreed_changes, check_same_base, latest_facts, load_latest_state, save_state
from .lora_init import start_from
from .plan import short_of_space
from .previews import preview_grid
from .setup import facts_of, fill_cache, make_batches, make_engine, open_base, split_of
from .state import Trained
from .update import Outcome, Updater, lr_factor
from .validation import Validation

# Updates under way before the first one's numbers are read, so that no GPU waits for the host.
LAG = 1


class RunFailed(RuntimeError):
    """The run could not be finished; the message says why, what is kept, and what to do."""

    how = "failed"


class RunStopped(RunFailed):
    """It was asked to stop, and can go on."""

    how = "stopped"


def train(config: Config, reporter: Reporter | None = None, accept_changes: bool = False) -> Path:
    """Train as configured and return the path of what was made: a LoRA's file, or the folder of a network that was
    trained whole. The same call goes on where an earlier one stopped; accept_changes: with other settings too.

    Raises ValueError for bad input, `RunFailed` for a run that cannot go on (NaN, too little memory, a full disk, a
    failed self-test, an interrupt).
    """
    processes, folder = Processes.start(config.base.dtype), config.run_folder
    reporter = reporter if reporter and processes.first else Reporter()
    try:
        held = processes.by_first(only_run(folder, reporter.say))
        with Stopper(reporter.say, launched=processes.count > 1) as stopper, held:
            return Run(config, reporter, processes, stopper, accept_changes).go()
    except KeyboardInterrupt:
        raise RunFailed(f"Interrupted. {what_is_kept(folder)}; the same command goes on from there.") from None
    except ProcessLost as error:
        raise RunFailed(
            f"{error}. {what_is_kept(folder)}; the same command goes on from there, with fewer processes too."
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        family = family_class(config.base.path, config.base.family)
        raise RunFailed(explain_out_of_memory(error, config, family)) from error


def what_is_kept(run: Path) -> str:
    """What is there of the run in a folder, said when it fails."""
    folder = run / "checkpoints"
    last = max(folder.glob("step-*.safetensors"), default=None)
    if last is None:
        return "No checkpoint was due yet, and what was cached is kept"
    return f"The last checkpoint, {last.stem}, is kept in {folder}"


class Run:
    """One run's parts, and the loop over them."""

    def __init__(
        self,
        config: Config,
        reporter: Reporter,
        processes: Processes | None = None,
        stopper: Stopper | None = None,
        accept_changes: bool = False,
    ):
        self.config, self.folder, self.reporter = config, config.run_folder, reporter
        self.processes = processes or Processes.start(config.base.dtype)
        self.accelerator = self.processes.accelerator
        self.stopper = stopper or Stopper(reporter.say)
        self.settings = config.what_decides_the_weights()
        self.journal = Journal(config, self.processes, reporter.say)
        before = latest_facts(self.folder / "checkpoints")
        self.changes = self._agree(before, accept_changes) if self.processes.first else []
        self.base = open_base(config, self.processes, self.reporter.say)
        if before and not accept_changes:
            check_same_base(before[1], self.base.path, self.base.base_hash)
        self.cache = fill_cache(config, self.base, self.processes, self.reporter)
        lora = config.lora
        self.adapter = learner(self.base.network, type(self.base), lora.rank, lora.alpha, config.train.seed)
        self.reporter.say(self.adapter.sentence())
        if config.lora.init:
            self.reporter.say(start_from(config, self.base, self.adapter))
        kept = load_latest_state(self.folder / "checkpoints")
        self.split = split_of(config, self.processes, kept, accept_changes, self.reporter.say)
        self.batches = make_batches(config, self.base, self.cache, self.split, self.processes.rank, self.reporter.say)
        self.clock = Clock(self.base.device)
        parts = (self.accelerator, self.base, self.adapter, self.batches, self.clock, self.reporter.say)
        self.engine = make_engine(config, *parts)
        self.trained = Trained(config, self.accelerator, self.adapter, self.engine)
        watched = (self.engine, self.batches, self.trained, self.processes)
        self.validation = Validation(config, *watched, self.reporter.say)
        self.step = self._resume(kept, accept_changes)
        self.processes.check_together(self.step, self.adapter.parameters())
        coming, passes = self.batches.ahead(self.step * self.split.accumulation), self.split.accumulation
        how = (self.trained.optimizer, self.trained.learners(), self.processes)
        self.updater = Updater(config, self.engine, coming, passes, *how)
        self.unread: deque[Outcome] = deque()
        self.stopping = False
        self.pace = Pace(self.step, self.split.update)
        for told in (self.validation.sentence(), short_of_space(config, self.trained, self.step)):
            if told:
                self.reporter.say(told)

    @property
    def _saved_as(self) -> Path:
        """Where the LoRA, or the network that is trained whole, of this update is saved."""
        return self._file("" if self.step == self.config.train.steps else f"-{self.step:07d}")

    @property
    def _best(self) -> Path:
        """Where that of the best update so far is kept."""
        return self._file("-best")

    def _file(self, suffix: str) -> Path:
        name = f"{self.config.name}{suffix}"
        return self.folder / (name if self.base.whole else f"{name}.safetensors")

    @property
    def _preview_path(self) -> Path:
        return self.folder / "previews" / f"step-{self.step:07d}.png"

    def go(self) -> Path:
        """Train to the end; on SIGINT or SIGTERM save and stop."""
        self.clock.reset()
        self.pace = Pace(self.step, self.split.update)
        facts = facts_of(self.config, self.processes, self.batches)
        told = "Stopping after this update." if self.processes.count == 1 else "Stopping with the others."
        with (
            closing(self.updater.coming),
            self.stopper.saving(told),
            self.journal.open(self.step, facts | {"changes": self.changes}, self._at_end),
        ):
            self._catch_up()
            while self.step < self.config.train.steps:
                self.update()
                self._between_updates()
            self._read(keep=0)
            if self.step > self.pace.first:
                self.reporter.say(self._where_time_went())
            return self._finish()

    def update(self) -> None:
        """One optimizer update of all that is trained; the numbers of the one before it are read."""
        outcome = self.updater(self.step + 1, self.stopper.asked)
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
            self.journal.update(status, shown)

    def _not_finite(self, outcome: Outcome) -> str:
        bad = outcome.bad_samples()
        named = "; ".join(f"{n}: {self.cache.captions[n]!r}" for n in (bad or outcome.samples)[:4])
        what = f"The loss is not finite at update {outcome.step}, samples {named}"
        if not bad:
            others = ", or another process's loss" * (self.processes.count > 1)
            what = f"The gradient{others} is not finite at update {outcome.step}, samples {named}"
        advice = "Lower train.lr, use base.dtype=bf16 or fp32, or remove these samples."
        return f"{what}. {what_is_kept(self.folder)}. {advice}"

    def _where_time_went(self) -> str:
        """One sentence on the parts of the time since the start, the largest first."""
        seconds = self.clock.seconds()
        whole = sum(seconds.values()) or 1.0
        parts = sorted(seconds.items(), key=lambda item: -item[1])
        return "Time: " + ", ".join(f"{name} {part / whole:.0%}" for name, part in parts) + "."

    def _at_end(self) -> dict[str, Any]:
        """What a start of the run says of itself when it ends."""
        end: dict[str, Any] = {"step": self.step}
        with suppress(RuntimeError):  # a GPU that has failed tells no more
            end["parts"] = {name: round(seconds, 3) for name, seconds in self.clock.seconds().items()}
            end["peak memory"] = peak_memory()
        return end

    def _due(self, every: int) -> bool:
        """Whether what is done every so many updates (0: never) is to be done now; at the end all is done anyway."""
        return bool(every) and 0 < self.step < self.config.train.steps and self.step % every == 0

    def _catch_up(self) -> None:
        """Measure what is there before the first update, and make what a run that was killed right after its checkpoint
        did not come to."""
        export = self._due(self.config.train.save_every) and not self._saved_as.exists()
        preview = self._due(self.config.preview.every) and not self._preview_path.exists()
        self.processes.wait()  # until all have looked, before the first one writes
        if self.step == 0 and self.validation.due(0):
            self._validate()
        if export:
            self._export(self._saved_as)
        if preview:
            self.preview(self._preview_path)

    def _between_updates(self) -> None:
        config, last = self.config, self.step == self.config.train.steps
        if self.validation.due(self.step):
            self._validate()
        if self._due(config.train.save_every):
            self._save(export_too=True)
        if self._due(config.preview.every):
            self.preview(self._preview_path)
        if self.processes.count == 1:  # several must agree first
            self.stopping = self.stopper.asked
        if self.stopping and not last:
            self._save(export_too=False)
            self.processes.wait()  # a launcher ends the others as soon as one has ended
            where = f"Stopped at update {self.step} of {config.train.steps}"
            raise RunStopped(f"{where}; all is saved. The same command goes on from here.")

    def _finish(self) -> Path:
        self._save(export_too=True)
        if self.config.preview.every:
            self.preview(self._preview_path)
            self.preview(self.folder / f"{self.config.name}.preview.png", captions=False)
        return self._saved_as

    def _validate(self) -> None:
        """Measure what would be saved now, and keep it where it is the best so far."""
        self._read(keep=0)
        if self._passes_here():
            self._measure()
        self.processes.wait()  # for the first one, longer than an update waits for it

    def _measure(self) -> None:
        with self.clock.part("validation"):
            measured = self.validation(self.step)
        self.journal.validation(self.step, measured.figures, measured.plain, self.validation.state())
        if measured.improved:
            with self._writing():
                self._export(self._best)
            if self.config.preview.every:
                self.preview(self.folder / f"{self.config.name}-best.preview.png", captions=False)

    def _save(self, export_too: bool) -> None:
        """Checkpoint, LoRA and self-test, once all that led here is seen to be finite."""
        self._read(keep=0)
        with self._writing():
            if self.processes.first:
                self._save_state()
            if export_too:
                self._export(self._saved_as)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What cannot be written inside ends the run; the time counts as that of saving."""
        try:
            with self.clock.part("saving"):
                yield
        except OSError as error:
            raise RunFailed(f"{error} {what_is_kept(self.folder)}; the same command goes on from there.") from error

    def _save_state(self) -> None:
        groups, facts = self.trained.state()
        facts |= {
            "samples per update": self.split.update,
            "samples per process": self.config.train.batch_size * self.config.train.accumulation,
            "cache": self.cache.folder.name,
            "base": self.base.base_hash,
            "settings": self.settings,
            "changes": self.changes,
            "best": self.validation.state(),
        }
        save_state(self.folder / "checkpoints", self.step, groups, facts, self.config.train.keep_checkpoints)

    def _export(self, path: Path) -> None:
        write, test = (whole.export, whole.self_test) if self.base.whole else (export, self_test)
        if self.processes.first:
            write(path, self.trained.weights(), self.config, self.base, self.step, len(self.cache), self.changes)
        if not self._passes_here():
            return
        with self.adapter.using(self.trained.weights()), torch.compiler.set_stance("force_eager"):
            result = test(path, self.base, self.adapter, self.cache.encoding([""]))
        self.reporter.say(f"{path}: {result.sentence()}.")
        self.journal.saved(self.step, path, result.sentence())
        if not result.passed:
            raise RunFailed(
                f"What was saved does not give the trained output when diffusers loads it ({result.sentence()}). "
                f"The checkpoint in {self.folder / 'checkpoints'} is good; please report this with the versions that "
                "pcm doctor prints."
            )

    def _agree(self, before: Facts | None, accept_changes: bool) -> list[dict[str, Any]]:
        """The changes of settings so far, once these may go on, which are then written down. before: where the run has
        come to."""
        changes, steps = [], self.config.train.steps
        if before:
            changes = agreed_changes(self.folder, before, self.settings, MAY_CHANGE, accept_changes)
            if before[0] > steps:
                raise ValueError(
                    f"train.steps is {steps}, and the run in {self.folder} has come to update {before[0]} already: set "
                    "it to that or more, or use another output folder."
                )
        write_text(self.folder / "config.json", json.dumps(self.settings, indent=2) + "\n")
        for change in changes:
            told = ", ".join(f"{key} {then} -> {now}" for key, (then, now) in change["changed"].items())
            self.reporter.say(f"Changed after update {change['step']}: {told}.")
        return changes

    def _resume(self, kept: State | None, changed: bool) -> int:
        if kept is None:
            return 0
        step, groups, facts = kept
        if facts["cache"] != self.cache.folder.name:
            if not changed:
                raise ValueError(
                    f"{self.folder} holds a run on other data: the pictures or the captions have changed since. "
                    "Restore them to go on, use another output folder to start anew, or --accept-changes."
                )
            self.reporter.say("The pictures, the captions or the base have changed since.")
        anew = self.trained.load(groups, facts, changed)
        self.validation.load(facts.get("best"), self._best)
        if anew:
            self.reporter.say(f"Begun anew, as the checkpoint holds nothing for it: {', '.join(anew)}.")
        self.reporter.say(f"Going on from update {step} of {self.config.train.steps}.")
        return step

    def preview(self, path: Path, captions: bool = True) -> None:
        """Draw the run's fixed grid with the weights that would be saved, by the first process."""
        if not self._passes_here():
            return
        eager = torch.compiler.set_stance("force_eager")  # its batches would be compiled for themselves
        weights, autocast = self.adapter.using(self.trained.weights()), self.accelerator.autocast()
        with self.clock.part("previews"), weights, autocast, eager:
            image = preview_grid(self.config, self.base, self.cache, self.engine.null, captions)
        if captions:
            self.journal.picture(self.step, image)
        if self.processes.first:
            try:
                save_image(image, path)
            except OSError as error:  # a run needs none
                self.reporter.say(f"No preview: {error}.")

    def _passes_here(self) -> bool:
        """Whether this process takes part in the first one's passes: none can run alone that lacks some weights."""
        if self.config.train.shard:
            self.processes.wait()
        return self.config.train.shard or self.processes.first
