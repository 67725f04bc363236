"""What is known of a GPU, and what follows from it, with torch's answers put in its mouth."""

import sys

import pytest
import torch

from phased_consistency.trainer import demo
from phased_consistency.trainer.cli.doctor import examination_text
from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.efficiency.blocks import check_compiler
from phased_consistency.trainer.families.sdxl import SDXL
from phased_consistency.trainer.lora.check import _remarks
from phased_consistency.trainer.system import machine
from phased_consistency.trainer.training import checks

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("cuda", "cuda:0", True), ("cuda:1", "cuda:0", False), ("cuda:1", "cuda", True), ("cpu", "cuda", False)],
)
def test_one_device_by_two_names(one, other, same):
    assert machine.same_device(torch.device(one), torch.device(other)) is same
    assert machine.same_device(torch.device(other), torch.device(one)) is same


def test_the_demo_is_evaluated_where_it_was_trained(monkeypatch, tmp_path):
    class Loaded(Exception):
        pass

    def load(path, device):
        raise Loaded(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(demo, "load_base", load)
    with pytest.raises(Loaded, match="cuda"):
        demo.evaluate(load_config(preset="demo"), tmp_path, 4)


@pytest.fixture
def turing(monkeypatch):
    """A card that emulates bf16, as torch tells when it is asked without emulation."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))


def test_a_card_without_bf16_is_told_so(turing):
    config = load_config(preset="sd15-4step")
    assert checks.notes_on_device(config, GPU) == [machine.NO_BF16] and "base.dtype=fp16" in machine.NO_BF16
    assert checks.notes_on_device(load_config(preset="sd15-4step", overrides=["base.dtype=fp16"]), GPU) == []
    details = machine.examine()
    assert machine.NO_BF16 not in examination_text(details)
    details["device"] = {"name": "a card", "kind": "cuda", "bf16": machine.native_bf16()}
    assert machine.NO_BF16 in examination_text(details)


def test_fp8_is_compiled_from_ada_on(turing, monkeypatch):
    config = load_config(preset="sdxl-4step", overrides=["base.quantize=fp8", "train.compile=true"])
    assert "capability 8.9 (Ada) or later, and this one has 7.5: Triton makes" in checks.fp8_problem(config, GPU)
    monkeypatch.setattr(checks, "check_compiler", lambda device: None)
    with pytest.raises(
        ValueError, match="train.compile=true, but base.quantize=fp8 needs .*Set base.quantize=int8, or"
    ):
        checks.check_prepare(config, SDXL, GPU, 1)
    assert not checks.fp8_problem(load_config(preset="sdxl-4step", overrides=["base.quantize=int8"]), GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    assert not checks.fp8_problem(config, GPU)


@pytest.mark.parametrize(("platform", "package"), [("win32", "triton-windows"), ("linux", "triton")])
def test_triton_is_called_what_it_is_installed_as(monkeypatch, platform, package):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no Triton")))
    with pytest.raises(ValueError, match=rf"no Triton. Install Triton \(pip install {package}\)"):
        check_compiler(GPU)


def test_windows_keeps_within_the_gpu(monkeypatch):
    limits = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    for platform, there, expected in (("win32", True, [0.95]), ("linux", True, []), ("win32", False, [])):
        limits.clear()
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        machine.limit_to_gpu()
        assert limits == expected


def test_cudas_memory_grows_on_linux_unless_somebody_says_otherwise(monkeypatch):
    for platform, cuda, said, expected in (
        ("linux", "13.0", {}, "expandable_segments:True"),
        ("win32", "13.0", {}, None),
        ("linux", None, {}, None),
        ("linux", "13.0", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(machine.os, "environ", said)
        machine.let_segments_grow()
        assert said.get("PYTORCH_ALLOC_CONF") == expected


def test_a_comparison_in_tf32_says_so():
    facts = {"unmatched": 0, "compared_as_sampled": False, "lost_alphas": [], "left_out": []}
    assert "TF32" in _remarks(facts | {"tf32": True}) and _remarks(facts | {"tf32": False}) == ""
