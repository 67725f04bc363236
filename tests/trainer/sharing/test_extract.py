"""Extracting a LoRA from two checkpoints: the tuned one again, and errors as measured on full differences."""

import pytest
import torch

from phased_consistency.samplers.lora_file import read_header
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.trainer.lora.check import check_parity
from phased_consistency.trainer.lora.install import installed, load_for_check
from phased_consistency.trainer.sharing.extract import extract
from phased_consistency.trainer.sharing.read import read_lora
from support.runs import TINY
from support.sharing_files import MODULES, deltas, norm, output, tuned_folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """tiny-sd15 with changes of rank 3 on six modules; returns its folder and the changes by module."""
    torch.manual_seed(3)
    changes = {}

    def change(unet):
        for module in MODULES:
            weight = unet.get_submodule(module).weight
            delta = 0.05 * torch.randn(len(weight), 3) @ torch.randn(3, weight[0].numel())
            weight += delta.view_as(weight)
            changes[f"unet.{module}"] = delta.double()

    return tuned_folder(tmp_path_factory.mktemp("tuned") / "tuned", change), changes


@torch.no_grad()
def test_the_lora_makes_the_base_the_tuned_one(tuned, tmp_path):
    folder, changes = tuned
    result = extract(TINY, str(folder), out := tmp_path / "out.safetensors", rank=3, dtype="fp32")
    assert result["error"] < 1e-5 and result["left_out"] == 0 and result["modules"] == len(MODULES)
    assert norm({n: d - changes[n] for n, d in deltas(read_lora(out)).items()}) < 1e-5 * norm(changes)
    base, other = load_for_check(TINY), load_for_check(str(folder))
    bare, meant = output(base), output(other)
    with installed(out, base):
        actual = output(base)
    assert (meant - bare).abs().max() > 1e-2
    torch.testing.assert_close(actual, meant, rtol=0, atol=1e-4)
    assert check_parity(out, base)["passed"]


def test_the_error_stated_is_that_of_the_best_rank(tuned, tmp_path):
    folder, changes = tuned
    result = extract(TINY, str(folder), out := tmp_path / "out.safetensors", rank=2)
    off = norm({n: d - changes[n] for n, d in deltas(read_lora(out)).items()}) / norm(changes)
    best = sum(torch.linalg.svdvals(d)[2:].square().sum().item() for d in changes.values()) ** 0.5 / norm(changes)
    assert result["error"] == pytest.approx(off, rel=1e-3) == pytest.approx(best, rel=1e-2)
    metadata = read_header(out).metadata
    assert metadata["ss_sd_model_name"] == TINY and metadata["ss_network_dim"] == "2" and HEADER_KEY not in metadata


def test_modules_narrower_than_the_rank_have_the_alpha_of_all(tuned, tmp_path):
    result = extract(TINY, str(tuned[0]), out := tmp_path / "out.safetensors", rank=80, dtype="fp32")
    pairs = read_lora(out, "sd15").pairs.values()
    assert min(pair.rank for pair in pairs) < 80 and {pair.alpha for pair in pairs} == {80.0}
    assert result["error"] < 1e-5 and check_parity(out, load_for_check(TINY))["passed"]


def test_changes_that_no_lora_holds_are_told(tmp_path):
    def change(unet):
        unet.conv_in.bias += 4.0  # 64 of them: norm 32
        unet.mid_block.attentions[0].proj_in.weight[0, 0] += 24.0

    other = tuned_folder(tmp_path / "other", change)
    result = extract(TINY, str(other), tmp_path / "out.safetensors", rank=1)
    assert result["modules"] == 1 and result["left_out"] == pytest.approx(0.8, abs=1e-4)
    assert "Changes in other weights, 0.8 of all by norm, are in no LoRA" in result["text"]


def test_bad_extractions_are_refused(fails, tmp_path):
    verb = ("extract", "--base", TINY, "--out", tmp_path / "out.safetensors", "--tuned")
    assert "has the weights of tiny-sd15 in every module that a LoRA can change" in fails(2, *verb, TINY)
    assert "--rank is 0; expected at least 1" in fails(2, *verb, TINY, "--rank", "0")
    assert "--dtype is 'fp8'; available: fp32, fp16, bf16" in fails(2, *verb, TINY, "--dtype", "fp8")
    assert "tiny-sd15 is SD1.5, tiny-sdxl is SDXL. Take two of one family" in fails(2, *verb, "tiny-sdxl")
    assert "No base at" in fails(2, *verb, tmp_path / "none")
