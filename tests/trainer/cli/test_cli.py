"""`pcm` as people run it: what the verbs but train print and write; a mistake is a sentence and the right exit code."""

import json
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from phased_consistency.trainer.cli import main as cli
from support.runs import TINY, sha256

VERBS = (
    *("train", "sample", "evaluate", "inspect", "check", "doctor", "bench", "bench-gpu", "bench-data"),
    *("convert", "tag", "merge", "resize", "extract", "sidecars"),
)


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
        "made for 4 steps, not 2: set steps to 4", "made for 4 steps, not 6",
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
    assert "optional sentencepiece: " in text.out and "optional protobuf: " in text.out
    details = json.loads(pcm("doctor", "--json").out)
    assert (
        details["missing"] == [] and details["packages"]["diffusers"] and details["device"]["kind"] in ("cpu", "cuda")
    )
    assert "This run needs at least" in pcm("doctor", "--preset", "demo").out


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


def test_tracebacks_on_request(monkeypatch):
    monkeypatch.setenv("PCM_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["pcm", "inspect", "gone.safetensors"])
    with pytest.raises(FileNotFoundError):
        cli.main()
