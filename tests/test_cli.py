"""`pcm` as people run it: what each verb prints and writes; a mistake is a sentence and the right exit code."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from phased_consistency.trainer import checkpoint, cli, loop
from phased_consistency.trainer.engine import Engine
from runs import TINY, settings, sha256

VERBS = ("train", "sample", "inspect", "check", "doctor")


@pytest.fixture
def pcm(monkeypatch, capsys):
    """Run `pcm ...` in this process; returns its exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli, "_quiet_libraries", lambda: None)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["pcm", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code or 0, out=out, err=err)

    return run


@pytest.fixture
def fails(pcm):
    """Run `pcm ...`, expect this exit code and a message without a traceback, and return the message."""

    def run(code, *args):
        result = pcm(*args)
        assert result.code == code, result
        assert re.findall(r"^Error: .", result.err, re.MULTILINE) and "Traceback" not in result.err
        return result.err

    return run


@pytest.fixture
def lora(trained):
    return trained[1]


@pytest.fixture
def sdxl_lora(tmp_path):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.zeros(4, 2048), f"{name}.lora_up.weight": torch.zeros(64, 4)}
    save_file(tensors, tmp_path / "sdxl.safetensors")
    return tmp_path / "sdxl.safetensors"


def test_every_verb_has_help(pcm):
    whole = pcm("--help")
    assert whole.code == 0 and all(verb in whole.out for verb in VERBS)
    for verb in VERBS:
        result = pcm(verb, "--help")
        assert result.code == 0 and f"pcm {verb}" in result.out and "--json" in result.out
        assert result.err == ""


def test_unknown_verbs_and_options_are_bad_input(pcm):
    assert pcm("trian").code == 2
    assert pcm("inspect", "x.safetensors", "--jsn").code == 2
    assert pcm("check", "x.safetensors").code == 2  # --base is missing


def test_dry_run_says_what_would_happen_and_writes_nothing(pcm, tmp_path):
    result = pcm("train", *settings(tmp_path / "run"), "--dry-run")
    assert result.code == 0
    for line in (
        "base.path = ",
        "teacher makes from 6 prompts",
        "4 updates of 3 samples, 12 in all (2.0 passes)",
        "phases    4",
    ):
        assert line in result.out
    assert "starting at timesteps 999, 749, 499, 249" in result.out and "Memory estimate (GiB)" in result.out
    assert not (tmp_path / "run").exists()


def test_dry_run_as_json(pcm, tmp_path, lora):
    result = pcm("train", *settings(tmp_path / "run"), "--dry-run", "--json")
    plan = json.loads(result.out)
    assert plan["config"]["train"]["steps"] == 4 and plan["samples_seen"] == 12
    assert plan["phase_starts"] == [249, 499, 749, 999]
    assert plan["output"] == str(tmp_path / "run" / "pcm-lora.safetensors")
    assert plan["lora_modules"] == sum(name.endswith(".alpha") for name in load_file(lora)), "as the real run's file"
    assert plan["lora_file_bytes"] == pytest.approx(lora.stat().st_size, rel=0.5)
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
    result = pcm("train", *settings(tmp_path / "run", name="mine"), "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out) == {
        "lora": str(tmp_path / "run" / "mine.safetensors"), "run": str(tmp_path / "run"), "steps": 4,
    }  # fmt: skip
    assert "0 keys unmatched of" in result.err and "6 samples in" in result.err
    mine = load_file(tmp_path / "run" / "mine.safetensors")
    assert all(torch.equal(mine[name], tensor) for name, tensor in load_file(lora).items()), "a name changes no weight"

    described = pcm("inspect", tmp_path / "run" / "mine.safetensors")
    assert described.code == 0 and "SD1.5 LoRA" in described.out and "4 steps, CFG 1" in described.out
    assert "AutoV3" in described.out and "which matches the header" in described.out


def test_a_toml_file_and_overrides(pcm, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('preset = "demo"\n[base]\npath = "tiny-sd15"\n[train]\nsteps = 7\n')
    plan = json.loads(pcm("train", file, "train.batch_size=5", "--dry-run", "--json").out)
    assert plan["samples_seen"] == 35


def test_sample_draws_a_labelled_grid(pcm, tmp_path, lora):
    out = tmp_path / "made" / "grid.png"
    prompts = ("--prompt", "a red star", "--prompt", "a blue ring on a white background")
    result = pcm("sample", "--base", TINY, "--lora", lora, *prompts, "--steps", "4", "--out", out, "--resolution", "32")
    assert result.code == 0 and f"{out}: 1 rows of 2 pictures" in result.out
    assert "This LoRA was made for" not in result.err
    with Image.open(out) as grid:
        assert grid.size == (132 + 2 * 100, 44 + 100)
        assert len(grid.getcolors(maxcolors=10**6)) > 100


def test_sample_warns_of_settings_the_lora_was_not_made_for(pcm, tmp_path, lora):
    options = (
        "--base",
        TINY,
        "--lora",
        lora,
        "--prompt",
        "a red star",
        "--out",
        tmp_path / "g.png",
        "--resolution",
        "32",
    )
    result = pcm("sample", *options, "--steps", "2,4,6", "--guidance", "7", "--json")
    details = json.loads(result.out)
    assert [row["steps"] for row in details["rows"]] == [2, 4, 6]
    assert details["rows"][1]["ticks"] == [1000, 750, 500, 250, 0]
    for warning in (
        "made for 4 steps, not 2: set steps to 4", "made for 4 steps, not 6", "2 steps merge the 4 phases",
        "CFG 7 is above 2 and burns the image",
    ):  # fmt: skip
        assert warning in result.err and any(warning in w for w in details["warnings"])
    assert "not 4" not in result.err
    assert "burns the image" in pcm("sample", *options, "--steps", "4", "--guidance", "7").err


def test_sample_is_repeatable_and_the_lora_matters(pcm, tmp_path, lora):
    def draw(name, *more):
        out = tmp_path / f"{name}.png"
        options = ("--prompt", "a red star", "--steps", "4", "--guidance", "1", "--resolution", "32")
        assert pcm("sample", "--base", TINY, *options, "--out", out, *more).code == 0
        return sha256(out)

    plain, once = draw("plain"), draw("once", "--lora", lora)
    assert once == draw("again", "--lora", lora) != plain
    assert draw("off", "--lora", lora, "--strength", "0") == plain
    assert draw("seed", "--lora", lora, "--seed", "1") != once


def test_inspect_as_json(pcm, lora, trained):
    details = json.loads(pcm("inspect", lora, "--json").out)
    assert details["family"] == "sd15" and details["recipe"]["phases"] == 4 and details["recipe"]["source"] == "header"
    assert details["ranks"] == {"4": details["modules"]} and details["alphas"] == {"2": details["modules"]}
    assert details["tensors"] == 3 * details["modules"] and details["not_lora_tensors"] == []
    assert details["sha256"] == sha256(lora) and details["hash_matches_header"] is True
    assert details["metadata"]["modelspec.hash_sha256"].startswith("0x" + details["autov3"])


def test_inspect_tells_of_a_changed_file(pcm, lora, tmp_path):
    changed = tmp_path / "changed.safetensors"
    data = bytearray(lora.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    assert "which DOES NOT MATCH the header" in pcm("inspect", changed).out


def test_check_passes_a_good_lora(pcm, lora):
    result = pcm("check", lora, "--base", TINY)
    assert result.code == 0 and result.out.startswith("OK: 0 keys unmatched of "), result
    details = json.loads(pcm("check", lora, "--base", TINY, "--json").out)
    assert details["passed"] and details["unmatched"] == details["not_loaded_by_diffusers"] == 0
    assert details["max_difference"] < 0.01 * details["max_effect"]


def test_check_fails_a_renamed_module(pcm, lora, tmp_path):
    renamed = {k.replace("mid_block_resnets_0", "mid_block_resnets_7"): v for k, v in load_file(lora).items()}
    save_file(renamed, tmp_path / "renamed.safetensors")
    result = pcm("check", tmp_path / "renamed.safetensors", "--base", TINY)
    assert result.code == 1 and result.out.startswith("FAILED: 3 keys unmatched of ")
    assert "lora_unet_mid_block_resnets_7_conv1" in result.out


def test_check_fails_a_lora_of_other_shapes(pcm, lora, tmp_path):
    wide = {k: torch.cat([v, v]) if "resnets" in k and "lora_up" in k else v for k, v in load_file(lora).items()}
    save_file(wide, tmp_path / "wide.safetensors")
    result = pcm("check", tmp_path / "wide.safetensors", "--base", TINY)
    assert result.code == 1 and "diffusers cannot load wide.safetensors" in result.out


def test_doctor(pcm):
    text = pcm("doctor")
    assert text.code == 0 and f"torch {torch.__version__.split('+')[0]}" in text.out and "GiB free here" in text.out
    details = json.loads(pcm("doctor", "--json").out)
    assert (
        details["missing"] == [] and details["packages"]["diffusers"] and details["device"]["kind"] in ("cpu", "cuda")
    )
    assert "This run needs at least" in pcm("doctor", "--preset", "demo").out


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
    assert message in fails(2, "train", *settings(tmp_path / "run"), override, *["--dry-run"] * only_plan)


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
    assert ".safetensors checkpoint" in fails(2, *run, f"base.path={tmp_path / 'model.ckpt'}")
    assert "it lacks vae, text_encoder, tokenizer, scheduler/" in fails(2, *run, f"base.path={tmp_path / 'half'}")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_damaged_part_of_a_base_folder(fails, tmp_path, part):
    from phased_consistency.trainer.families import bundled_folder

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


@pytest.mark.parametrize("verb", ["sample", "check"])
def test_loras_of_another_family(fails, tmp_path, sdxl_lora, verb):
    arguments = {
        "sample": ("--lora", sdxl_lora, "--prompt", "x", "--out", tmp_path / "x.png"),
        "check": (sdxl_lora,),
    }[verb]
    message = fails(2, verb, *arguments, "--base", TINY)
    assert "sdxl.safetensors is a LoRA for SDXL, the base is SD1.5. Use a matching pair." in message


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--steps", "four"), "--steps is 'four'; write numbers with commas"),
        (("--steps", "0"), "steps must be between 1 and"),
        (("--steps", "1,41"), "steps must be between 1 and 40"),
        (("--resolution", "100"), "resolution 100 is not a multiple of 32"),
        (("--out", "grid.jpg"), "--out is 'grid.jpg'; write a name that ends in .png"),
        (("--lora", "gone.safetensors"), "No file at gone.safetensors"),
        (("--dtype", "int8"), "--dtype is 'int8'; available: fp32, fp16, bf16"),
        (("--base", "nowhere"), "No base at nowhere"),
    ],
)
def test_bad_options_of_sample(fails, tmp_path, lora, option, message):
    options = {"--base": TINY, "--lora": lora, "--prompt": "x", "--out": tmp_path / "x.png"} | {option[0]: option[1]}
    assert message in fails(2, "sample", *(part for pair in options.items() for part in pair))


def test_files_that_are_no_lora(fails, tmp_path):
    save_file({"model.diffusion_model.out.2.weight": torch.zeros(1)}, tmp_path / "checkpoint.safetensors")
    assert "checkpoint.safetensors holds no LoRA" in fails(2, "inspect", tmp_path / "checkpoint.safetensors")
    assert "No file at" in fails(2, "inspect", tmp_path / "gone.safetensors")


def test_an_absurd_learning_rate_stops_the_run(fails, tmp_path):
    message = fails(1, "train", *settings(tmp_path / "run", train__lr=1e30, train__max_grad_norm=1e9))
    assert "The loss is not finite at update 2, samples " in message and "No checkpoint was due yet" in message
    assert "Lower train.lr" in message


def test_a_loss_that_is_not_finite_names_its_sample_and_keeps_the_checkpoint(fails, pcm, tmp_path, lora, monkeypatch):
    step, calls = Engine.step, []

    def broken(self, batch):
        calls.append(batch)
        losses = step(self, batch)
        return losses * torch.tensor([1, float("nan"), 1]) if len(calls) == 3 else losses

    run = ("train", *settings(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", broken)
        message = fails(1, *run)
    assert (
        "The loss is not finite at update 3, samples " in message and message.count(": '") + message.count(': "') == 1
    )
    assert f"The last checkpoint is kept in {tmp_path / 'run' / 'checkpoints'}" in message
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000002.safetensors"]
    again = pcm(*run)
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

    real = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
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
def test_out_of_memory_says_what_to_try(fails, tmp_path, monkeypatch, error):
    def train(*_):
        raise error

    monkeypatch.setattr(loop, "train", train)
    message = fails(1, "train", *settings(tmp_path / "run"))
    order = [message.index(s) for s in ("train.gradient_checkpointing=true", "train.batch_size", "data.resolution")]
    assert order == sorted(order)


def test_an_interrupt_before_the_first_update(fails, tmp_path, monkeypatch):
    def train(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", train)
    message = fails(1, "train", *settings(tmp_path / "run"))
    assert "Interrupted. What was cached is kept; the same command goes on from there." in message


def test_tracebacks_on_request(monkeypatch):
    monkeypatch.setenv("PCM_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["pcm", "inspect", "gone.safetensors"])
    with pytest.raises(FileNotFoundError):
        cli.main()
