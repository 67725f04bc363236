"""Two processes of one run, as `accelerate launch` starts them, beside one that takes the same samples an update."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from phased_consistency.trainer.reporting.log import read_log
from phased_consistency.trainer.training.checkpoint import load_latest_state
from phased_consistency.trainer.training.loop import Run, train
from support.runs import TINY, Notes, settings, small_config, speck

# Relative: what two processes may differ by, in which gradients are summed in another order, and what another choice of
# samples makes at least.
SAME, OTHER = 1e-3, 1e-1
ACROSS = {
    "base__path": TINY,
    "train__steps": 4,
    "train__save_every": 2,
    "train__batch_size": 4,
    "train__lr": 1e-3,
    "adversarial__weight": 0.1,
    "lora__dtype": "fp32",
}
PCM = "phased_consistency.trainer"
TESTS = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
LAUNCH += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


TWO = ACROSS | {"train__batch_size": 2}
NAMES = ("plain", "shared", "matched", "apart", "stopped")
MATCHED = {
    "train__steps": 3,
    "train__lr": 1e-3,
    "objective__name": "tdm",
    "objective__phases": 2,
    "objective__critic_warmup": 1,
    "lora__dtype": "fp32",
}
SHARED = TWO | {
    "train__shard": "true",
    "train__gradient_checkpointing": "true",
    "preview__every": 2,
    "preview__steps": [2],
    "validation__every": 2,
    "validation__steps": [1],
    "validation__teacher_steps": 2,
}
APART = ACROSS | {"train__steps": 2, "train__save_every": 1}
LONG = {"train__steps": 1000}


def launch(module: str, *arguments) -> subprocess.Popen:
    """`accelerate launch` of a module in two CPU processes, in a group of their own."""
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    options["preexec_fn"] = lambda: os.nice(5)  # two more at work, and the browser's tests beside them have time limits
    return subprocess.Popen([*LAUNCH, "-m", module, *map(str, arguments)], env=env, cwd=TESTS, **options)


@contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    """Where the rest fails, the whole group of processes is killed."""
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_checkpoint(folder: Path, process: subprocess.Popen, seconds: float) -> None:
    """Until the run in this folder has written one."""
    deadline = time.monotonic() + seconds
    while not list(folder.glob("checkpoints/*.safetensors")):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"There is no first checkpoint: {process.poll()}")
        time.sleep(0.02)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """|a - b| / |a| over all tensors together: single ones may hold nothing but rounding, as those of attention to a
    single place do, whose gradient is zero."""
    assert one.keys() == other.keys()
    a, b = (torch.cat([of[name].double().flatten() for name in one]) for of in (one, other))
    return ((a - b).norm() / a.norm()).item()


def learnt(path: Path) -> dict[str, torch.Tensor]:
    """The half of a LoRA that starts at zero."""
    return {name: weight for name, weight in load_file(path).items() if "lora_up" in name}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The LoRA of one process that takes four samples an update."""
    return train(small_config(tmp_path_factory.mktemp("alone"), **ACROSS))


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> SimpleNamespace:
    """What two processes do together, by the folders of their runs, and what each has said of which.

    plain: two samples each. matched: the same, with a critic that has updates of its own. shared: each holds half of
    the frozen weights, recomputes blocks, measures, draws previews and tests files together with the other. apart: one
    machine sees another run folder, its own, without the checkpoint that the first has. stopped: Ctrl-C in the terminal
    after the first checkpoint; it comes to the launcher and to both processes, and to these from the launcher again.
    """
    folder = tmp_path_factory.mktemp("pair")
    smaller = APART | {"base__path": speck().name, "data__cache": folder / "cache"}
    begun = train(small_config(folder / "begun", **smaller)).parent
    sorted((begun / "checkpoints").iterdir())[-1].unlink()  # one update is left to do
    shutil.copytree(begun, folder / "apart-0")
    apart = settings(folder / "apart-RANK", **smaller | {"train__batch_size": 2})
    commands = [settings(folder / "plain", **TWO), settings(folder / "shared", **SHARED)]
    commands += [settings(folder / "matched", **MATCHED | {"train__batch_size": 2}), apart]
    commands.append(settings(folder / "stopped", **LONG))
    (folder / "commands.json").write_text(json.dumps([["train", *command] for command in commands]))
    process = launch("support.in_turn", folder / "commands.json")
    with ended(process):
        wait_for_checkpoint(folder / "stopped", process, 600)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert all((folder / f"said-{rank}.json").is_file() for rank in (0, 1)), errors
    first, second = (json.loads((folder / f"said-{rank}.json").read_text()) for rank in (0, 1))
    said = {name: SimpleNamespace(first=a, second=b) for name, a, b in zip(NAMES, first, second, strict=True)}
    assert all(each["code"] == 0 for name in NAMES[:3] for each in vars(said[name]).values()), errors
    return SimpleNamespace(**{name: folder / name for name in NAMES}, said=SimpleNamespace(**said))


def test_two_processes_give_what_one_gives(alone, pair, tmp_path):
    assert apart(learnt(alone), learnt(pair.plain / alone.name)) < SAME
    seed = train(small_config(tmp_path, **ACROSS | {"train__seed": 1}))
    assert apart(learnt(alone), learnt(seed)) > OTHER, "other samples would be seen"


def test_two_processes_have_the_critic_of_one(pair, tmp_path):
    """Its own updates are shared too, before the student's."""
    one = train(small_config(tmp_path, **MATCHED | {"train__batch_size": 4}))
    assert apart(learnt(one), learnt(pair.matched / one.name)) < SAME
    (_, alone, _), (_, two, _) = (load_latest_state(f / "checkpoints") for f in (one.parent, pair.matched))
    for group in ("critic", "optimizer"):
        assert apart(alone[group], two[group]) < SAME, group


def test_they_keep_in_step(alone, pair):
    """The discriminator and the optimizer's state, which no file shows, are those of one process too."""
    (_, one, _), (_, two, _) = (load_latest_state(f / "checkpoints") for f in (alone.parent, pair.plain))
    for group in ("adapter", "discriminator", "optimizer"):
        assert apart(one[group], two[group]) < SAME, group


def test_only_the_first_process_writes_and_speaks(alone, pair):
    files = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*")) for f in (alone.parent, pair.plain)]
    assert files[0] == files[1]
    said = pair.said.plain
    assert said.first["out"].startswith("Done: ") and "LoRA of rank 4" in said.first["err"]
    assert said.second == {"code": 0, "out": "", "err": ""}


def test_a_dead_process_stops_the_run_and_fewer_go_on(alone, tmp_path):
    """One of two is killed after the first checkpoint: a sentence, and one process ends the run as if none had been."""
    process = launch(PCM, "train", *settings(tmp_path, **TWO))
    with ended(process):
        wait_for_checkpoint(tmp_path, process, 300)
        trainers = [p for p in psutil.Process(process.pid).children() if "train" in p.cmdline()]
        second = next(p for p in trainers if p.environ()["RANK"] == "1")
        second.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert re.search(
        r"Error: Another process of this run has ended, or hangs \(.+\)\. The last checkpoint, step-", errors
    )
    step = load_latest_state(tmp_path / "checkpoints")[0]
    assert step < ACROSS["train__steps"]
    notes = Notes()
    made = train(small_config(tmp_path, **TWO), notes)
    assert "The run takes 4 samples an update: 1 process, 2 passes of 2 each." in notes.said
    assert f"Going on from update {step} of 4." in notes.said
    assert apart(learnt(alone), learnt(made)) < SAME
    again = Notes()
    assert train(small_config(tmp_path, **TWO), again) == made, "and once more"
    assert "Going on from update 4 of 4." in again.said


def test_ctrl_c_in_the_terminal_saves(pair):
    assert re.search(r"Stopped at update \d+ of 1000; all is saved", pair.said.stopped.first["err"])
    end = read_log(pair.stopped)[-1]
    assert end["how"] == "stopped" and load_latest_state(pair.stopped / "checkpoints")[0] == end["step"]


def test_processes_that_begin_apart_are_refused(pair):
    for said in vars(pair.said.apart).values():
        assert said["code"] == 2, said
        assert "The processes do not begin alike: this one at update" in said["err"]
        assert "All machines must see one run folder" in said["err"]


def test_sharing_the_frozen_weights_gives_the_same(alone, pair):
    folder, said = pair.shared, pair.said.shared.first["err"]
    assert apart(learnt(alone), learnt(folder / alone.name)) < SAME
    run = Run(small_config(alone.parent, **SHARED | {"train__shard": "false", "train__batch_size": 4}), Notes())
    frozen = sum(weight.numel() for weight in run.base.network.parameters() if not weight.requires_grad)
    held = float(re.search(r"([0-9.]+) GiB of the frozen weights are held here", said)[1])
    assert held * 2**30 == pytest.approx(frozen * 4 / 2, rel=0.3)
    assert "0 keys unmatched" in said and (folder / "previews" / "step-0000002.png").is_file()
    measured = {line["step"]: line["figures"] for line in read_log(folder) if line["kind"] == "validation"}
    assert list(measured) == [0, 2, 4] and (folder / "pcm-lora-best.safetensors").is_file()
    assert measured[4] == pytest.approx(run.validation(4).figures, rel=1e-3)
