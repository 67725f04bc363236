"""The rows of docs/robustness.md on what a run is made of: its base and its pictures."""

import shutil

import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file

from phased_consistency.trainer.tiny.bundled import bundled_folder
from phased_consistency.trainer.training.loop import train
from support.faults import fails, rows
from support.runs import TINY, Notes, small_config

SHORT = {"data__teacher_steps": 1, "train__steps": 1}  # what is looked at is over before the first update


def test_a_base_that_was_replaced(tmp_path):
    """The file of the same name has other weights: seen by its hash, before anything is made with it."""
    shutil.copytree(bundled_folder(TINY), tmp_path / "base")
    config = small_config(tmp_path / "run", base__path=tmp_path / "base", **SHORT)
    train(config)
    weights = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({k: v * 1.001 if "mid_block" in k else v for k, v in tensors.items()}, weights)
    caches = list((tmp_path / "run" / "cache").iterdir())
    fails(config, "base replaced between runs", error=ValueError)
    assert list((tmp_path / "run" / "cache").iterdir()) == caches
    train(config, accept_changes=True)


def test_a_base_with_weights_that_are_not_finite(tmp_path):
    shutil.copytree(bundled_folder(TINY), tmp_path / "base")
    weights = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["mid_block.resnets.0.conv1.weight"][0] = float("nan")
    save_file(tensors, weights)
    fails(small_config(tmp_path / "run", base__path=tmp_path / "base"), "NaN in the base's weights", error=ValueError)
    assert not (tmp_path / "run" / "cache").exists(), "nothing was made with it"


def test_changed_pictures(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n in range(4):
        Image.new("RGB", (64, 64), (60 * n, 90, 20)).save(pictures / f"{n}.png")
        (pictures / f"{n}.txt").write_text("a colour")
    config = small_config(tmp_path / "run", data__images=pictures, data__count=None, **SHORT)
    train(config)
    Image.new("RGB", (64, 64), (9, 9, 9)).save(pictures / "0.png")
    fails(config, "pictures changed between runs", error=ValueError)
    assert "have changed since." in " ".join(_said(config, accept_changes=True))


def test_pictures_that_were_moved(tmp_path):
    """What is in a folder decides, not its name; the run's own pictures in it are none of the data."""
    run = tmp_path / "pictures" / "run"
    run.parent.mkdir()
    for n in range(2):
        Image.new("RGB", (64, 64), (60 * n, 90, 20)).save(run.parent / f"{n}.png")
        (run.parent / f"{n}.txt").write_text("a colour")
    settings = SHORT | {"data__count": None, "preview__every": 1}
    train(small_config(run, data__images=run.parent, **settings))
    assert list(run.glob("previews/*.png"))
    run.parent.rename(tmp_path / "moved")
    config = small_config(tmp_path / "moved" / "run", data__images=tmp_path / "moved", **settings)
    assert "Going on from update 1 of 1." in _said(config)
    assert rows()["pictures moved to another folder"].startswith("nothing: ")


def _said(config, **how):
    notes = Notes()
    train(config, notes, **how)
    return notes.said


def test_a_picture_that_cannot_be_read(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n in range(3):
        Image.fromarray(np.full((64, 64, 3), 60 * n, np.uint8)).save(pictures / f"{n}.png")
        (pictures / f"{n}.txt").write_text("a grey")
    whole = (pictures / "1.png").read_bytes()
    (pictures / "1.png").write_bytes(whole[: len(whole) // 2])
    settings = SHORT | {"data__images": pictures, "data__count": None}
    fails(small_config(tmp_path / "run", **settings), "picture that cannot be read", error=ValueError)
    said = _said(small_config(tmp_path / "run", **settings, data__skip_bad="true"))
    assert any("Left out" in line and "1.png" in line for line in said), said
    (pictures / "1.png").write_bytes(whole)
    (pictures / "2.txt").unlink()
    fails(small_config(tmp_path / "other", **settings), "picture without a caption", error=ValueError)
