"""Checking SD3 LoRAs and sampling with them, as `pcm check` and `pcm sample` do."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from phased_consistency.samplers import Recipe
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.trainer.families.sd3 import SD3
from phased_consistency.trainer.inference.sample import sample_grid
from phased_consistency.trainer.lora.check import check_parity
from phased_consistency.trainer.lora.install import load_for_check, load_for_sample
from phased_consistency.trainer.tiny.bundled import bundled_folder
from support.bases import make_sdxl_folder
from support.ldm_checkpoint import save_single_file
from support.runs import TINY
from support.sd3_base import make_sd3_folder

RECIPE = Recipe(family="sd3", points=100, phases=4, prediction="flow", shift=1.0)
TINY_FOLDER = str(bundled_folder(TINY))
MODULES = ("transformer_blocks.0.attn.add_k_proj", "transformer_blocks.3.norm1_context.linear", "pos_embed.proj")


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory):
    path = tmp_path_factory.mktemp("sd3")
    make_sd3_folder(path, tiny_base.tokenizers[0])
    return path


@pytest.fixture(scope="module")
def lora(folder):
    """A LoRA on three kinds of module whose header says shift 1, which is not the base's."""
    network, tensors = SD3.load(str(folder), t5=False).network, {}
    torch.manual_seed(1)
    for module in MODULES:
        weight = network.get_submodule(module).weight
        tensors[f"transformer.{module}.lora_A.weight"] = 0.3 * torch.randn(2, *weight.shape[1:])
        up = (weight.shape[0], 2, *(1,) * (weight.ndim - 2))
        tensors[f"transformer.{module}.lora_B.weight"] = 0.3 * torch.randn(up)
    save_file(tensors, folder / "lora.safetensors", {HEADER_KEY: RECIPE.to_header()})
    return folder / "lora.safetensors"


def grid(base, lora, out, **changes):
    usual = {"guidance": None, "negative": None, "strength": 1.0, "gamma": None, "seed": 0, "resolution": 32}
    return sample_grid(base, ["a red star"], out, lora, [4], **usual | changes)


def test_an_sd3_lora_is_the_same_by_diffusers_and_by_hand(lora, folder):
    base = load_for_check(str(folder))
    assert len(base.text_encoders) == 2, "T5 is not needed"
    result = check_parity(lora, base)
    assert result["passed"] and result["text"].startswith("OK: 0 keys unmatched of 3 modules, 0 not loaded")
    assert result["max_difference"] < 1e-3 * result["max_effect"]


def test_a_module_that_this_sd3_has_not_is_named(lora, folder, tmp_path):
    tensors = {k.replace("blocks.3", "blocks.7"): v for k, v in load_file(lora).items()}
    save_file(tensors, tmp_path / "other.safetensors")
    result = check_parity(tmp_path / "other.safetensors", load_for_check(str(folder)))
    assert not result["passed"] and result["unmatched_names"] == [
        "lora_transformer_transformer_blocks_7_norm1_context_linear"
    ]


def test_sampling_follows_the_recipe(lora, folder, tmp_path):
    base = load_for_sample(str(folder), "fp32", lora)
    assert base.schedule.shift == 1.0 and len(base.text_encoders) == 3
    details = grid(base, lora, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000 and not details["warnings"]
    assert details["rows"] == [{"steps": 4, "guidance": 1.0, "gamma": 0.0, "ticks": (1000, 750, 500, 250, 0)}]


def test_a_shift_without_a_recipe_is_the_bases(folder):
    assert load_for_sample(str(folder), "fp32", None, t5=False).schedule.shift == 3.0


def test_a_recipe_of_another_family_tells_the_base_nothing(folder, lora, tmp_path):
    other = replace(RECIPE, family="sd15", prediction="v_prediction", shift=None).to_header()
    save_file(load_file(lora), tmp_path / "other.safetensors", {HEADER_KEY: other})
    assert load_for_sample(str(folder), "fp32", tmp_path / "other.safetensors", t5=False).schedule.shift == 3.0


def test_no_negative_prompt_is_what_the_base_has_for_none(folder, tmp_path):
    base = SD3.load(str(folder), t5=False, null="zeros")
    pictures = {}
    for name, negative in (("default", None), ("empty", ""), ("words", "a blue square")):
        grid(base, None, tmp_path / f"{name}.png", guidance=4.0, negative=negative)
        pictures[name] = (tmp_path / f"{name}.png").read_bytes()
    assert len(set(pictures.values())) == 3


def tiny_lora(path, module="mid_block_resnets_0_conv1", **recipe):
    """A LoRA of tiny-sd15's base that does something, on one module of 32 to 32 channels."""
    named = f"lora_unet_{module}"
    shape = bundled_shape(module)
    down, up = torch.randn(1, *shape[1:]), torch.randn(shape[0], 1, *(1,) * (len(shape) - 2))
    header = {HEADER_KEY: Recipe(family="sd15", **recipe).to_header()} if recipe else {}
    save_file({f"{named}.lora_down.weight": down, f"{named}.lora_up.weight": up}, path, header)
    return path


def bundled_shape(module):
    with safe_open(next((bundled_folder(TINY) / "unet").glob("*.safetensors")), "pt") as file:
        names = {name.replace(".", "_"): name for name in file.keys()}  # noqa: SIM118
        return file.get_slice(names[f"{module}_weight"]).get_shape()


def test_a_base_is_taken_to_be_what_the_loras_base_was(tiny_base, tmp_path):
    lora = tiny_lora(tmp_path / "v.safetensors", prediction="v_prediction", zero_terminal_snr=True)
    parts = {"unet": tiny_base.network, "text_encoder": tiny_base.text_encoders[0]}
    file = save_single_file(tmp_path / "base.safetensors", **parts)
    options = {"config": TINY_FOLDER, "parts": TINY, "family": "sd15"}
    base = load_for_sample(str(file), "fp32", lora, **options)
    assert base.prediction == "v_prediction" and base.zero_terminal_snr
    assert load_for_sample(str(file), "fp32", None, **options).prediction == "epsilon"
    folder = load_for_sample(TINY, "fp32", lora)
    assert folder.prediction == "v_prediction" and folder.zero_terminal_snr, "its epsilon binds nobody"


def test_a_recipe_of_epsilon_tells_nothing_and_a_mismatch_is_warned_of(tiny_base, tmp_path):
    lora = tiny_lora(tmp_path / "eps.safetensors", prediction="epsilon")
    parts = {"unet": tiny_base.network, "text_encoder": tiny_base.text_encoders[0]}
    file = save_single_file(tmp_path / "base.safetensors", **parts, markers=("v_pred",))
    options = {"config": TINY_FOLDER, "parts": TINY, "family": "sd15"}
    base = load_for_sample(str(file), "fp32", lora, **options)
    assert base.prediction == "v_prediction"
    warnings = grid(base, lora, tmp_path / "v.png")["warnings"]
    assert "made for a base that predicts epsilon; base.safetensors predicts v_prediction" in warnings[0]
    warnings = grid(load_for_sample(TINY, "fp32", lora), lora, tmp_path / "eps.png")["warnings"]
    assert not any("predicts" in warning for warning in warnings)


def test_the_recipes_strength_is_what_it_is_sampled_at(pcm, tmp_path):
    def draw(lora, *options):
        size = ("--steps", "1", "--resolution", "32")
        out = ("--out", tmp_path / "g.png", "--json")
        run = pcm("sample", "--base", TINY, "--lora", lora, "--prompt", "a red star", *size, *out, *options)
        return json.loads(run.out)["strength"], (tmp_path / "g.png").read_bytes()

    weak = tiny_lora(tmp_path / "weak.safetensors", strength=0.25)
    assert draw(weak) == draw(weak, "--strength", "0.25") != draw(weak, "--strength", "1")
    assert draw(weak)[0] == 0.25
    assert draw(weak, "--strength", "0")[0] == 0, "which is none, and not the recipe's"
    assert draw(tiny_lora(tmp_path / "plain.safetensors"))[0] == 1


@pytest.fixture(scope="module")
def sdxl(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    make_sdxl_folder(folder, tiny_base.tokenizers[0])
    return folder


def test_names_of_the_original_layout_are_compared_by_hand(sdxl, tmp_path):
    """kohya's SDXL: its middle_block.1 is diffusers' mid_block.attentions.0."""
    base, tensors = load_for_check(str(sdxl)), {}
    inside = "transformer_blocks.0.attn1.to_q"
    out, width = base.network.get_submodule(f"mid_block.attentions.0.{inside}").weight.shape
    name = f"lora_unet_middle_block_1_{inside.replace('.', '_')}"
    tensors = {"lora_down.weight": torch.randn(2, width), "lora_up.weight": torch.randn(out, 2)}
    tensors["alpha"] = torch.tensor(2.0)
    save_file({f"{name}.{part}": t for part, t in tensors.items()}, tmp_path / "kohya.safetensors")
    result = check_parity(tmp_path / "kohya.safetensors", base)
    assert result["passed"] and result["max_effect"] > 0, result["text"]
    assert result["text"].startswith("OK: 0 keys unmatched of 1 modules, 0 not loaded by diffusers, max output")
