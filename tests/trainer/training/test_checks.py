"""The one gate: what a run refuses, its dry run refuses in the same words, and before anything is loaded."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.config.presets import PRESETS
from phased_consistency.trainer.efficiency import footprint
from phased_consistency.trainer.families import look_at_base
from phased_consistency.trainer.reporting import trackers
from phased_consistency.trainer.training import checks, settle, setup
from phased_consistency.trainer.training.loop import train
from phased_consistency.trainer.training.plan import plan
from support.bases import BUNDLED
from support.runs import TINY, settings

# Settings that decide how a run is worked through, on what, and from where it starts.
SWITCHES = {
    "nothing": {},
    "shard": {"train.shard": "true"},
    "offload": {"train.offload": "true"},
    "shard and offload": {"train.shard": "true", "train.offload": "true"},
    "compile": {"train.compile": "true"},
    "inputs of no block": {"train.offload_activations": "true"},
    "kernel of a GPU's": {"train.attention": "flash"},
    "all blocks again": {"train.gradient_checkpointing": "true"},
    "as many blocks as fit": {"train.gradient_checkpointing": "auto"},
    "blocks within a limit": {"train.gradient_checkpointing": "auto", "train.memory_limit_gib": 1},
    "int8": {"base.quantize": "int8"},
    "fp8": {"base.quantize": "fp8"},
    "products in int8": {"base.quantize": "int8-compute"},
    "optimizer in 8 bits": {"train.optimizer": "adamw8bit"},
    "W&B": {"train.trackers": "wandb"},
    "odd resolution": {"data.resolution": 100},
    "odd bucket": {"data.buckets": '["64x100"]', "data.images": "PICTURES"},
    "no pictures": {"data.images": "nowhere"},
    "no captions": {"data.images": "UNCAPTIONED"},
    "no shards": {"data.shards": '["nowhere-{0..2}.tar"]'},
    "no prompts": {"data.prompts": "nowhere.txt"},
    "strange words": {"preview.prompts": '["a cat"]'},
    "no start": {"lora.init": "nowhere.safetensors"},
    "start of another kind": {"lora.init": "LORA"},
    "another prediction": {"base.prediction": "v_prediction"},
    "zero terminal SNR": {"base.zero_terminal_snr": "true"},
    "shift": {"base.shift": 3},
    "no tokenizer there": {"base.tokenizer": "nowhere"},
}


class Loaded(Exception):
    """The gate was passed: the base's weights were about to be read."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folders of pictures with and without captions, and a file that is no LoRA of any base here."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("pictures", "uncaptioned"):
        (folder / name).mkdir()
        Image.new("RGB", (64, 64)).save(folder / name / "0.png")
    (folder / "pictures" / "0.txt").write_text("3")
    weights = {f"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{part}.weight" for part in ("up", "down")}
    save_file({name: torch.zeros(4, 4) for name in weights}, folder / "lora.safetensors")
    return {
        "PICTURES": folder / "pictures",
        "UNCAPTIONED": folder / "uncaptioned",
        "LORA": folder / "lora.safetensors",
    }


look_once = cache(look_at_base)


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    """Stands in for what a machine may have or not: a compiler that works, torchao, and no W&B. The bases' folders are
    looked at once, since they stay as they are through thousands of checks."""

    def load(*_, **__):
        raise Loaded

    monkeypatch.setattr(setup, "load_base", load)
    for module in (checks, footprint, settle):
        monkeypatch.setattr(module, "look_at_base", look_once)
    monkeypatch.setattr(checks, "check_compiler", lambda device: None)
    monkeypatch.setattr(checks, "check_quantizer", lambda format: None)
    monkeypatch.setattr(checks, "check_optimizer", lambda config: None)
    real = trackers.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else real(name))


def base_of(preset: str) -> dict[str, str]:
    """The tiny base of a preset's family in place of its full-size one; a demo keeps its own."""
    family = next((f for f in ("sd15", "sdxl", "sd3") if f in preset.split("-") and "demo" not in preset), None)
    return {"base.path": BUNDLED[family], "data.resolution": 64} if family else {}


def refusals(preset, output, switches) -> tuple[str | None, str | None]:
    """What the dry run and the run say to these settings; None where they go on."""
    changes = {"output": output, "data.count": 8, "base.dtype": "fp32", **base_of(preset), **switches}
    try:
        config = load_config(overrides=[f"{key}={value}" for key, value in changes.items()], preset=preset)
    except ValueError as error:  # both read their settings alike
        return str(error), str(error)
    try:
        plan(config)
        by_dry_run = None
    except (ValueError, FileNotFoundError) as error:
        by_dry_run = str(error)
    try:
        train(config)
    except Loaded:
        by_run = None
    except (ValueError, FileNotFoundError) as error:
        by_run = str(error)
    return by_dry_run, by_run


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_and_its_dry_run_refuse_the_same(preset, files, tmp_path):
    refused = 0
    for name, switches in SWITCHES.items():
        switches = {key: files.get(value, value) for key, value in switches.items()}
        by_dry_run, by_run = refusals(preset, tmp_path / name, switches)
        assert by_dry_run == by_run, name
        assert (tmp_path / name / "config.json").exists() == (by_run is None), "what is refused is not written down"
        refused += by_run is not None
    assert refused > 8
    assert refused < len(SWITCHES) or preset == "lcf-demo" or "lora.init" in PRESETS[preset].needs, "no LoRA is there"


@pytest.mark.parametrize(
    ("preset", "switches", "sentence"),
    [
        ("demo", {"train.shard": "true"}, "train.shard=true shares the frozen weights among processes, and there is"),
        (
            "demo-sd15",
            {"train.offload_activations": "true"},
            "train.offload_activations=true is for the inputs of blocks that are computed again, and none is: set",
        ),
        ("digits", {"train.offload": "true"}, "train.offload is for a frozen base, and all of a network for small"),
        ("digits", {"preview.prompts": '["a cat"]'}, "'a cat' is no prompt of digits: it knows the digits 0, 1"),
        ("demo", {"data.buckets": '["64x100"]', "data.images": "PICTURES"}, "data.buckets lists 64x100: side 100 is"),
        ("demo", {"train.trackers": "wandb"}, "train.trackers: wandb not installed: pip install wandb"),
        ("demo", {"base.prediction": "v_prediction"}, "base.prediction is 'v_prediction', but SD3 predicts the"),
    ],
)
def test_what_once_passed_the_dry_run_alone(preset, switches, sentence, files, tmp_path):
    switches = {key: files.get(value, value) for key, value in switches.items()}
    by_dry_run, by_run = refusals(preset, tmp_path / "run", switches)
    assert by_dry_run == by_run and by_run.startswith(sentence)


def test_a_single_file_without_a_tokenizer(tmp_path, monkeypatch):
    """Seen in its header, before gigabytes of it are read."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    block = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    tensors = {block: torch.zeros(8, 768), "first_stage_model.one": torch.zeros(1)}
    tensors["cond_stage_model.transformer.one"] = torch.zeros(1)
    save_file(tensors, tmp_path / "base.safetensors")
    by_dry_run, by_run = refusals("sd15-4step", tmp_path / "run", {"base.path": tmp_path / "base.safetensors"})
    assert by_dry_run == by_run and by_run.startswith("base.safetensors brings no CLIP tokenizer, and ")


def test_a_run_that_is_there_and_is_another(tmp_path, monkeypatch):
    """Changed settings, fewer updates, another product of batch and accumulation: by the newest checkpoint's facts."""
    output = tmp_path / "run"
    config = load_config(overrides=settings(output, base__path=TINY))
    facts = {"settings": config.what_decides_the_weights(), "changes": [], "samples per update": 3}
    newest = (4, facts | {"samples per process": 3})
    monkeypatch.setattr(checks, "latest_facts", lambda folder: newest)

    def refusal(accept_changes=False, **changes):
        changed = load_config(overrides=settings(output, base__path=TINY, **changes))
        with pytest.raises(ValueError) as by_dry_run:
            plan(changed, accept_changes)
        with pytest.raises(ValueError) as by_run:
            train(changed, accept_changes=accept_changes)
        assert str(by_dry_run.value) == str(by_run.value)
        return str(by_run.value)

    assert "train.lr: 0.01 then, 0.02 now" in refusal(train__lr=0.02)
    assert "has come to update 4 already" in refusal(accept_changes=True, train__steps=2)
    assert "holds a run of 3 samples an update, and these settings take 8" in refusal(train__batch_size=8)
    with pytest.raises(Loaded):
        train(load_config(overrides=settings(output, base__path=TINY, train__lr=0.02)), accept_changes=True)
    assert plan(load_config(overrides=settings(output, base__path=TINY, train__lr=0.02)), accept_changes=True)


def test_a_preset_that_refines_asks_for_its_lora(tmp_path, fails):
    said = fails(2, "train", "--preset", "refine-sd15", "base.path=tiny-sd15", f"output={tmp_path}", "--dry-run")
    assert "The preset refine-sd15 goes on from a few-step LoRA: set lora.init=FILE" in said
