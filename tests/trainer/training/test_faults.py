"""The rows of docs/robustness.md: the fault is made to happen, what is said is what the row says, and what is kept is
looked at. Most runs are then taken up again, and must end in the bytes of one that nothing befell."""

import os
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from phased_consistency.samplers.lora_file import read_header
from phased_consistency.trainer.training import loop, outputs, plan
from phased_consistency.trainer.training import setup as parts
from phased_consistency.trainer.training.checkpoint import load_latest_state
from phased_consistency.trainer.training.engine import Engine
from phased_consistency.trainer.training.loop import train
from phased_consistency.trainer.training.previews import Previews
from support.faults import Acting, fails, goes_on, row, rows, steps_kept
from support.runs import Notes, metadata, sha256, small_config

resource = pytest.importorskip("resource", reason="limits files where there is POSIX")
SETTINGS = {"train__steps": 6, "train__save_every": 2, "train__ema": 0.9, "train__lr_schedule": "cosine"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing befalls."""
    return train(small_config(tmp_path_factory.mktemp("whole") / "run", **SETTINGS))


@pytest.fixture
def config(whole, tmp_path):
    """The same run, not yet begun; its cache is there."""
    shutil.copytree(whole.parent / "cache", tmp_path / "run" / "cache")
    return small_config(tmp_path / "run", **SETTINGS)


@pytest.fixture
def partly(whole, config):
    """The same run as it stood after 4 updates."""
    shutil.copytree(whole.parent / "checkpoints", config.run_folder / "checkpoints")
    (config.run_folder / "checkpoints" / "step-0000006.safetensors").unlink()
    return config


def limited(size):
    """From now on no file can grow past this size: what a full disk is, to the one who writes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def disk():
    yield limited
    limited(resource.RLIM_INFINITY)


# --- the disk


def test_a_disk_that_is_full_for_a_checkpoint(config, whole, disk):
    size = (whole.parent / "checkpoints" / "step-0000004.safetensors").stat().st_size
    fails(config, "disk full while a checkpoint is saved", Acting(after_3=lambda: disk(size // 2)))
    disk(resource.RLIM_INFINITY)
    assert steps_kept(config) == [2] and goes_on(config, whole).steps[0] == 3


def test_a_disk_that_is_full_for_a_lora(config, whole, disk, monkeypatch):
    """It fills right after the checkpoint."""
    real = outputs.save_state

    def save_state(folder, step, *args):
        real(folder, step, *args)
        if step == 4:
            disk(whole.stat().st_size // 2)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "save_state", save_state)
        fails(config, "disk full while a LoRA is saved")
    disk(resource.RLIM_INFINITY)
    assert steps_kept(config) == [2, 4] and goes_on(config, whole).steps[0] == 5


def test_what_only_shows_does_not_end_a_run(whole, tmp_path, disk):
    """Neither a picture nor the log."""
    shown = {"preview__every": 3, "preview__steps": [1], "train__save_every": 100}
    config = small_config(tmp_path / "run", **SETTINGS | shown)
    notes = Acting(after_1=lambda: disk(100), after_4=lambda: disk(resource.RLIM_INFINITY))
    assert sha256(train(config, notes)) == sha256(whole)
    assert any(row("disk full while a picture is drawn").search(line) for line in notes.said), notes.said
    assert not (config.run_folder / "previews" / "step-0000003.png").exists()
    assert (config.run_folder / "previews" / "step-0000006.png").is_file()


def test_a_disk_that_will_not_do_is_said_before_the_first_update(config, whole, monkeypatch):
    """By how much room the files of the undisturbed run took."""
    files = [*whole.parent.glob("checkpoints/*.safetensors"), *whole.parent.glob("*.safetensors")]
    took = sum(f.stat().st_size for f in files)
    for share, short in ((0.8, True), (2, False)):
        usage = SimpleNamespace(free=int(share * took))
        with monkeypatch.context() as patch:
            patch.setattr(plan.shutil, "disk_usage", lambda _, usage=usage: usage)
            notes = Notes()
            run = loop.Run(config, notes)
        run.updater.coming.close()
        told = [line for line in notes.said if re.match(r"The run will write .*, 3 checkpoints of", line)]
        assert bool(told) == short


@pytest.fixture
def nobody(whole):
    """Whom a file's permissions bind, which they do not the superuser.

    They may not read this checkout either, where it is below a folder of the superuser's own: a run has imported all
    that runs import, and the page has been read, before.
    """
    rows()
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_a_folder_that_cannot_be_written(nobody):
    with tempfile.TemporaryDirectory() as place:
        run = Path(place, "run")
        os.chmod(place, 0o555)
        fails(small_config(run), "output folder is read-only", error=PermissionError)
        assert not run.exists()
        os.chmod(place, 0o755)
        run.mkdir(mode=0o555)
        fails(small_config(run), "output folder is read-only", error=PermissionError)
        assert list(run.iterdir()) == []


def test_two_runs_in_one_folder(partly, whole):
    with FileLock(partly.run_folder / "run.lock"):
        fails(partly, "a second run in the folder", error=ValueError)
    assert steps_kept(partly) == [4]
    goes_on(partly, whole)


def test_a_second_run_waits_while_the_first_fills_their_cache(config, whole):
    notes, held = Notes(), Event()

    def fill():
        with FileLock(config.cache_folder / "cache.lock"):
            held.set()
            time.sleep(1.5)

    Thread(target=fill).start()
    held.wait()
    assert sha256(train(config, notes)) == sha256(whole)
    assert f"Another run is filling the cache in {config.cache_folder}: waiting for it." in notes.said


def test_a_disk_without_locks(config, whole, monkeypatch):
    def acquire(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    notes = goes_on(config, whole)
    assert f"The disk of {config.run_folder} knows no locks: take care that no second run" in " ".join(notes.said)


# --- what a run is made of


def test_changed_settings(partly, whole):
    changed = small_config(partly.run_folder, **SETTINGS | {"train__lr": 0.02, "train__seed": 3})
    fails(changed, "settings changed between runs", error=ValueError)
    assert sha256(train(partly)) == sha256(whole), "the refusal changed nothing"


@pytest.mark.parametrize("name", ["latents-", "prompts-", "index", "texts"])
def test_a_shard_that_was_cut_short_is_made_again(name, partly, whole):
    (file,) = partly.run_folder.glob(f"cache/*/{name}*.safetensors")
    before = file.read_bytes()
    file.write_bytes(before[:-10])
    notes = goes_on(partly, whole)
    assert any(row("cache file cut short between runs").fullmatch(line) for line in notes.said), notes.said
    assert file.read_bytes() == before


def test_a_shard_that_is_cut_short_while_the_run_reads_it(config, whole, monkeypatch):
    (file,) = config.run_folder.glob("cache/*/latents-*.safetensors")
    real = parts.make_batches

    def cut(*args):
        made = real(*args)
        file.write_bytes(file.read_bytes()[:-10])
        return made

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_batches", cut)
        fails(config, "cache file cut short during a run", error=ValueError)
    assert steps_kept(config) == []
    assert any("is cut short" in line and "is made again" in line for line in goes_on(config, whole).said)


def test_a_checkpoint_that_was_cut_short(partly, whole):
    (last,) = partly.run_folder.glob("checkpoints/*.safetensors")
    last.write_bytes(last.read_bytes()[:-100])
    fails(partly, "checkpoint cut short", error=ValueError)
    last.unlink()
    assert goes_on(partly, whole).steps[0] == 1


# --- numbers


@pytest.mark.parametrize("fault", ["NaN in the loss", "NaN in the gradient"])
def test_numbers_that_are_not_finite(fault, config, whole, monkeypatch):
    real, calls = Engine.step, []

    def step(self, batch):
        losses = real(self, batch)
        calls.append(losses)
        if len(calls) == 3 and "loss" in fault:
            losses.distance.data[1] = float("nan")
        if len(calls) == 3 and "gradient" in fault:
            losses.distance.register_hook(lambda gradient: gradient * float("inf"))
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", step)
        fails(config, fault)
    _, groups, _ = load_latest_state(config.run_folder / "checkpoints")
    assert steps_kept(config) == [2] and all(w.isfinite().all() for w in groups["adapter"].values())
    goes_on(config, whole)


def full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_too_little_memory(config, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", full)
        fails(config, "memory runs out")
    assert steps_kept(config) == []
    assert goes_on(config, whole).steps[0] == 1


def test_too_little_memory_while_caching(config, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "fill_cache", full)
        fails(config, "memory runs out")
        with pytest.raises(loop.RunFailed, match="While it is still caching, a smaller data.batch_size helps"):
            train(config)
    goes_on(config, whole)


def test_too_little_memory_for_pictures(config, whole, monkeypatch):
    """The run goes on without them, and ends as with them."""

    def grid(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr(Previews, "grid", grid)
    notes, some = Notes(), config.changed(preview={"every": 2})
    assert sha256(train(some, notes)) == sha256(whole)
    said = [line for line in notes.said if line.startswith("No preview")]
    assert said and all(row("memory runs out for a preview").fullmatch(line) for line in said)
    assert "More" not in said[0]


def test_a_gpu_that_is_lost(config, whole, monkeypatch):
    real, calls = Engine.step, []

    def step(self, batch):
        calls.append(batch)
        if len(calls) > 3:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nMore.")
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", step)
        fails(config, "the GPU fails, or is lost")
    assert steps_kept(config) == [2]
    assert goes_on(config, whole).steps[0] == 3


# --- signals and the clock


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_saves_and_stops(number, config, whole):
    notes = Acting(after_3=lambda: signal.raise_signal(number))
    before = signal.getsignal(number)
    fails(config, "Ctrl-C or SIGTERM", notes)
    assert signal.getsignal(number) == before
    assert "Stopping after this update. Once more to stop at once." in notes.said
    assert steps_kept(config)[-1] == 4 and goes_on(config, whole).steps[0] == 5


def test_two_signals_stop_at_once(config, whole):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    fails(config, "Ctrl-C twice", Acting(after_3=twice))
    assert steps_kept(config) == [2] and goes_on(config, whole).steps[0] == 3


@pytest.mark.parametrize(("fault", "times", "kept"), [("Ctrl-C or SIGTERM", 1, [2, 4]), ("Ctrl-C twice", 2, [2])])
def test_a_signal_while_a_checkpoint_is_saved(fault, times, kept, config, whole, monkeypatch):
    """The first waits for it, the second does not."""
    real = outputs.save_state

    def interrupted(folder, step, *args):
        for _ in range(times if step == 4 and steps_kept(config) == [2] else 0):
            signal.raise_signal(signal.SIGINT)
        real(folder, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "save_state", interrupted)
        fails(config, fault)
    assert steps_kept(config) == kept
    goes_on(config, whole)


def test_a_signal_before_the_first_update(config, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "fill_cache", lambda *_: signal.raise_signal(signal.SIGTERM))
        fails(config, "Ctrl-C before the first update")
    assert steps_kept(config) == []
    assert goes_on(config, whole).steps[0] == 1


@pytest.mark.parametrize("jump", [-86_400, 86_400])
def test_a_clock_that_jumps(jump, config, whole, monkeypatch):
    """Times are shown, not learnt from, and rates go by a clock that does not jump."""
    real, rates = time.time, []

    class Jumping(Acting):
        def update(self, status):
            super().update(status)
            rates.append(status.samples_per_second)

    notes = Jumping(after_2=lambda: monkeypatch.setattr(time, "time", lambda: real() + jump))
    assert sha256(train(config, notes)) == sha256(whole)
    assert len(rates) == 6 and all(0 < rate < 1e6 for rate in rates)
    assert row("clock that jumps").pattern == "nothing"


# --- what --accept-changes takes


def test_accepted_changes_are_said_and_written_down(partly):
    changed = small_config(partly.run_folder, **SETTINGS | {"train__lr": 0.02})
    notes = Notes()
    path = train(changed, notes, accept_changes=True)
    assert "Changed after update 4: train.lr 0.01 -> 0.02." in notes.said and notes.steps == [5, 6]
    assert metadata(path)["pcm.changes"] == '[{"step": 4, "changed": {"train.lr": [0.01, 0.02]}}]'
    assert "pcm.changes" not in metadata(train(small_config(partly.run_folder.parent / "plain", **SETTINGS)))
    assert train(changed, Notes()) == path, "the run is one with these settings now"


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        ({"train__ema": 0}, None),
        ({"train__steps": 8, "train__batch_size": 2}, None),
        ({"adversarial__weight": 0.1, "adversarial__width": 16}, "the discriminator"),
        ({"objective__name": "lcm", "objective__target_ema": 0.9}, "the target"),
        ({"data__count": 7}, None),
    ],
    ids=["no average", "longer", "adversarial", "another objective", "other data"],
)
def test_a_run_goes_on_with_what_there_is(change, anew, partly):
    notes = Notes()
    settings = SETTINGS | change
    path = train(small_config(partly.run_folder, **settings), notes, accept_changes=True)
    assert notes.steps == list(range(5, settings["train__steps"] + 1))
    begun = [line for line in notes.said if line.startswith("Begun anew")]
    assert (anew in begun[0]) if anew else not begun
    assert all(t.isfinite().all() for t in load_file(path).values())


def test_an_average_begins_with_the_weights_that_are_there(partly):
    plain = small_config(partly.run_folder.parent / "plain", **SETTINGS | {"train__ema": 0})
    train(small_config(plain.run_folder, **SETTINGS | {"train__ema": 0, "train__steps": 6}))
    longer = small_config(plain.run_folder, **SETTINGS | {"train__steps": 7})
    notes = Notes()
    train(longer, notes, accept_changes=True)
    assert "Begun anew, as the checkpoint holds nothing for it: the average." in notes.said


def test_fewer_updates_than_there_were_cannot_be_accepted(partly, whole):
    changed = small_config(partly.run_folder, **SETTINGS | {"train__steps": 3})
    with pytest.raises(ValueError, match="train.steps is 3, and the run in .* has come to update 4 already: set it"):
        train(changed, accept_changes=True)
    goes_on(partly, whole)


def test_another_rank_cannot_be_accepted(partly):
    changed = small_config(partly.run_folder, **SETTINGS | {"lora__rank": 8})
    with pytest.raises(ValueError, match="A run's base and lora.rank cannot change. Set them back"):
        train(changed, accept_changes=True)
    assert read_header(next(partly.run_folder.glob("checkpoints/*.safetensors")))


def test_every_row_of_the_page_has_its_test():
    """But for the kills, which tests/support/kills.py makes."""
    made = rows().keys() - {"kill -9, a crash, a power cut"}
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_faults*.py"))
    assert len(made) > 15 and [name for name in made if f'"{name}"' not in source] == []
