"""LoRA files as people have them, in the trainer's verbs: what is not for the network is left out and named, what
diffusers would take in part is refused by name, and what a file says of its alphas is done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phased_consistency.samplers.lora_file import read_header
from phased_consistency.samplers.writing import stamp_recipe
from phased_consistency.trainer.evaluation.contestants import find_contestants
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.lora.check import check_parity
from phased_consistency.trainer.lora.install import ADAPTER, install_by_diffusers, install_for_sample, load_for_check
from phased_consistency.trainer.sharing.convert import convert
from support.runs import TINY
from support.sharing_files import MODULES, RECIPE, kohya_file

ENCODER = "lora_te_text_model_encoder_layers_0_mlp_fc1"


@pytest.fixture
def lora(tiny_base, tmp_path):
    return kohya_file(tmp_path / "plain.safetensors", tiny_base)


def with_tensors(lora: Path, **tensors: torch.Tensor) -> Path:
    """A copy of a file with more tensors; dots in their names are written as two underscores."""
    more = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(lora) | more, path := lora.with_name("more.safetensors"), read_header(lora).metadata)
    return path


def peft_folder(lora: Path, **config) -> Path:
    """The LoRA as PEFT writes it: a folder of raw names, with its alphas in adapter_config.json."""
    folder = lora.with_name("adapter")
    folder.mkdir()
    converted = lora.with_name("diffusers.safetensors")
    convert(lora, converted, "diffusers")
    raw = {k.replace("unet.", "base_model.model.", 1): v for k, v in load_file(converted).items()}
    save_file(raw, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2} | config))
    return folder


def added(lora: Path) -> dict[str, torch.Tensor]:
    """What diffusers adds to each weight of the tiny base for a LoRA."""
    base = load_base(TINY)
    install_by_diffusers(lora, base, ADAPTER)
    layers = {n: m for n, m in base.network.named_modules() if ADAPTER in getattr(m, "lora_A", ())}
    return {name: layer.get_delta_weight(ADAPTER).detach() for name, layer in layers.items()}


def test_what_is_not_the_networks_is_left_out_and_named(lora, tmp_path):
    halves = {f"{ENCODER}__lora_down__weight": torch.ones(4, 64), f"{ENCODER}__lora_up__weight": torch.ones(256, 4)}
    more = with_tensors(lora, **halves, **{f"{ENCODER}__alpha": torch.tensor(4.0), "bundle_emb__x": torch.ones(2)})
    result = check_parity(more, load_for_check(TINY))
    assert result["passed"] and result["modules"] == len(MODULES)
    assert result["text"].endswith(
        "1 modules for text encoders are left out; 1 tensors that are no LoRA's are left out, such as bundle_emb.x"
    )
    assert all(torch.equal(a, b) for a, b in zip(added(more).values(), added(lora).values(), strict=True))
    base = load_base(TINY)
    assert install_for_sample(more, base, None).notes == tuple(result["left_out"])
    said = convert(more, tmp_path / "out.safetensors", "diffusers")
    assert said["modules"] == len(MODULES) + 1 and "1 tensors that are no LoRA's left out" in said["text"]


@pytest.mark.parametrize("part", ["dora_scale", "lora_mid.weight", "diff_b"])
def test_what_diffusers_would_take_in_part_is_refused_by_name(lora, part, pcm, tmp_path):
    name = "lora_unet_" + MODULES[0].replace(".", "_")
    more = with_tensors(lora, **{f"{name}__{part}": torch.ones(4, 4)})
    for run in (
        ("check", more, "--base", TINY),
        ("sample", "--base", TINY, "--lora", more, "--prompt", "x", "--out", tmp_path / "x.png"),
        ("convert", more, tmp_path / "out.safetensors", "--to", "diffusers"),
        ("train", "--preset", "demo-sd15", f"lora.init={more}", f"output={tmp_path / 'run'}", "--dry-run"),
    ):
        result = pcm(*run)
        assert result.code == 2 and f"more.safetensors is no plain LoRA: of its {len(MODULES)} modules 1 " in result.err
        assert name in result.err


def test_a_lora_of_text_encoders_alone_is_refused_by_name(pcm, tmp_path):
    halves = {f"{ENCODER}.lora_down.weight": torch.ones(4, 64), f"{ENCODER}.lora_up.weight": torch.ones(256, 4)}
    save_file(halves, alone := tmp_path / "alone.safetensors")
    for run in (
        ("check", alone, "--base", TINY),
        ("sample", "--base", TINY, "--lora", alone, "--prompt", "x", "--out", tmp_path / "x.png"),
        ("train", "--preset", "demo-sd15", f"lora.init={alone}", f"output={tmp_path / 'run'}", "--dry-run"),
    ):
        result = pcm(*run)
        assert result.code == 2 and "alone.safetensors has nothing for the network: its 1 modules are" in result.err
    assert pcm("convert", alone, tmp_path / "out.safetensors", "--to", "kohya", "--family", "sd15").code == 0


@pytest.mark.parametrize(("half", "other"), [("down", "up"), ("up", "down")])
def test_the_half_that_is_there_is_named(half, other, lora, fails, tmp_path):
    name = "lora_unet_" + MODULES[0].replace(".", "_")
    tensors = load_file(lora)
    del tensors[f"{name}.lora_{other}.weight"]
    save_file(tensors, lora)
    said = fails(2, "convert", lora, tmp_path / "out.safetensors", "--to", "diffusers", "--family", "sd15")
    assert f"has {name}.lora_{half}.weight and no {other} half of it" in said


def test_a_text_encoders_dora_is_not_written_without_its_magnitudes(lora, fails, tmp_path):
    parts = {"lora_down__weight": (4, 64), "lora_up__weight": (256, 4), "dora_scale": (256, 1)}
    more = with_tensors(lora, **{f"{ENCODER}__{part}": torch.ones(shape) for part, shape in parts.items()})
    said = fails(2, "convert", more, tmp_path / "out.safetensors", "--to", "diffusers")
    assert f"modules 1 DoRA, such as {ENCODER}" in said and not (tmp_path / "out.safetensors").exists()


def test_a_folder_of_pefts_is_a_lora_in_every_verb(lora, pcm, tmp_path):
    folder = peft_folder(lora)
    want, have = added(lora), added(folder)
    assert want.keys() == have.keys() and all(torch.equal(want[name], have[name]) for name in want)
    assert check_parity(folder, load_for_check(TINY))["passed"]
    for run in (
        ("inspect", folder),
        ("check", folder, "--base", TINY),
        ("sample", "--base", TINY, "--lora", folder, "--prompt", "x", "--steps", "1", "--out", tmp_path / "x.png"),
        ("convert", folder, tmp_path / "out.safetensors", "--to", "kohya", "--family", "sd15"),
        (
            "train",
            "--preset",
            "demo-sd15",
            f"lora.init={folder}",
            "lora.rank=4",
            f"output={tmp_path / 'run'}",
            "--dry-run",
        ),
    ):
        result = pcm(*run)
        assert result.code == 0, (run, result.err)
    converted = tmp_path / "out.safetensors"
    assert read_header(converted).alphas() == read_header(lora).alphas()


def test_a_folder_of_diffusers_is_a_lora(lora, pcm, tmp_path):
    """As `save_lora_weights` and its training scripts write it."""
    (folder := tmp_path / "trained").mkdir()
    convert(lora, folder / "pytorch_lora_weights.safetensors", "diffusers")
    want, have = added(lora), added(folder)
    assert want.keys() == have.keys() and all(torch.equal(want[name], have[name]) for name in want)
    assert pcm("convert", folder, tmp_path / "out.safetensors", "--to", "kohya").code == 0
    for run in (
        ("tag", folder, "modelspec.author=me"),
        ("sidecars", folder),
        ("panels", folder, "--out", tmp_path / "page.html"),
    ):
        assert (result := pcm(*run)).code == 0, (run, result.err)
    assert read_header(folder).metadata["modelspec.author"] == "me"
    (contestant,) = find_contestants([folder], "sd15", [1])
    assert contestant.name == "trained" and contestant.file.name == "pytorch_lora_weights.safetensors"
    assert (folder / "pytorch_lora_weights.metadata.json").is_file()
    said = pcm("convert", folder, folder / "pytorch_lora_weights.safetensors", "--to", "kohya", "--overwrite")
    assert said.code == 2 and "is a file that is read, and is never written over" in said.err


def test_a_copy_of_a_pefts_folder_keeps_its_alphas(lora, tmp_path):
    folder = peft_folder(lora)
    stamp_recipe(folder, copy := tmp_path / "copy.safetensors", RECIPE)
    assert read_header(copy).alphas() == read_header(folder).alphas() != {}


def test_patterns_of_alphas_are_pefts(lora):
    """By PEFT itself, which reads them in the folder that has them."""
    pattern = {".*resnets.0.conv1": 1, "to_k": 8}
    folder = peft_folder(lora, alpha_pattern=pattern)
    want, have = added(lora), added(folder)
    assert all(
        torch.allclose(have[name], want[name] * (0.5 if "conv1" in name else 4 if "to_k" in name else 1))
        for name in want
    )
    alphas = {name.removeprefix("lora_unet_"): alpha for name, alpha in read_header(folder).alphas().items()}
    assert alphas == {m.replace(".", "_"): 1 if "conv1" in m else 8 if m.endswith("to_k") else 2 for m in MODULES}


def test_a_lost_alpha_fails(lora):
    whole = load_file(lora)
    name = "lora_unet_" + MODULES[0].replace(".", "_")
    save_file({k: v for k, v in whole.items() if k != f"{name}.alpha"}, path := lora.with_name("lost.safetensors"))
    result = check_parity(path, load_for_check(TINY))
    assert not result["passed"] and result["lost_alphas"] == [name]
    assert "1 of 6 modules have lost their alpha, off by 0." in result["text"]
    (note,) = install_for_sample(path, load_base(TINY), None).notes
    assert (
        note == f"1 of 6 modules have lost their alpha, such as {name}, and count as alpha = rank: get the file again."
    )


def test_a_broken_config_beside_is_said(lora):
    folder = peft_folder(lora)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json cannot be read .*Get it again, or take it away"):
        read_header(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="No file at"):
        read_header(folder)
