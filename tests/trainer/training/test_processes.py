"""Two processes of one run, as `accelerate launch` starts them, beside one that takes the same samples an update."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from phased_consistency.trainer.reporting.log import read_log
from phased_consistency.trainer.reporting.progress import Reporter
from phased_consistency.trainer.training.checkpoint import load_latest_state
from phased_consistency.trainer.training.loop import Run, train
from support.runs import Notes, settings, small_config

# Relative: what two processes may differ by, in which gradients are summed in another order, and what another choice of
# samples makes at least.
SAME, OTHER = 1e-3, 1e-1
ACROSS = {
    "train__steps": 12,
    "train__batch_size": 4,
    "train__lr": 1e-3,
    "adversarial__weight": 0.1,
    "lora__dtype": "fp32",
}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
LAUNCH += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


def launch(*args, what: tuple = ("-m", "phased_consistency.trainer")) -> subprocess.Popen:
    """`accelerate launch` of two CPU processes, of `pcm` unless told otherwise, in a group of their own."""
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    how["preexec_fn"] = lambda: os.nice(5)  # two more at work, and the browser's tests beside them have time limits
    return subprocess.Popen([*LAUNCH, *map(str, (*what, *args))], env=env, **how)


def two_processes(output: Path, **changes) -> tuple[str, str]:
    process = launch("train", *settings(output, **ACROSS | {"train__batch_size": 2} | changes))
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out, errors


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
def pair(tmp_path_factory) -> tuple[Path, str, str]:
    """The run folder of two processes that take two samples each, and what they said."""
    folder = tmp_path_factory.mktemp("pair")
    return folder, *two_processes(folder)


def test_two_processes_give_what_one_gives(alone, pair, tmp_path):
    assert apart(learnt(alone), learnt(pair[0] / alone.name)) < SAME
    seed = train(small_config(tmp_path, **ACROSS | {"train__seed": 1}))
    assert apart(learnt(alone), learnt(seed)) > OTHER, "other samples would be seen"


def test_they_keep_in_step(alone, pair):
    """The discriminator and the optimizer's state, which no file shows, are those of one process too."""
    (_, one, _), (_, two, _) = (load_latest_state(f / "checkpoints") for f in (alone.parent, pair[0]))
    for group in ("adapter", "discriminator", "optimizer"):
        assert apart(one[group], two[group]) < SAME, group


def test_only_the_first_process_writes_and_speaks(alone, pair):
    folder, out, errors = pair
    files = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*")) for f in (alone.parent, folder)]
    assert files[0] == files[1]
    assert out.count("Done: ") == 1 and errors.count("LoRA of rank 4") == 1


def test_a_dead_process_stops_the_run_and_fewer_go_on(alone, tmp_path):
    """One of two is killed after the first checkpoint: a sentence, and one process ends the run as if none had been."""
    process = launch("train", *settings(tmp_path, **ACROSS | {"train__batch_size": 2}))
    try:
        deadline = time.monotonic() + 300
        while not list((tmp_path / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        trainers = [p for p in psutil.Process(process.pid).children() if "train" in p.cmdline()]
        second = next(p for p in trainers if p.environ()["RANK"] == "1")
        second.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert re.search(
        r"Error: Another process of this run has ended, or hangs \(.+\)\. The last checkpoint, step-", errors
    )
    step = load_latest_state(tmp_path / "checkpoints")[0]
    assert step < ACROSS["train__steps"]
    notes = Notes()
    made = train(small_config(tmp_path, **ACROSS | {"train__batch_size": 2}), notes)
    assert "The run takes 4 samples an update: 1 process, 2 passes of 2 each." in notes.said
    assert f"Going on from update {step} of 12." in notes.said
    assert apart(learnt(alone), learnt(made)) < SAME
    again = Notes()
    assert train(small_config(tmp_path, **ACROSS | {"train__batch_size": 2}), again) == made, "and once more"
    assert "Going on from update 12 of 12." in again.said


def test_ctrl_c_in_the_terminal_saves(tmp_path):
    """It comes to the launcher and to both processes, and to these from the launcher again."""
    process = launch("train", *settings(tmp_path, train__steps=1000))
    try:
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("checkpoints/*.safetensors")):
            assert process.poll() is None and time.monotonic() < deadline, "there is no first checkpoint"
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert re.search(r"Stopped at update \d+ of 1000; all is saved", errors), errors
    end = read_log(tmp_path)[-1]
    assert end["how"] == "stopped" and load_latest_state(tmp_path / "checkpoints")[0] == end["step"]


def test_processes_that_begin_apart_are_refused(tmp_path):
    """One machine sees another run folder: its own, without the checkpoint."""
    changes = ACROSS | {"train__steps": 2, "train__save_every": 1, "data__cache": tmp_path / "cache"}
    train(small_config(tmp_path / "first", **changes))
    sorted((tmp_path / "first" / "checkpoints").iterdir())[-1].unlink()  # one update is left to do
    sets = settings(tmp_path / "RANK", **changes | {"train__batch_size": 2})
    shutil.copytree(tmp_path / "first", tmp_path / "0")
    script = tmp_path / "apart.py"
    script.write_text(
        "import os, sys\nfrom phased_consistency.trainer.cli.main import main\n"
        "sys.argv = ['pcm', 'train', *(a.replace('RANK', os.environ['RANK']) for a in sys.argv[1:])]\nmain()\n"
    )
    process = launch(*sets, what=(script,))
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and "The processes do not begin alike: this one at update" in errors, errors
    assert "All machines must see one run folder" in errors


def test_sharing_the_frozen_weights_gives_the_same(alone, tmp_path):
    """Each process holds half of them, recomputes blocks, measures, draws previews and tests files together with the
    other."""
    settings = {
        "train__shard": "true",
        "train__gradient_checkpointing": "true",
        "preview__every": 6,
        "preview__steps": [2],
        "validation__every": 6,
        "validation__steps": [1],
        "validation__teacher_steps": 2,
    }
    _, errors = two_processes(tmp_path, **settings)
    assert apart(learnt(alone), learnt(tmp_path / alone.name)) < SAME
    held = float(re.search(r"([0-9.]+) GiB of the frozen weights are held here", errors)[1])
    assert held * 2**30 == pytest.approx(4.76e6 * 4 / 2, rel=0.3)
    assert "0 keys unmatched" in errors and (tmp_path / "previews" / "step-0000006.png").is_file()
    measured = {line["step"]: line["figures"] for line in read_log(tmp_path) if line["kind"] == "validation"}
    assert list(measured) == [0, 6, 12] and (tmp_path / "pcm-lora-best.safetensors").is_file()
    run = Run(small_config(alone.parent, **ACROSS | settings | {"train__shard": "false"}), Reporter())
    assert measured[12] == pytest.approx(run.validation(12).figures, rel=1e-3)
