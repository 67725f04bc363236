"""Whatever a LoRA file calls its modules, the trainer's verbs put the same into the network as `pcm convert` reads."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

from phased_consistency.samplers.lora_alphas import PEFT_KEY
from phased_consistency.samplers.lora_file import read_header
from phased_consistency.trainer.families.sd3 import SD3
from phased_consistency.trainer.lora.check import check_parity
from phased_consistency.trainer.lora.install import ADAPTER, install, install_by_diffusers, installed, load_for_check
from phased_consistency.trainer.sharing.convert import convert
from phased_consistency.trainer.sharing.read import read_lora
from phased_consistency.trainer.sharing.resize import resize
from support.bases import make_speck
from support.ldm_checkpoint import ldm_unet
from support.runs import TINY
from support.sharing_files import MODULES, deltas, kohya_file, pair_of

RANK, ALPHA = 4, 2.0
ENCODER = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"


def with_dots(module: str, _) -> dict[str, str]:
    """kohya's prefix before diffusers' own dots."""
    return named(f"lora_unet_{module}", "lora_down", "lora_up")


def half_dotted(module: str, _) -> dict[str, str]:
    block, _, layer = module.rpartition(".")
    return named(f"lora_unet_{block.replace('.', '_')}.{layer}", "lora_down", "lora_up")


def default_0(module: str, _) -> dict[str, str]:
    """PEFT's style with the adapter's own name."""
    return {part: f"unet.{module}.{half}.default_0.weight" for part, half in (("down", "lora_A"), ("up", "lora_B"))}


def saved_by_comfyui(module: str, original: dict[str, str]) -> dict[str, str]:
    return named(f"diffusion_model.{original[module]}", "lora_down", "lora_up")


def kohyas_original(module: str, original: dict[str, str]) -> dict[str, str]:
    return named(f"lora_unet_{original[module].replace('.', '_')}", "lora_down", "lora_up")


def named(module: str, down: str, up: str) -> dict[str, str]:
    return {"down": f"{module}.{down}.weight", "up": f"{module}.{up}.weight", "alpha": f"{module}.alpha"}


def in_style(lora, style: Callable[[str, dict[str, str]], dict[str, str]], base) -> dict[str, torch.Tensor]:
    """The tensors of a file of `kohya_file` under the names of a style."""
    names = zip(base.network.state_dict(), ldm_unet(base.network), strict=True)
    originals = {name.removesuffix(".weight"): original.removesuffix(".weight") for name, original in names}
    tensors, renamed = load_file(lora), {}
    for module in MODULES:
        keys = style(module, originals)
        old = named("lora_unet_" + module.replace(".", "_"), "lora_down", "lora_up")
        renamed |= {keys[part]: tensors[old[part]] for part in keys}
    return renamed


def added(base) -> dict[str, torch.Tensor]:
    """What the adapter adds to each weight of the base's network."""
    layers = {n: m for n, m in base.network.named_modules() if ADAPTER in getattr(m, "lora_A", ())}
    return {f"{base.component}.{n}": m.get_delta_weight(ADAPTER).flatten(1).double() for n, m in layers.items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-7) for name in one)


@pytest.fixture
def bare_base():
    """tiny-sd15 for one LoRA: PEFT leaves its wrappers."""
    return load_for_check(TINY)


@pytest.mark.parametrize("style", [with_dots, half_dotted, default_0, saved_by_comfyui, kohyas_original])
def test_what_convert_reads_sample_reads(style, bare_base, tmp_path):
    lora = kohya_file(tmp_path / "kohya.safetensors", bare_base, rank=RANK, alpha=ALPHA)
    config = {PEFT_KEY: json.dumps({"unet.r": RANK, "unet.lora_alpha": ALPHA})} if style is default_0 else {}
    save_file(in_style(lora, style, bare_base), path := tmp_path / "styled.safetensors", config)
    want = deltas(read_lora(lora))
    with installed(path, bare_base), torch.no_grad():
        assert same(added(bare_base), want)
    if style not in (saved_by_comfyui, kohyas_original):  # numbered as in the real SD1.5, which has more layers
        convert(path, out := tmp_path / "out.safetensors", "kohya", family="sd15")
        assert same(deltas(read_lora(out)), want)
    result = check_parity(path, load_for_check(TINY))
    assert result["passed"] and result["max_effect"] > 0, result["text"]


def test_names_that_diffusers_does_not_know_are_said(bare_base, tmp_path):
    lora = kohya_file(tmp_path / "kohya.safetensors", bare_base)
    save_file(in_style(lora, half_dotted, bare_base), path := tmp_path / "styled.safetensors")
    result = check_parity(path, load_for_check(TINY))
    assert result["not_loaded_by_diffusers"] == len(MODULES)
    assert "compared as pcm sample loads it; for diffusers, write it with pcm convert" in result["text"]


def test_a_comfyui_saved_file_keeps_its_text_encoder_in_convert(bare_base, tmp_path):
    lora = kohya_file(tmp_path / "kohya.safetensors", bare_base)
    encoder = {f"{ENCODER}.lora_down.weight": torch.ones(4, 64), f"{ENCODER}.lora_up.weight": torch.ones(256, 4)}
    encoder[f"{ENCODER}.alpha"] = torch.tensor(4.0)
    save_file(in_style(lora, saved_by_comfyui, bare_base) | encoder, path := tmp_path / "comfy.safetensors")
    convert(path, out := tmp_path / "out.safetensors", "kohya", family="sd15")
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1" in read_lora(out).pairs


def test_ranks_that_differ_have_each_its_own_scale(bare_base, tmp_path):
    """diffusers takes the most frequent rank for the alpha of all."""
    tensors = {}
    for rank, module in enumerate(MODULES, 2):
        down, up = pair_of(bare_base.network.get_submodule(module).weight, rank)
        tensors |= {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}
    save_file(tensors, path := tmp_path / "ranks.safetensors")
    with installed(path, bare_base), torch.no_grad():
        assert same(added(bare_base), deltas(read_lora(path, "sd15")))


def test_the_strength_is_of_the_right_scale(bare_base, tmp_path):
    lora = kohya_file(tmp_path / "kohya.safetensors", bare_base)
    with installed(lora, bare_base, 0.5), torch.no_grad():
        assert same(added(bare_base), {name: 0.5 * delta for name, delta in deltas(read_lora(lora)).items()})


def test_sd3_in_kohyas_style_is_sampled(tmp_path):
    make_speck(tmp_path / "base", "sd3")
    base, tensors = SD3.load(str(tmp_path / "base")), {}
    for module in ("transformer_blocks.0.attn.add_k_proj", "transformer_blocks.1.norm1_context.linear"):
        down, up = pair_of(base.network.get_submodule(module).weight, 2)
        tensors |= {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
    save_file(tensors, lora := tmp_path / "lora.safetensors")
    convert(lora, kohya := tmp_path / "kohya.safetensors", "kohya", family="sd3")
    with installed(kohya, base), torch.no_grad():
        assert same(added(base), deltas(read_lora(lora, "sd3")))
    assert check_parity(kohya, base)["passed"]


def test_one_layer_under_two_names_is_refused(bare_base, tmp_path):
    lora = kohya_file(tmp_path / "kohya.safetensors", bare_base)
    both = load_file(lora) | in_style(lora, kohyas_original, bare_base)
    save_file(both, path := tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match=r"both.safetensors has .* under two names, lora_unet_.* Get it again"):
        install(read_header(path), bare_base, ADAPTER)


def test_integers_are_refused_in_every_verb(bare_base, fails, tmp_path):
    lora = kohya_file(tmp_path / "kohya.safetensors", bare_base)
    whole = {name: t.to(torch.int8) if "weight" in name else t for name, t in load_file(lora).items()}
    save_file(whole, path := tmp_path / "int8.safetensors", read_header(lora).metadata)
    for run in (
        ("check", path, "--base", TINY),
        ("sample", "--base", TINY, "--lora", path, "--prompt", "x", "--out", tmp_path / "x.png"),
        ("convert", path, tmp_path / "out.safetensors", "--to", "diffusers"),
        ("merge", path, lora, "--out", tmp_path / "out.safetensors"),
        ("resize", path, "--rank", "2", "--out", tmp_path / "out.safetensors"),
        ("train", "--preset", "demo-sd15", f"lora.init={path}", f"output={tmp_path / 'run'}", "--dry-run"),
    ):
        assert "int8.safetensors stores 6 of its 6 modules as integers, such as lora_unet_" in fails(2, *run)


def test_diffusers_own_reading_stays_what_is_compared(bare_base, tmp_path):
    """Where alphas differ, it takes a wrong one for the attention layers, and `pcm check` says so."""
    lora = kohya_file(tmp_path / "kohya.safetensors", bare_base)
    first = "lora_unet_" + MODULES[2].replace(".", "_") + ".alpha"
    save_file(load_file(lora) | {first: torch.tensor(200.0)}, path := tmp_path / "mixed.safetensors")
    base = load_for_check(TINY)
    _, missing = install_by_diffusers(path, base, ADAPTER)
    wrong = added(base)
    base.network.delete_adapters(ADAPTER)
    install(read_header(path), base, ADAPTER)
    assert missing == 0 and same(added(base), deltas(read_lora(path, "sd15"))) != same(wrong, added(base))


def test_what_was_left_out_is_said_once(bare_base, tmp_path):
    lora = kohya_file(tmp_path / "kohya.safetensors", bare_base)
    save_file(load_file(lora) | {"bundle_emb.x": torch.ones(2)}, path := tmp_path / "more.safetensors")
    said = resize(path, tmp_path / "out.safetensors", rank=2, family="sd15")["text"]
    assert said.count("1 tensors that are no LoRA's left out") == 1
