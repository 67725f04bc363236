"""`pcm train` as people run it: its plans, its runs, and the sentence that each mistake gets."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from phased_consistency.trainer.inference import sample as sampling
from phased_consistency.trainer.system import files
from phased_consistency.trainer.training.engine import Engine
from support.runs import TINY, settings, sha256


def test_dry_run_says_what_would_happen_and_writes_nothing(pcm, tmp_path):
    result = pcm("train", *settings(tmp_path / "run"), "--dry-run")
    assert result.code == 0
    for line in (
        "[base]\npath = ",
        "teacher makes from 6 prompts",
        "4 updates of 3 samples, 12 in all (2.0 passes)",
        "phases    4",
    ):
        assert line in result.out
    assert "starting at timesteps 999, 749, 499, 249" in result.out and "Memory estimate (GiB)" in result.out
    assert not (tmp_path / "run").exists()


def test_dry_run_as_json(pcm, tmp_path, lora):
    result = pcm("train", *settings(tmp_path / "run", base__path=TINY), "--dry-run", "--json")
    plan = json.loads(result.out)
    assert plan["config"]["train"]["steps"] == 4 and plan["samples_seen"] == 12
    assert plan["phase_starts"] == [249, 499, 749, 999]
    assert plan["output"] == str(tmp_path / "run" / "pcm-lora.safetensors")
    assert plan["lora_modules"] == sum(name.endswith(".alpha") for name in load_file(lora)), "as the real run's file"
    assert plan["file_bytes"] == pytest.approx(lora.stat().st_size, rel=0.5)
    assert all(v > 0 for v in plan["memory_gib"].values())


def test_a_full_size_run_can_be_planned(pcm):
    plans = [
        json.loads(pcm("train", "--preset", "sd15-4step", *override, "--dry-run", "--json").out)
        for override in (["train.batch_size=1"], [])
    ]
    assert [p["lora_modules"] for p in plans] == [278, 278] and plans[1]["samples_seen"] == 100_000
    small, large = (p["memory_gib"]["training in all, at least"] for p in plans)
    assert 2 < small < large < 40


def test_train_sample_inspect_and_check_end_to_end(pcm, tmp_path, lora):
    result = pcm("train", *settings(tmp_path / "run", base__path=TINY, name="mine"), "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out) == {
        "lora": str(tmp_path / "run" / "mine.safetensors"), "run": str(tmp_path / "run"), "steps": 4,
    }  # fmt: skip
    assert "0 keys unmatched of" in result.err and "6 samples in" in result.err
    mine = load_file(tmp_path / "run" / "mine.safetensors")
    assert all(torch.equal(mine[name], tensor) for name, tensor in load_file(lora).items()), "a name changes no weight"

    described = pcm("inspect", tmp_path / "run" / "mine.safetensors")
    assert described.code == 0 and "SD1.5 PCM LoRA" in described.out and "4 steps, CFG 1" in described.out
    assert "AutoV3" in described.out and "which matches the header" in described.out


def test_a_toml_file_and_overrides(pcm, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('preset = "demo"\n[base]\npath = "tiny-sd15"\n[train]\nsteps = 7\n')
    plan = json.loads(pcm("train", file, "train.batch_size=5", "--dry-run", "--json").out)
    assert plan["samples_seen"] == 35


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=4", "train.stpes: unknown key. Did you mean 'steps'?"),
        ("objective.points=30", "points = 30 does not divide 1000"),
        ("base.path=nowhere", "No base at nowhere. Set base.path to a diffusers folder"),
        ("base.path=gone.safetensors", "No file at gone.safetensors"),
        ("data.images=nowhere", "No folder at nowhere. Set data.images"),
        ("data.prompts=nowhere.txt", "No prompt file at nowhere.txt. Set data.prompts"),
        ("data.resolution=100", "resolution 100 is not a multiple of 32: use 96 or 128"),
    ],
)
@pytest.mark.parametrize("only_plan", [True, False], ids=["dry-run", "run"])
def test_bad_settings(fails, tmp_path, override, message, only_plan):
    """A dry run finds what a run would."""
    assert message in fails(
        2, "train", *settings(tmp_path / "run", base__path=TINY), override, *["--dry-run"] * only_plan
    )


def test_bad_bases(fails, tmp_path, lora):
    whole = tmp_path / "whole.safetensors"
    save_file({"model.diffusion_model.out.2.weight": torch.zeros(1000)}, whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "model.ckpt").write_bytes(b"PK\3\4")
    (tmp_path / "half" / "unet").mkdir(parents=True)
    run = ("train", *settings(tmp_path / "run"))
    assert "cut.safetensors is cut short" in fails(2, *run, f"base.path={cut}")
    assert "is no Stable Diffusion checkpoint: it has no model.diffusion_model.*" in fails(2, *run, f"base.path={lora}")
    assert "Set base.path to a .safetensors checkpoint" in fails(2, *run, f"base.path={tmp_path / 'model.ckpt'}")
    assert "it lacks vae, text_encoder, tokenizer, scheduler/" in fails(
        2, *run, f"base.path={tmp_path / 'half'}", "base.family=sd15"
    )


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_damaged_part_of_a_base_folder(fails, tmp_path, part):
    from phased_consistency.trainer.tiny.bundled import bundled_folder

    base = tmp_path / "base"
    shutil.copytree(bundled_folder(TINY) or TINY, base)
    (weights,) = (base / part).glob("*.safetensors")
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "cannot be loaded" in fails(2, "train", *settings(tmp_path / "run", base__path=base))


def test_bad_pictures(fails, pcm, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (40, 40), "red").save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(f"a red square called {name}")
    (pictures / "a.txt").unlink()
    run = ("train", *settings(tmp_path / "run", data__images=pictures))
    assert "1 of the 3 pictures in" in fails(2, *run, "--dry-run")
    assert "a.png: no caption a.txt" in fails(2, *run)
    (pictures / "a.txt").write_text("a red square")
    (pictures / "b.png").write_bytes(b"broken")
    assert "b.png: cannot be read" in fails(2, *run)
    result = pcm("train", *settings(tmp_path / "other", data__images=pictures, data__skip_bad="true"))
    assert result.code == 0 and "Left out b.png: cannot be read" in result.err and "2 samples in" in result.err


def test_an_absurd_learning_rate_stops_the_run(fails, tmp_path):
    message = fails(1, "train", *settings(tmp_path / "run", train__lr=1e30, train__max_grad_norm=1e9))
    assert "The loss is not finite at update 2, samples " in message and "No checkpoint was due yet" in message
    assert "Lower train.lr" in message


def test_a_loss_that_is_not_finite_names_its_sample_and_keeps_the_checkpoint(fails, pcm, tmp_path, lora, monkeypatch):
    step, calls = Engine.step, []

    def broken(self, batch):
        calls.append(batch)
        losses = step(self, batch)
        broken = losses.distance * torch.tensor([1, float("nan"), 1])
        return replace(losses, distance=broken) if len(calls) == 3 else losses

    overrides = settings(tmp_path / "run", base__path=TINY, train__save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", broken)
        message = fails(1, "train", *overrides)
    assert (
        "The loss is not finite at update 3, samples " in message and message.count(": '") + message.count(': "') == 1
    )
    assert f"The last checkpoint, step-0000002, is kept in {tmp_path / 'run' / 'checkpoints'}" in message
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000002.safetensors"]
    again = pcm("train", *overrides)
    assert again.code == 0 and "Going on from update 2 of 4" in again.err
    assert sha256(tmp_path / "run" / "pcm-lora.safetensors") == sha256(lora), "as if nothing had happened"


def test_a_full_disk_loses_nothing(fails, tmp_path, monkeypatch):
    old = tmp_path / "run" / "pcm-lora.safetensors"
    old.parent.mkdir()
    old.write_bytes(b"an older file")

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half a file")
        if "pcm-lora.safetensors" in path.name:
            raise OSError(28, "No space left on device")
        return real(tensors, path, metadata)

    real = files.save_file
    monkeypatch.setattr(files, "save_file", full_disk)
    message = fails(1, "train", *settings(tmp_path / "run"))
    assert f"Cannot write {old}: " in message and "No space left on device" in message and "Free space" in message
    assert old.read_bytes() == b"an older file" and not list(tmp_path.rglob("*.part"))
    assert (tmp_path / "run" / "checkpoints" / "step-0000004.safetensors").is_file()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_names_what_would_save_most(fails, tmp_path, monkeypatch, error):
    """In a run, by the estimate of its own configuration, best first; what was cached is kept."""

    def step(*_):
        raise error

    monkeypatch.setattr(Engine, "step", step)
    message = fails(1, "train", *settings(tmp_path / "run", train__batch_size=32))
    found = re.findall(r"(\S+=\S+(?: \S+=\S+)?) saves about ([\d.e-]+) GiB", message)
    saved = [float(gib) for _, gib in found]
    assert len(found) == 3 and saved == sorted(saved, reverse=True) and saved[0] > 0
    assert {"train.gradient_checkpointing=true", "train.batch_size=16 train.accumulation=2"} <= {s for s, _ in found}
    assert (tmp_path / "run" / "cache").is_dir()


def test_out_of_memory_beside_training_says_what_to_try(fails, lora, tmp_path, monkeypatch):
    def sample(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sampling, "sample_grid", sample)
    given = ("--base", TINY, "--lora", lora, "--prompt", "a red star", "--out", tmp_path / "grid.png")
    message = fails(1, "sample", *given)
    assert "CUDA out of memory." in message and "smaller resolution, --dtype bf16" in message
