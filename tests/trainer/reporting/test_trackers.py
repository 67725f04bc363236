"""TensorBoard, W&B and trackio: what they hold is what the run measured, and none of them can end it."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from phased_consistency.trainer.reporting import trackers
from phased_consistency.trainer.reporting.log import read_log
from phased_consistency.trainer.reporting.trackers import PROJECT, Trackers
from phased_consistency.trainer.training.loop import train
from support.runs import Notes, small_config

WATCHED = {"validation__every": 2, "validation__steps": [1], "validation__teacher_steps": 2}
WATCHED |= {"preview__every": 2, "preview__steps": [1], "preview__prompts": '["a red star"]'}


def events(folder):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = reading.EventAccumulator(str(folder / "logs" / PROJECT), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def trackers_of(config, say):
    return Trackers(config.train.trackers, config.run_folder, config.name, config.for_others(), say)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was killed after its first checkpoint, and went on."""
    whole, folder = tmp_path_factory.mktemp("whole") / "run", tmp_path_factory.mktemp("run") / "run"
    settings = WATCHED | {"train__save_every": 2, "train__trackers": '["tensorboard"]'}
    train(small_config(whole, **settings))
    shutil.copytree(whole, folder)
    (folder / "checkpoints" / "step-0000004.safetensors").unlink()
    assert (folder / "checkpoints" / "step-0000002.safetensors").is_file()
    train(small_config(folder, **settings))
    return folder


def test_tensorboard_holds_each_figure_once(run):
    written = events(run)
    lines = read_log(run)
    for name in ("loss", "lr", "gradient norm of the adapter"):
        expected = [(line["step"], np.float32(line[name])) for line in lines if line["kind"] == "update"]
        assert [(e.step, np.float32(e.value)) for e in written.Scalars(name)] == expected and len(expected) == 4
    measured = [line for line in lines if line["kind"] == "validation"]
    assert [line["step"] for line in measured] == [0, 2, 4]
    for name in measured[0]["figures"]:
        expected = [(line["step"], np.float32(line["figures"][name])) for line in measured]
        assert [(e.step, np.float32(e.value)) for e in written.Scalars(f"validation/{name}")] == expected


def test_tensorboard_holds_the_previews(run):
    previews = events(run).Images("preview")
    assert [e.step for e in previews] == [2, 4]
    for event in previews:
        with Image.open(run / "previews" / f"step-{event.step:07d}.png") as file:
            assert np.array_equal(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"), file)


def test_a_missing_package_is_named_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    config = small_config(tmp_path / "run", train__trackers='["wandb", "tensorboard", "trackio"]')
    with pytest.raises(ValueError, match="wandb and trackio not installed: pip install wandb trackio, or leave it out"):
        train(config)
    assert not (tmp_path / "run" / "cache").exists(), "before anything is made"


def test_the_default_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    notes = Notes()
    opened = trackers_of(small_config(tmp_path, train__trackers='["tensorboard"]'), notes.say)
    opened.start(0)
    assert opened.open == [] and notes.said == [
        "No TensorBoard logs: pip install tensorboard, or set train.trackers=[]."
    ]


def test_a_tracker_that_fails_is_dropped_and_said_once(tmp_path):
    notes = Notes()
    opened = trackers_of(small_config(tmp_path, train__trackers='["tensorboard"]'), notes.say)
    opened.start(0)
    opened.open[0].writer.close()
    opened.open[0].writer = None
    for step in (1, 2):
        opened.figures({"loss": 1.0}, step)
    opened.finish()
    assert opened.open == [] and len(notes.said) == 1
    assert notes.said[0].startswith("tensorboard failed (") and notes.said[0].endswith("is left out from here on.")


def test_wandb_takes_figures_and_pictures_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = small_config(tmp_path / "run", train__trackers='["wandb"]')
    config.run_folder.mkdir()
    notes = Notes()
    opened = trackers_of(config, notes.say)
    opened.start(0)
    tracker = opened.open[0].tracker
    assert tracker.config["train"]["steps"] == 4 and "output" not in tracker.config
    opened.figures({"loss": 0.25}, 1)
    opened.picture("preview", Image.new("RGB", (8, 8), "red"), 1)
    opened.finish()
    assert notes.said == []
    (kept,) = (config.run_folder / "wandb").glob("offline-run-*")
    assert list(kept.glob("*.wandb")) and list(kept.glob("files/media/images/preview*.png"))


def test_trackio_takes_figures_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    trackio = pytest.importorskip("trackio")
    config = small_config(tmp_path / "run", train__trackers='["trackio"]')
    notes = Notes()
    opened = trackers_of(config, notes.say)
    opened.start(0)
    opened.figures({"loss": 0.25}, 1)
    opened.picture("preview", Image.new("RGB", (8, 8), "red"), 1)
    opened.finish()
    assert notes.said == []
    logged = trackio.Api().runs(PROJECT)[0]
    assert logged.name == config.name
