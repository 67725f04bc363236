"""Stopped runs end in the same bytes as one that was left alone (more of them: test_faults.py, test_kills.py)."""

import re
import shutil
import signal
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from phased_consistency.trainer.training.checkpoint import load_latest_state
from phased_consistency.trainer.training.loop import RunFailed, train
from support.runs import Notes, metadata, settings, sha256, small_config, start_pcm

STEPS = 6
CHANGES = {
    "train__steps": STEPS,
    "train__save_every": 2,
    "train__accumulation": 2,
    "train__ema": 0.9,
    "train__batch_size": 2,
}
ACROSS = CHANGES | {"train__lr_schedule": "cosine", "train__warmup": 3, "train__keep_checkpoints": STEPS}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody stops; every checkpoint of it is kept."""
    config = small_config(tmp_path_factory.mktemp("whole") / "run", **ACROSS)
    return config, train(config)


@pytest.fixture
def partly(whole, tmp_path):
    """A copy of the run as it stood after 4 updates."""
    config = small_config(tmp_path / "run", **ACROSS)
    shutil.copytree(whole[0].run_folder, config.run_folder)
    (config.run_folder / whole[1].name).unlink()
    for checkpoint in checkpoints(config)[2:]:
        checkpoint.unlink()
    return config


def checkpoints(config):
    return sorted((config.run_folder / "checkpoints").glob("*.safetensors"))


def stop_in_the_middle(config, number):
    """Start `pcm train`, signal it once its first checkpoint is there; returns (exit code, stderr)."""
    process = start_pcm("train", *settings(config.run_folder, **ACROSS))
    try:
        until = time.monotonic() + 300
        while not checkpoints(config) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, errors


def test_an_interrupted_run_saves_and_goes_on(whole, tmp_path):
    config, notes = small_config(tmp_path / "run", **ACROSS), Notes()
    code, errors = stop_in_the_middle(config, signal.SIGINT)
    assert code == 1
    stopped = re.search(
        rf"Stopped at update (\d+) of {STEPS}; all is saved. The same command goes on from here.", errors
    )
    assert stopped, errors
    assert load_latest_state(config.run_folder / "checkpoints")[0] == int(stopped[1])
    assert sha256(train(config, notes)) == sha256(whole[1])
    assert notes.steps[0] == int(stopped[1]) + 1


def test_a_run_goes_on_when_nobody_listens(tmp_path):
    """Its display's reader has left, as with `| head`, before the first update."""
    process = start_pcm("train", *settings(tmp_path / "run", train__steps=2))
    process.stderr.readline()
    process.stderr.close()
    assert process.stdout.read().startswith("Done: ") and process.wait(300) == 0
    assert metadata(tmp_path / "run" / "pcm-lora.safetensors")["pcm.step"] == "2"


def test_an_optimizer_in_8_bits_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """Its state is bytes, tables and scales, nested; blocks of 4096 weights or more are kept so."""
    pytest.importorskip("bitsandbytes")
    settings = {"train__optimizer": "adamw8bit", "lora__rank": 128, "train__batch_size": 2, "train__save_every": 2}
    whole = train(small_config(tmp_path / "whole", **settings))
    config = small_config(tmp_path / "run", **settings)
    shutil.copytree(tmp_path / "whole", config.run_folder)
    checkpoints(config)[-1].unlink()
    _, groups, _ = load_latest_state(config.run_folder / "checkpoints")
    assert any(tensor.dtype == torch.uint8 for tensor in groups["optimizer"].values())
    notes = Notes()
    assert sha256(train(config, notes)) == sha256(whole) and notes.steps == [3, 4]


def test_saving_and_testing_on_the_way_change_nothing(whole, tmp_path):
    """Checkpoints, exports, self-tests and previews draw no random number and leave no trace in the weights."""
    rare = {"train__save_every": 1000, "preview__every": 5, "preview__steps": [1], "train__trackers": '["tensorboard"]'}
    path = train(small_config(tmp_path / "run", **ACROSS | rare))
    assert sha256(path) == sha256(whole[1])
    grids = sorted(p.name for p in (tmp_path / "run" / "previews").iterdir())
    assert grids == [f"step-{n:07d}.png" for n in (5, STEPS)]
    assert path.with_suffix(".preview.png").is_file()


def test_a_finished_run_stays_as_it_is(whole):
    config, path = whole
    before, notes = sha256(path), Notes()
    assert train(config, notes) == path
    assert sha256(path) == before and notes.steps == []


def test_the_average_is_what_is_saved(whole, tmp_path):
    plain = train(small_config(tmp_path / "run", **ACROSS | {"train__ema": 0}))
    assert metadata(plain)["sshs_model_hash"] != metadata(whole[1])["sshs_model_hash"]
    state = [load_latest_state(folder / "checkpoints")[1] for folder in (tmp_path / "run", whole[0].run_folder)]
    same = [(state[0]["adapter"][n] == w).all() for n, w in state[1]["adapter"].items()]
    assert all(same), "averaging does not change what is averaged"


def test_intermediate_files_are_whole_loras(whole):
    config, _ = whole
    files = sorted(config.run_folder.glob("pcm-lora-*.safetensors"))
    assert [metadata(f)["pcm.step"] for f in files] == [str(n) for n in range(2, STEPS, 2)]


def test_only_the_last_checkpoints_are_kept(trained):
    config, _ = trained
    assert [p.name for p in checkpoints(config)] == ["step-0000002.safetensors", "step-0000004.safetensors"]
    assert not list(config.run_folder.rglob("*.part"))


def test_another_configuration_is_refused_by_name(partly, whole):
    changed = small_config(partly.run_folder, **ACROSS | {"train__lr": 0.02, "lora__rank": 8})
    with pytest.raises(ValueError, match="holds a run with other settings") as raised:
        train(changed)
    assert ":\n  lora.rank: 4 then, 8 now\n  train.lr: 0.01 then, 0.02 now\nUse the same" in str(raised.value)
    assert sha256(train(partly)) == sha256(whole[1]), "and the refusal changed nothing"


def test_what_a_run_only_shows_may_change(partly, whole):
    shown = {"train__save_every": 3, "train__keep_checkpoints": 1, "preview__prompts": '["a red star"]'}
    assert sha256(train(small_config(partly.run_folder, **ACROSS | shown))) == sha256(whole[1])


def test_changed_prompts_are_refused(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\na blue ring\n")
    config = small_config(tmp_path / "run", data__prompts=prompts, data__teacher_steps=1, train__steps=1)
    train(config)
    prompts.write_text("a red star\na green ring\n")
    with pytest.raises(ValueError, match="holds a run on other data: the pictures or the captions have changed"):
        train(config)


def test_a_failed_self_test_stops_the_run_and_keeps_the_checkpoint(partly, monkeypatch):
    """A self-test that fails stops the run, and says that the checkpoint is good."""
    from phased_consistency.trainer.lora import selftest

    monkeypatch.setattr(selftest.SelfTest, "passed", False)
    with pytest.raises(RunFailed, match="does not give the trained output when diffusers loads it.*is good"):
        train(partly)


def test_a_checkpoint_with_other_tensors_is_refused(partly):
    last = checkpoints(partly)[-1]
    with safe_open(last, "pt") as file:
        facts = file.metadata()
    save_file(load_file(last) | {"stray": torch.zeros(1)}, last, facts)
    with pytest.raises(ValueError, match=f"{last.name} is damaged .'stray' is no name of its tensors.. Delete it"):
        train(partly)
