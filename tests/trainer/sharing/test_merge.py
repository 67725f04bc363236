"""Merging and resizing LoRAs: sums and best approximations against full products, torch's SVD, and the base."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from phased_consistency.samplers import Recipe
from phased_consistency.samplers.lora_file import read_header, tensor_hash
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.trainer.families.sd3 import SD3
from phased_consistency.trainer.families.sd15 import SD15
from phased_consistency.trainer.lora.check import check_parity
from phased_consistency.trainer.lora.install import install_by_diffusers, installed, load_for_check
from phased_consistency.trainer.lora.pair import Pair
from phased_consistency.trainer.sharing.factors import (
    approximated,
    concatenated,
    energy,
    errors,
    rank_for_error,
    rounded,
)
from phased_consistency.trainer.sharing.merge import merge
from phased_consistency.trainer.sharing.pairs import MUST, settled, write_lora
from phased_consistency.trainer.sharing.read import read_lora
from phased_consistency.trainer.sharing.resize import resize
from support.runs import TINY
from support.sharing_files import MODULES, RECIPE, SD3_MODULES, deltas, kohya_file, norm, output


@pytest.fixture
def two(tiny_base, tmp_path):
    """Two LoRAs of other ranks, alphas, precisions, and modules in part."""
    first = kohya_file(tmp_path / "a.safetensors", tiny_base, MODULES[:4], rank=4, alpha=3.0, ss_seed="1")
    other = {"ss_steps": "7", "ss_seed": "2", HEADER_KEY: RECIPE.to_header()}
    second = kohya_file(tmp_path / "b.safetensors", tiny_base, MODULES[2:], rank=6, alpha=6.0, **other)
    return first, second


def added(*terms):
    """Sum of (strength, deltas)."""
    total = {}
    for strength, deltas_of_one in terms:
        for name, delta in deltas_of_one.items():
            total[name] = total.get(name, 0) + strength * delta
    return total


def distance(a, b):
    return norm({name: a[name] - b[name] for name in a.keys() | b.keys()}) / norm(a)


def test_a_merge_is_the_sum_of_what_they_add(two, tmp_path):
    (first, second), out = two, tmp_path / "out.safetensors"
    result = merge([(first, 0.7), (second, -0.4)], out)
    meant = added((0.7, deltas(read_lora(first))), (-0.4, deltas(read_lora(second))))
    assert distance(meant, deltas(read_lora(out))) < 1e-6 and result["error"] < 1e-6
    ranks = {name: pair.rank for name, pair in read_lora(out).pairs.items()}
    assert sorted(ranks.values()) == [4, 4, 6, 6, 10, 10] and result["modules"] == len(MODULES)
    metadata = read_header(out).metadata
    assert metadata["ss_steps"] == "7" and "ss_seed" not in metadata, "only what they agree in"
    assert (
        metadata["modelspec.merged_from"] == "a.safetensors, b.safetensors" and metadata["ss_network_dim"] == "Dynamic"
    )
    assert metadata["sshs_model_hash"] == tensor_hash(out)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_files_in_8_bits_are_computed_with_in_16(two, kind, tmp_path):
    """torch has no common precision of 8 bits and another."""
    (first, second), out = two, tmp_path / "out.safetensors"
    save_file({n: t.to(kind) for n, t in load_file(first).items()}, first, read_header(first).metadata)
    for other in (second, first):
        assert merge([(first, 0.7), (other, -0.4)], out, overwrite=True)["error"] < 1e-3, "8 bits would be off by 0.03"
        meant = added((0.7, deltas(read_lora(first))), (-0.4, deltas(read_lora(other))))
        assert distance(meant, deltas(read_lora(out))) < 1e-3
    assert {t.dtype for n, t in load_file(out).items() if "alpha" not in n} == {torch.float16}
    assert resize(first, out, rank=3, overwrite=True)["error"] < 0.6


@torch.no_grad()
def test_the_base_does_the_same_with_the_merged_one(two, tmp_path):
    (first, second), out = two, tmp_path / "out.safetensors"
    merge([(first, 0.7), (second, None)], out)
    base = load_for_check(TINY)
    bare = output(base)
    for name, file in (("a", first), ("b", second)):
        install_by_diffusers(file, base, name)
    base.network.set_adapters(["a", "b"], weights=[0.7, 1.0])
    both = output(base)
    base.network.delete_adapters(["a", "b"])
    with installed(out, base):
        merged = output(base)
    assert (both - bare).abs().max() > 1e-2
    torch.testing.assert_close(merged, both, rtol=0, atol=1e-5)
    assert check_parity(out, base)["passed"]


def test_equal_scales_leave_the_factors_bit_for_bit(tiny_base, tmp_path):
    files = [
        kohya_file(tmp_path / f"{n}.safetensors", tiny_base, rank=r, alpha=r / 2.0) for n, r in (("a", 2), ("b", 4))
    ]
    merge([(file, 1.0) for file in files], out := tmp_path / "out.safetensors")
    actual, a, b = load_file(out), *map(load_file, files)
    for name in a:
        if name.endswith("lora_down.weight"):
            assert torch.equal(actual[name], torch.cat([a[name], b[name]]))
        elif name.endswith("lora_up.weight"):
            assert torch.equal(actual[name], torch.cat([a[name], b[name]], 1))
        else:
            assert actual[name] == 3


def test_a_merge_of_lower_rank_is_the_truncated_svd_of_the_sum(two, tmp_path):
    (first, second), out = two, tmp_path / "out.safetensors"
    result = merge([(first, 1.0), (second, 0.5)], out, rank=5)
    meant = added((1.0, deltas(read_lora(first))), (0.5, deltas(read_lora(second))))
    actual = deltas(read_lora(out))
    best = {n: torch.linalg.svdvals(d)[5:].square().sum() for n, d in meant.items()}
    assert result["error"] == pytest.approx(distance(meant, actual), rel=1e-4)
    assert result["error"] == pytest.approx((sum(best.values()).item() ** 0.5) / norm(meant), rel=1e-4)
    assert {pair.rank for pair in read_lora(out).pairs.values()} == {4, 5}


def test_factors_at_the_end_of_fp16_are_not_lost(tiny_base, tmp_path):
    """B starts at zero: of a module that learnt little it is below fp16's normal numbers, where 0.7 of it is coarse."""
    files = []
    for name in "ab":
        files.append(kohya_file(tmp_path / f"{name}.safetensors", tiny_base, dtype=torch.float16))
        small = {k: (1e-5 * t if "lora_up" in k else t) for k, t in load_file(files[-1]).items()}
        save_file(small, files[-1], read_header(files[-1]).metadata)
    assert merge([(files[0], 0.7), (files[1], 0.3)], tmp_path / "out.safetensors")["worst_error"] < 1e-3


def test_recipes_that_agree_are_kept_for_strength_1(tiny_base, tmp_path):
    weak = replace(RECIPE, strength=0.5, base_name="one")
    a = kohya_file(tmp_path / "a.safetensors", tiny_base, **{HEADER_KEY: weak.to_header()})
    b = kohya_file(tmp_path / "b.safetensors", tiny_base)
    merge([(a, None), (b, None)], out := tmp_path / "out.safetensors")
    assert distance(added((0.5, deltas(read_lora(a))), (1, deltas(read_lora(b)))), deltas(read_lora(out))) < 1e-6
    assert read_lora(out).recipe == replace(RECIPE, source="header")
    c = kohya_file(tmp_path / "c.safetensors", tiny_base, **{HEADER_KEY: Recipe(family="sd15", phases=8).to_header()})
    result = merge([(a, None), (c, None)], out, overwrite=True, family="sd15")
    assert "They have different recipes: none is kept" in result["text"] and HEADER_KEY not in read_header(out).metadata


def test_what_modelspec_demands_is_there_where_the_parts_differ(tiny_base, tmp_path):
    entries = {key: "1.0.1" for key in MUST} | {"modelspec.architecture": "stable-diffusion-v1/lora"}
    a, b = (
        kohya_file(
            tmp_path / f"{side}.safetensors", tiny_base, **entries | {"modelspec.resolution": side, "ss_seed": side}
        )
        for side in ("512x512", "768x768")
    )
    merge([(a, 1.0), (b, 1.0)], out := tmp_path / "out.safetensors")
    merged = read_header(out).metadata
    assert {key: merged[key] for key in MUST} == entries | {"modelspec.resolution": "512x512", "modelspec.title": "out"}
    assert "ss_seed" not in merged


def test_merging_what_does_not_belong_together_is_refused(two, tiny_base, tmp_path, fails):
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="1 LoRA is not merged with anything"):
        merge([(two[0], 1.0)], out)
    xl = kohya_file(tmp_path / "xl.safetensors", tiny_base, **{HEADER_KEY: Recipe(family="sdxl").to_header()})
    with pytest.raises(ValueError, match="a.safetensors is a LoRA for SD1.5, xl.safetensors for SDXL. Merge those of"):
        merge([(two[0], 1.0), (xl, 1.0)], out)
    with pytest.raises(ValueError, match="a.safetensors has strength 0"):
        merge([(two[0], 0.0), (two[1], 1.0)], out)
    with pytest.raises(ValueError, match=r"--rank is 10; expected 1 to 9, as the modules have ranks up to 10"):
        merge([(two[0], 1.0), (two[1], 1.0)], out, rank=10)
    assert "is a file that is read, and is never written over" in fails(
        2, "merge", *two, "--out", two[1], "--overwrite"
    )
    assert "The strength of a.safetensors is 'x'; expected a number" in fails(
        2, "merge", "a.safetensors:x", "--out", out
    )
    assert not out.exists()


def test_modules_of_other_shapes_are_named(two, tiny_base, tmp_path):
    narrow = kohya_file(tmp_path / "narrow.safetensors", tiny_base, MODULES[:1])
    data = load_file(narrow)
    key = next(k for k in data if k.endswith("up.weight"))
    save_file(data | {key: data[key][:-1].contiguous()}, narrow, read_header(narrow).metadata)
    with pytest.raises(ValueError, match="unet.down_blocks.0.resnets.0.conv1 is of shapes .*narrow.safetensors is for"):
        merge([(two[0], 1.0), (narrow, 1.0)], tmp_path / "out.safetensors")


def test_sd3s_merge_has_its_alphas_worked_in(tiny_base, tmp_path):
    """And strengths below 0 with them: its files have no alpha."""
    files = []
    for name, alpha in (("a", 2.0), ("b", 8.0)):
        tensors = {}
        for module in SD3_MODULES[: 2 if alpha == 2 else 3]:
            key = "lora_transformer_" + module.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": torch.randn(4, 6), f"{key}.lora_up.weight": torch.randn(8, 4)}
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        files.append(tmp_path / f"{name}.safetensors")
        save_file(tensors, files[-1])
    result = merge([(files[0], 1.0), (files[1], -0.5)], out := tmp_path / "out.safetensors", family="sd3")
    meant = added(*((s, deltas(read_lora(f, "sd3"))) for s, f in zip((1.0, -0.5), files, strict=True)))
    assert distance(meant, deltas(read_lora(out, "sd3"))) < 1e-6 and result["error"] < 1e-6
    assert set(load_file(out)) == {f"transformer.{m}.lora_{half}.weight" for m in SD3_MODULES for half in "AB"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_error_stated_is_that_of_the_file(tiny_base, tmp_path, dtype):
    file = kohya_file(tmp_path / "a.safetensors", tiny_base, rank=8, alpha=3.0, dtype=dtype)
    result = resize(file, out := tmp_path / "out.safetensors", rank=3)
    meant, actual = deltas(read_lora(file)), deltas(read_lora(out))
    each = {name: distance({name: meant[name]}, {name: actual[name]}) for name in meant}
    assert result["error"] == pytest.approx(distance(meant, actual), rel=1e-6)
    assert result["worst_module"] == max(each, key=each.get)
    assert result["worst_error"] == pytest.approx(max(each.values()), rel=1e-6)
    best = sum(torch.linalg.svdvals(d)[3:].square().sum().item() for d in meant.values()) ** 0.5 / norm(meant)
    assert result["error"] == pytest.approx(best, rel=1e-3)
    assert (result["rank_before"], result["rank"]) == (8, 3)
    assert {t.dtype for t in load_file(out).values()} == {dtype}
    assert read_header(out).metadata[HEADER_KEY] == RECIPE.to_header()
    assert check_parity(out, load_for_check(TINY))["passed"]


def test_the_least_ranks_for_an_error(tiny_base, tmp_path):
    file = kohya_file(tmp_path / "a.safetensors", tiny_base, rank=8)
    resize(file, out := tmp_path / "out.safetensors", error=0.4)
    lora = read_lora(out)
    for name, delta in deltas(read_lora(file)).items():
        values = torch.linalg.svdvals(delta)
        rest = lambda rank, v=values: (v[rank:].norm() / v.norm()).item()  # noqa: E731
        assert rest(lora.pairs[name].rank) <= 0.4 < rest(lora.pairs[name].rank - 1)


def test_a_lora_of_low_rank_in_truth_loses_nothing(tiny_base, tmp_path):
    file = kohya_file(tmp_path / "a.safetensors", tiny_base, rank=3, alpha=3.0)
    merge([(file, 1.0), (file, 1.0)], double := tmp_path / "double.safetensors")
    result = resize(double, out := tmp_path / "out.safetensors", error=1e-3)
    assert {pair.rank for pair in read_lora(out).pairs.values()} == {3} and result["error"] < 1e-6


def test_modules_at_or_below_the_rank_stay_bit_for_bit(tiny_base, tmp_path):
    both = {}
    for rank, modules in ((3, MODULES[:3]), (8, MODULES[3:])):
        part = kohya_file(tmp_path / "part.safetensors", tiny_base, modules, rank=rank, alpha=2.0)
        both |= load_file(part)
    save_file(both, tmp_path / "both.safetensors", read_header(part).metadata)
    resize(tmp_path / "both.safetensors", out := tmp_path / "out.safetensors", rank=5)
    stored = load_file(out)
    changed = {name for name in both if not torch.equal(both[name], stored[name])}
    halves = ("lora_down.weight", "lora_up.weight")
    assert changed == {f"lora_unet_{m.replace('.', '_')}.{half}" for m in MODULES[3:] for half in halves}
    assert check_parity(out, load_for_check(TINY))["passed"]


def test_bad_resizes_are_refused(two, tmp_path, fails):
    out = tmp_path / "out.safetensors"
    assert "--rank is 4; expected 1 to 3, as the modules have ranks up to 4" in fails(
        2, "resize", two[0], "--rank", "4", "--out", out
    )
    assert "Give one of --rank and --error" in fails(2, "resize", two[0], "--out", out)
    assert "--error is 1.5; expected a share between 0 and 1" in fails(2, "resize", two[0], "--error=1.5", "--out", out)


def test_the_verbs(pcm, two, tmp_path):
    out, small = tmp_path / "out.safetensors", tmp_path / "small.safetensors"
    report = json.loads(pcm("merge", f"{two[0]}:0.5", two[1], "--out", out, "--json").out)
    assert [each["strength"] for each in report["merged"]] == [0.5, 1.0] and report["error"] < 1e-6
    text = pcm("resize", out, "--rank", "4", "--out", small).out
    assert "ranks up to 10 to ranks up to 4, 40 to 24 in all; relative error 0." in text


@pytest.mark.parametrize(
    "use",
    [
        lambda pair, out: concatenated([pair]),
        lambda pair, out: concatenated([replace(pair, magnitude=None), pair]),
        lambda pair, out: approximated(pair, len),
        lambda pair, out: errors({"a": [pair]}, {"a": pair}),
        lambda pair, out: write_lora(out, SD15, {"unet.conv_in": pair}, {}),
        lambda pair, out: write_lora(out, SD3, {"a": rounded(pair, torch.float16)}, {}),
        lambda pair, out: write_lora(out, SD3, settled({"a": pair}, SD3), {}, style="kohya"),
        lambda pair, out: write_lora(out, SD3, {"a": pair.without_unused_ranks()}, {}),
    ],
)
def test_magnitudes_are_never_lost_on_the_way(use, tmp_path):
    """No verb here reads a DoRA; whatever else brings one is told so."""
    up = torch.randn(5, 3) * torch.tensor([1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="A DoRA's magnitudes are in no sum of factors"):
        use(Pair(torch.randn(3, 4), up, 2.0, torch.ones(5)), tmp_path / "out.safetensors")
    assert not any(tmp_path.iterdir())


def test_closed_forms():
    """diag(3, 2, 1): rank 2 leaves 1 of sqrt(14); three quarters of the energy take 3^2 + 2^2 of 14."""
    pair = Pair(torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.eye(3), 3.0)
    assert energy([pair]) == pytest.approx(14)
    lower = approximated(pair, lambda _: 2)
    assert errors({"m": [pair]}, {"m": lower})["error"] == pytest.approx(14**-0.5)
    torch.testing.assert_close(lower.up @ lower.down, torch.diag(torch.tensor([3.0, 2.0, 0.0])).double())
    values = torch.tensor([3.0, 2.0, 1.0])
    assert [rank_for_error(values, error) for error in (0.2, 14**-0.5 + 1e-6, 0.7, 0.99)] == [3, 2, 1, 1]
    negative = concatenated([pair, replace(pair, alpha=-3.0)])
    assert energy([negative]) == pytest.approx(0, abs=1e-6)
