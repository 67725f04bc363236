"""The run: cache, then train, save, preview, and go on exactly where a killed run stopped."""

from __future__ import annotations

import json
from collections import deque
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from ..config.config import Config
from ..efficiency.memory import explain_out_of_memory
from ..families import family_class
from ..lora.adapter import learner
from ..reporting.log import LogLine, read_log
from ..reporting.progress import Pace, Reporter
from ..system.clock import Clock
from ..system.files import write_text
from ..system.locks import only_run
from ..system.machine import let_segments_grow, limit_to_gpu, lost_gpu, out_of_memory, peak_memory
from ..system.processes import Processes, ProcessLost
from ..system.stopping import Stopper
from .batches import Split
from .checkpoint import State, check_same_base, load_latest_state
from .checks import Checked, check_run, notes_on_device, split_of
from .failure import RunFailed, RunStopped, what_is_kept
from .lora_init import start_from
from .optimizers import lr_factor
from .outputs import Outputs
from .plan import duration, duration_text, short_of_space
from .settle import settle
from .setup import facts_of, fill_cache, make_batches, make_engine, open_base, open_journal
from .spread import collapse
from .state import Trained
from .update import Outcome, Updater
from .validation import Validation, verdict

# Updates under way before the first one's numbers are read, so that no GPU waits for the host.
LAG = 1


def train(config: Config, reporter: Reporter | None = None, accept_changes: bool = False) -> Path:
    """Train as configured and return the path of what was made: a LoRA's file, or the folder of a network that was
    trained whole. The same call goes on where an earlier one stopped; accept_changes: with other settings too.

    Raises ValueError for bad input, `RunFailed` for a run that cannot go on (NaN, too little memory, a full disk, a
    failed self-test, an interrupt).
    """
    let_segments_grow()
    processes = Processes.start(config.base.dtype)
    limit_to_gpu()
    folder = config.run_folder
    reporter = reporter if reporter and processes.first else Reporter()
    config, settled = settle(config, processes.accelerator.device, processes)
    for sentence in settled:
        reporter.say(sentence)
    try:
        lock = processes.by_first(only_run(folder, reporter.say))
        with Stopper(reporter.say, launched=processes.count > 1) as stopper, lock:
            return Run(config, reporter, processes, stopper, accept_changes).go()
    except KeyboardInterrupt:
        raise RunFailed(f"Interrupted. {what_is_kept(folder)}; the same command goes on from there.") from None
    except ProcessLost as error:
        raise RunFailed(
            f"{error}. {what_is_kept(folder)}; the same command goes on from there, with fewer processes too."
        ) from error
    except (RuntimeError, MemoryError) as error:
        if lost_gpu(error):
            reason = next(iter(str(error).splitlines()), "no reason given")
            raise RunFailed(
                f"The GPU has failed: {reason}. {what_is_kept(folder)}; the same command goes on from there, once "
                "nvidia-smi shows the GPU again. If it fails at the same update each time, PCM_DEBUG=1 and "
                "CUDA_LAUNCH_BLOCKING=1 show where."
            ) from error
        if not out_of_memory(error):
            raise
        family = family_class(config.base.path, config.base.family)
        raise RunFailed(explain_out_of_memory(error, config, family)) from error


class Run:
    """One run's parts, and the loop over them. config: with numbers, see `settle`."""

    def __init__(
        self,
        config: Config,
        reporter: Reporter,
        processes: Processes | None = None,
        stopper: Stopper | None = None,
        accept_changes: bool = False,
    ):
        self.config = config
        self.folder = config.run_folder
        self.reporter = reporter
        self.say = reporter.say
        self.processes = processes or Processes.start(config.base.dtype)
        self.stopper = stopper or Stopper(self.say)

        # The gate first: a run that cannot be, or may not go on, has read nothing, cached nothing, written nothing.
        checked = check_run(config, self.processes.accelerator.device, self.processes.count, accept_changes)
        self.changes = checked.changes
        self.journal = open_journal(config, self.processes, self.say)
        self.expected = self._tell(checked)

        # The base, and at once its hash: a cache of another base would take hours before it turned out useless.
        with reporter.stage("loading the base"):
            self.base = open_base(config, self.processes, self.say)
        if checked.newest and not accept_changes:
            check_same_base(checked.newest[1], self.base.path, self.base.weights_hash)

        # The cache before all that is trained: at its end the encoders leave the memory that training needs.
        self.cache = fill_cache(config, self.base, self.processes, reporter)

        # What is trained. `lora.init` overwrites its first weights, and a checkpoint, further down, overwrites both.
        lora = config.lora
        self.adapter = learner(
            self.base.network, type(self.base), lora.rank, lora.alpha, config.train.seed, lora.ranks, lora.dora
        )
        self.say(self.adapter.sentence())
        if lora.init:
            self.say(start_from(config, self.base, self.adapter))

        # The stream of samples goes by the checkpoint's own division of an update, which is read here, and put into
        # what it is the state of once that is made.
        state = load_latest_state(self.folder / "checkpoints")
        self.split = split_of(config, self.processes.count, state and state[2], accept_changes)
        if self.split != Split(config.train.batch_size, config.train.accumulation, self.processes.count):
            self.say(f"The run takes {self.split.sentence()}.")
        self.batches = make_batches(config, self.base, self.cache, self.split, self.processes.rank, self.say)

        # The engine quantises, compiles and moves the network's blocks, so it comes after the adapter is in them.
        self.clock = Clock(self.base.device)
        self.engine = make_engine(
            config, self.processes.accelerator, self.base, self.adapter, self.batches, self.clock, self.say
        )
        self.trained = Trained(config, self.processes.accelerator, self.adapter, self.engine)
        self.validation = Validation(config, self.engine, self.batches, self.trained, self.processes, self.say)
        self.outputs = Outputs(
            config,
            self.cache,
            self.engine,
            self.trained,
            self._facts(),
            self.processes,
            self.journal,
            self.clock,
            self.say,
        )

        # All that has a state is there. Processes must be seen to agree on it before they share a gradient.
        self.step = self._resume(state, accept_changes)
        self.processes.check_together(self.step, self.adapter.parameters())

        # From here on batches are made ahead, by a thread, from the place in the stream that the run has come to.
        self.updater = Updater(
            config,
            self.engine,
            self.batches.ahead(self.step * self.split.accumulation),
            self.split.accumulation,
            self.trained.optimizer,
            self.trained.learners(),
            self.processes,
        )
        self.unread: deque[Outcome] = deque()
        self.stopping = False
        self.pace = Pace(self.step, self.split.update)
        for sentence in (self.validation.sentence(), short_of_space(config, self.trained, self.step)):
            if sentence:
                self.say(sentence)

    def go(self) -> Path:
        """Train to the end; on SIGINT or SIGTERM save and stop."""
        self.clock.reset()
        facts = facts_of(self.config, self.processes, self.batches) | {"changes": self.changes}
        facts |= {"expected seconds": self.expected} if self.expected else {}
        alone = self.processes.count == 1
        with (
            closing(self.updater.coming),
            self.stopper.saving("Stopping after this update." if alone else "Stopping with the others."),
            self.journal.open(self.step, facts, self._at_end),
        ):
            self._catch_up()
            self.pace = Pace(self.step, self.split.update)  # here: measuring at the start is no update's time
            while self.step < self.config.train.steps:
                self.update()
                self._between_updates()
            self._read(keep=0)
            if self.step > self.pace.first:
                self.say(self._where_time_went())
            return self._finish()

    def update(self) -> None:
        """One optimizer update of all that is trained; the numbers of the one before it are read."""
        outcome = self.updater(self.step + 1, self.stopper.stop_requested)
        self.step += 1
        self.trained.updated(self.step, self.config.train.steps)
        self.unread.append(outcome)
        self._read(keep=LAG)

    def _read(self, keep: int) -> None:
        """Show what the updates gave, but for the last `keep`. Raises `RunFailed` for numbers that are not finite."""
        while len(self.unread) > keep:
            outcome = self.unread.popleft()
            numbers = outcome.read()
            if numbers.pop("bad"):
                raise RunFailed(self._not_finite(outcome))
            self.stopping = bool(numbers.pop("stop")) or self.stopping
            numbers["lr"] = self.config.train.lr * lr_factor(self.config, outcome.step)
            status = self.pace.after(outcome.step, self.config.train.steps, numbers["loss"])
            self.reporter.update(status)
            self.journal.update(status, numbers)

    def _not_finite(self, outcome: Outcome) -> str:
        bad = outcome.bad_samples()
        samples = "; ".join(f"{n}: {self.cache.captions[n]!r}" for n in (bad or outcome.samples)[:4])
        others = ", or another process's loss" * (self.processes.count > 1)
        what = "loss" if bad else f"gradient{others}"
        return (
            f"The {what} is not finite at update {outcome.step}, samples {samples}. {what_is_kept(self.folder)}. "
            "Lower train.lr, use base.dtype=bf16 or fp32, or remove these samples."
        )

    def _where_time_went(self) -> str:
        """One sentence on the parts of the time since the start, the largest first."""
        seconds = self.clock.seconds()
        whole = sum(seconds.values()) or 1.0
        parts = sorted(seconds.items(), key=lambda item: -item[1])
        return "Time: " + ", ".join(f"{name} {part / whole:.0%}" for name, part in parts) + "."

    def _at_end(self) -> dict[str, Any]:
        """What a start of the run says of itself when it ends."""
        end: dict[str, Any] = {"step": self.step, "evaluations": self.engine.evaluations}
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
        file = self._due(self.config.train.save_every) and not self.outputs.file_of(self.step).exists()
        preview = self._due(self.config.preview.every) and not self.outputs.preview_of(self.step).exists()
        self.processes.wait()  # until all have looked, before the first one writes
        if self.step == 0 and self.validation.due(0):
            self._validate()
        if file:
            self.outputs.save_file(self.step)
        if preview:
            self.outputs.preview(self.step)

    def _between_updates(self) -> None:
        last = self.step == self.config.train.steps
        # measured first, since a checkpoint holds which weights are the best so far
        if self.validation.due(self.step):
            self._validate()
        if self._due(self.config.train.save_every):
            self._save(export_too=True)
        if self._due(self.config.preview.every):
            self.outputs.preview(self.step)

        if self.processes.count == 1:  # several must agree first, which they do in an update
            self.stopping = self.stopper.stop_requested
        if self.stopping and not last:
            self._save(export_too=False)
            self.processes.wait()  # a launcher ends the others as soon as one has ended
            raise RunStopped(
                f"Stopped at update {self.step} of {self.config.train.steps}; all is saved. "
                "The same command goes on from here."
            )

    def _finish(self) -> Path:
        self._save(export_too=True)
        if self.config.preview.every:
            with self.reporter.stage("drawing previews"):
                self.outputs.preview(self.step)
                self.outputs.preview_beside_file(self.step)
        start = "the LoRA that it began with" if self.config.lora.init else "the untrained base"
        if sentence := verdict(self._measured(), start, self.validation.promised):
            self.say(sentence)
        return self.outputs.file_of(self.step)

    def _measured(self) -> list[LogLine]:
        """The log's lines on what was measured, in their order."""
        return [line for line in read_log(self.folder) if line["kind"] == "validation"]

    def _save(self, export_too: bool) -> None:
        """Checkpoint, LoRA and self-test, once all that led here is seen to be finite."""
        self._read(keep=0)
        with self.reporter.stage("saving and testing what was saved"):
            self.outputs.save(self.step, self.validation.state(), export_too)

    def _validate(self) -> None:
        """Measure what would be saved now, and keep it where it is the best so far."""
        self._read(keep=0)
        if self.outputs.passes_here():
            with self.clock.part("validation"), self.reporter.stage("measuring"):
                measurement = self.validation(self.step)
            best = self.validation.state()
            self.say(measurement.sentence(self.step))
            self.journal.validation(self.step, measurement.figures, measurement.plain, best)
            if self.validation.matching and (sentence := collapse(self._measured(), self.validation.recipe.steps)):
                self.say(sentence)
            if measurement.improved:
                self.outputs.save_best(self.step)
        self.processes.wait()  # for the first one, longer than an update waits for it

    def _tell(self, checked: Checked) -> float | None:
        """What a run says before it reads anything: of the device, of settings that have changed on the way, and how
        long it may take. The first process writes down the settings that decide the weights.

        Returns the seconds that all its updates are expected to take; None where that is not known.
        """
        device = self.processes.accelerator.device
        for note in notes_on_device(self.config, device):
            self.say(note)
        if not self.processes.first:
            return None
        settings = self.config.what_decides_the_weights()
        write_text(self.folder / "config.json", json.dumps(settings, indent=2) + "\n")
        for change in self.changes:
            lines = ", ".join(f"{key} {then} -> {now}" for key, (then, now) in change["changed"].items())
            self.say(f"Changed after update {change['step']}: {lines}.")
        expected = duration(self.config, checked, device)
        self.say(f"Expected: {duration_text(expected, device)}")
        return expected and expected.seconds - expected.caching

    def _facts(self) -> dict[str, Any]:
        """What every checkpoint of this start holds beside the state: by it the next start knows the run again."""
        train = self.config.train
        return {
            "samples per update": self.split.update,
            "samples per process": train.batch_size * train.accumulation,
            "cache": self.cache.folder.name,
            "base": self.base.weights_hash,
            "settings": self.config.what_decides_the_weights(),
            "changes": self.changes,
        }

    def _resume(self, state: State | None, changed: bool) -> int:
        """Put the newest checkpoint back, and return its update; 0 where there is none.

        changed: whether it may be of other settings or data. Raises ValueError where it is and may not.
        """
        if state is None:
            return 0
        step, groups, facts = state
        if facts["cache"] != self.cache.folder.name:
            if not changed:
                raise ValueError(
                    f"{self.folder} holds a run on other data: the pictures or the captions have changed since. "
                    "Restore them to go on, use another output folder to start anew, or --accept-changes."
                )
            self.say("The pictures, the captions or the base have changed since.")
        anew = self.trained.load(groups, facts, changed)
        self.validation.load(facts.get("best"), self.outputs.best_file)
        if anew:
            self.say(f"Begun anew, as the checkpoint holds nothing for it: {', '.join(anew)}.")
        self.say(f"Going on from update {step} of {self.config.train.steps}.")
        return step
