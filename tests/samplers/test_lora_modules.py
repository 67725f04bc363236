"""Modules of LoRA files by all of their parts, by the names that every adapter has, with the alphas that are theirs."""

import json

import pytest
import torch

from phased_consistency.samplers.lora_file import read_header
from phased_consistency.samplers.lora_names import split_key

NAME = "lora_unet_mid_block_attentions_0_proj_in"
PARTS = {
    "LoHa": {part: (4, 4) for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    "LoKr": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)},
    "GLoRA": {part: (4, 4) for part in ("a1.weight", "a2.weight", "b1.weight", "b2.weight")},
    "DoRA": {"lora_down.weight": (4, 8), "lora_up.weight": (8, 4), "dora_scale": (8, 1)},
    "LoCon": {"lora_down.weight": (4, 8, 1, 1), "lora_mid.weight": (4, 4, 3, 3), "lora_up.weight": (8, 4, 1, 1)},
    "OFT": {"oft_blocks": (2, 4, 4)},
    "IA3": {"weight": (8,), "on_input": ()},
    "weights": {"diff": (8, 8), "diff_b": (8,)},
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_module_is_all_of_its_tensors(write, kind):
    header = read_header(write({f"{NAME}.{part}": torch.ones(shape) for part, shape in PARTS[kind].items()}))
    module = header.modules[NAME]
    assert module.title == kind and not module.lacks and not module.is_plain and header.unmatched == []
    assert set(module.keys.values()) == set(header.tensors)


def test_what_a_module_lacks_is_known(write):
    parts = {part: shape for part, shape in PARTS["LoKr"].items() if part != "lokr_w2_b"}
    header = read_header(write({f"{NAME}.{part}": torch.ones(shape) for part, shape in parts.items()}))
    assert header.modules[NAME].lacks == ["lokr_w2"]
    header = read_header(write({f"{NAME}.lora_up.weight": torch.ones(4, 4)}))
    assert header.modules[NAME].lacks == ["down"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("unet.{m}.lora_A.default_0.weight", "down"),
        ("unet.{m}.lora_B.my-adapter.weight", "up"),
        ("{m}.lora_A", "down"),
        ("unet.{m}.lora_B.bias", "bias"),
        ("unet.{m}.lora_magnitude_vector", "magnitude"),
        ("unet.{m}.lora_magnitude_vector.default.weight", "magnitude"),
        ("lora_unet_mid_block.attentions.0.proj_in.lora_down.weight", "down"),
    ],
)
def test_names_of_every_adapter(name, part):
    assert split_key(name.format(m="mid_block.attentions.0.proj_in")) == (NAME, part)


def test_text_encoders_as_comfyui_saves_them():
    encoder = "text_encoders.{}.transformer.text_model.encoder.layers.0.mlp.fc1.alpha"
    names = [split_key(encoder.format(clip))[0] for clip in ("clip_l", "clip_g")]
    assert names == [f"lora_te{n}_text_model_encoder_layers_0_mlp_fc1" for n in (1, 2)]


# --- alphas in PEFT's own words


def with_alphas(write, config, paths=("unet.mid_block.attentions.0.proj_in",)):
    tensors = {f"{path}.lora_{half}.weight": torch.ones(4, 4) for path in paths for half in "AB"}
    return read_header(write(tensors, {"lora_adapter_metadata": json.dumps(config)}))


def test_each_component_has_its_own_alpha(write):
    paths = ("unet.mid_block.attentions.0.proj_in", "text_encoder.text_model.encoder.layers.0.mlp.fc1")
    header = with_alphas(write, {"unet.lora_alpha": 8, "text_encoder.lora_alpha": 2}, paths)
    assert header.alphas() == {NAME: 8, "lora_te_text_model_encoder_layers_0_mlp_fc1": 2}
    assert with_alphas(write, {"text_encoder.lora_alpha": 2}, paths[:1]).alphas() == {}


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("proj_in", True),
        (".*attentions.0.proj_in", True),
        ("^mid_block.*proj_in", True),
        ("mid_block", False),
        ("oj_in", False),
        ("attentions\\.(0|1)\\.proj_in", True),
    ],
)
def test_patterns_match_as_in_peft(write, pattern, matches):
    from peft.utils.other import get_pattern_key

    header = with_alphas(write, {"unet.lora_alpha": 8, "unet.alpha_pattern": {pattern: 1}})
    assert header.alphas() == {NAME: 1 if matches else 8}
    assert (get_pattern_key([pattern], "mid_block.attentions.0.proj_in") == pattern) == matches


def test_rslora_is_by_the_root_of_the_rank(write):
    assert with_alphas(write, {"unet.lora_alpha": 8, "unet.use_rslora": True}).alphas() == {NAME: 16}


@pytest.mark.parametrize("pattern", ["(a+)+b", ".*.*.*.*x", "("])
def test_patterns_that_may_never_end_are_refused(write, pattern):
    header = with_alphas(write, {"unet.lora_alpha": 8, "unet.alpha_pattern": {pattern: 1}})
    with pytest.raises(ValueError, match="its lora_adapter_metadata cannot be read .the pattern"):
        header.alphas()


def test_a_folder_of_pefts_is_a_lora(write, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    path = write(
        {f"base_model.model.mid_block.attentions.0.proj_in.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
    )
    path.rename(folder / "adapter_model.safetensors")
    assert read_header(folder).alphas() == {}
    (folder / "adapter_config.json").write_text('{"lora_alpha": 8, "alpha_pattern": {}}')
    header = read_header(folder)
    assert header.path == folder / "adapter_model.safetensors" and header.alphas() == {NAME: 8}
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json cannot be read .*Get it again, or take it away"):
        read_header(folder)


def test_lost_alphas_are_found(write):
    halves = {
        f"{name}.lora_{half}.weight": torch.ones(4, 4)
        for name in (NAME, "lora_unet_conv_in")
        for half in ("down", "up")
    }
    assert read_header(write(halves)).lost_alphas() == []
    header = read_header(write(halves | {f"{NAME}.alpha": torch.tensor(2.0)}))
    assert header.lost_alphas() == ["lora_unet_conv_in"]
    for alpha, lost in (("4", 0), ("1", 2)):
        header = read_header(write(halves, {"ss_network_dim": "4", "ss_network_alpha": alpha}))
        assert len(header.lost_alphas()) == lost
