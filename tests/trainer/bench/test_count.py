"""`pcm bench --count`: an update's figures on a GPU that is not there, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from phased_consistency.trainer.bench.count import count, find_compiler
from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.efficiency.memory import CONTEXT
from phased_consistency.trainer.system.machine import GIB

COUNTED = sys.platform == "linux" and torch.version.cuda is None and find_compiler()
counting = pytest.mark.skipif(not COUNTED, reason="needs Linux, torch's build for CPUs, and a C++ compiler")


def by_part(report, figure):
    return {name: part[figure] for name, part in report["parts"].items()}


# launches, 1e9 operations, MiB moved and at the peak of a small update
SMALL_FIGURES = {
    ("base.dtype=fp32",): (4_794, 4.399, 471.4, 66.0),
    ("base.dtype=bf16", "base.quantize=fp8"): (6_133, 4.402, 348.1, 53.9),
    ("base.dtype=bf16", "train.gradient_checkpointing=true", "train.offload_activations=true"): (
        6_316,
        5.245,
        353.2,
        51.6,
    ),
    ("base.dtype=bf16", "base.quantize=int8-compute"): (7_639, 4.402, 395.5, 53.9),
}


SMALL_UPDATE = ("adversarial.weight=0.1", "train.batch_size=4", "data.resolution=64")


@counting
def test_a_small_update_by_part(pcm, tmp_path):
    """Every part is there, nothing waits, and teacher and target are passes of a like network."""
    numbers = next(iter(SMALL_FIGURES))
    result = pcm("bench", "--count", "demo-sd15", *numbers, *SMALL_UPDATE, "--out", tmp_path, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report == json.loads((tmp_path / "bench.json").read_text())
    check_small(report, SMALL_FIGURES[numbers])
    for line in ("Counted, not measured: one update", "in all", "What moves the most bytes"):
        assert line in (tmp_path / "bench.txt").read_text()


def check_small(report, figures):
    parts = {"data", "teacher", "target", "student", "discriminator", "backward", "optimizer", "other"}
    assert report["parts"].keys() == parts and report["passes"] == 1
    assert report["total"]["waits"] == 0
    flop = by_part(report, "flop")
    assert flop["teacher"] > flop["target"] > 0, "both halves of guidance, without the LoRA"
    assert flop["backward"] > flop["student"] > 0 == flop["optimizer"]
    assert sum(by_part(report, "moved").values()) == report["total"]["moved"]
    total = report["total"]
    counted = total["launches"], total["flop"] / 1e9, total["moved"] / 2**20, total["peak"] / 2**20
    assert counted == pytest.approx(figures, rel=0.03)
    assert report["total"]["peak"] == max(by_part(report, "peak").values()) > report["resident"] > 0


# launches, 1e12 operations, GiB moved and at the peak, of one pass and the optimizer's step. Each family once, and what
# changes the most: the others of docs/measurements/speed.md take as long as a tenth of all tests.
FIGURES = {
    ("sd15-4step",): (10_451, 107.1, 483.1, 7.06),
    ("sdxl-4step", "base.quantize=int8"): (35_373, 88.1, 410.4, 6.49),
    ("sdxl-4step", "train.offload=true"): (28_999, 88.1, 377.5, 3.85),
    ("sd3-4step-adv",): (19_358, 161.6, 468.3, 6.79),
}


@pytest.fixture(scope="module")
def reports():
    """Of all these updates, counted one after the other, as what is to be counted is named."""
    configs = {("demo-sd15", *numbers): (*numbers, *SMALL_UPDATE) for numbers in list(SMALL_FIGURES)[1:]}
    configs |= {settings: settings[1:] for settings in (*FIGURES, ("digits",))}
    made = count(*(load_config(overrides=overrides, preset=key[0]) for key, overrides in configs.items()))
    return dict(zip(configs, made, strict=True))


@counting
@pytest.mark.parametrize("numbers", list(SMALL_FIGURES)[1:], ids=" ".join)
def test_a_small_update_in_other_numbers(reports, numbers):
    check_small(reports[("demo-sd15", *numbers)], SMALL_FIGURES[numbers])


@counting
@pytest.mark.parametrize("settings", FIGURES, ids=" ".join)
def test_updates_of_full_size(reports, settings):
    report = reports[settings]
    total = report["total"]
    counted = total["launches"], total["flop"] / 1e12, total["moved"] / GIB, total["peak"] / GIB
    assert counted == pytest.approx(FIGURES[settings], rel=0.03)
    assert total["waits"] == 0
    # the estimate lays gradients, of which a backward pass has few while it holds much, on top of all activations, and
    # with offload a block whose memory is not free yet on a real GPU
    assert 0.8 < (total["peak"] + CONTEXT) / report["estimate"] < 1.05


@counting
def test_what_is_trained_whole_is_counted_too(reports):
    total = reports[("digits",)]["total"]
    assert total["waits"] == 0 and total["launches"] > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sdxl-4step", "train.compile=true"), "train.compile=true, but what torch.compile makes"),
        (("sdxl-4step", "train.shard=true"), "it counts one process: set train.shard=false"),
        (("sdxl-4step", "train.optimizer=adamw8bit"), "set train.optimizer=adamw"),
        (("sdxl-4step", "data.resolution=1000"), "resolution 1000 is not a multiple of 32"),
        (("demo-sd15", "train.gradient_checkpointing=auto"), "Set train.memory_limit_gib"),
        (("sdxl-4stpe",), "Unknown preset 'sdxl-4stpe'.*sdxl-4step"),
        (("none.toml",), "No config file at none.toml"),
        (("sdxl-4step", "--preset", "sd3-4step"), "name two presets: leave --preset out"),
        (("sdxl-4step", "--updates", "3"), "leave --updates, --warmup and --reference out"),
        (("sdxl-4step", "--no-reference"), "leave --updates, --warmup and --reference out"),
    ],
)
def test_what_cannot_be_counted_is_said(fails, monkeypatch, arguments, message):
    monkeypatch.setattr(subprocess, "run", None)  # before anything is started
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert re.search(message, fails(2, "bench", "--count", *arguments))


def test_compilers_that_are_not_there_or_cannot(monkeypatch, tmp_path):
    config = load_config(preset="demo-sd15")
    monkeypatch.delenv("CXX", raising=False)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="needs a C.. compiler: apt-get install g"):
        patch.setattr(shutil, "which", lambda _: None)
        count(config)
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="cannot start the C.. compiler .*none: No such file"):
        count(config)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ValueError, match="false does not compile what it needs .no reason given.*C..20"):
        count(config)


def test_another_build_of_torch_is_said(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match="works on Linux with torch's build for CPUs.*download.pytorch.org/whl/cpu"):
        count(load_config(preset="demo-sd15"))
