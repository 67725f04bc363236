"""What a LoRA file tells of itself in sentences, from its header and its alphas."""

import pytest
import torch
from safetensors.torch import save_file

from phased_consistency.samplers import Recipe
from phased_consistency.samplers.lora_file import read_header
from phased_consistency.samplers.lora_info import NO_ALPHA, facts, noted, sentences
from phased_consistency.samplers.recipe import HEADER_KEY

NAMES = [f"lora_unet_down_blocks_{i}_attentions_0_transformer_blocks_0_attn2_to_k" for i in range(6)]


def written(path, ranks, alphas, metadata=None, dtype=torch.float32):
    """A LoRA with a module for each rank; alpha None is absent."""
    tensors = {}
    for name, rank, alpha in zip(NAMES, ranks, alphas, strict=False):
        tensors[f"{name}.lora_down.weight"] = torch.zeros(rank, 768)
        tensors[f"{name}.lora_up.weight"] = torch.zeros(8, rank)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.as_tensor(alpha, dtype=dtype)
    save_file(tensors, path, metadata)
    return read_header(path)


def test_a_file_with_a_recipe(tmp_path):
    recipe = Recipe(family="sd15", phases=4)
    header = written(tmp_path / "a.safetensors", (4, 4), (2.0, 2.0), {HEADER_KEY: recipe.to_header()})
    assert sentences(facts(header)) == [
        "SD1.5 PCM LoRA, 2 modules, 0.0 MB.",
        recipe.usage_hint(),
        "Recipe from the file's header.",
        "Rank 4; alpha 2; stored as F32.",
    ]


def test_a_known_file_and_one_that_is_not(tmp_path):
    known = sentences(facts(written(tmp_path / "lcm-lora-sdv1-5.safetensors", (4,), (4.0,))))
    assert known[0].startswith("SD1.5 LCM LoRA") and known[2] == "Recipe from the table of known files."
    other = sentences(facts(written(tmp_path / "style.safetensors", (4,), (4.0,))))
    assert other[0].startswith("SD1.5 LoRA, 1 module,") and other[1].startswith("No recipe in the header")


def test_a_recipe_of_unknown_method_claims_none(tmp_path):
    recipe_header = Recipe(family="sd15", objective="unknown").to_header()
    header = written(tmp_path / "a.safetensors", (4,), (4.0,), {HEADER_KEY: recipe_header})
    assert sentences(facts(header))[0].startswith("SD1.5 LoRA, ")


def test_several_ranks_and_alphas_the_most_frequent_first(tmp_path):
    header = written(tmp_path / "a.safetensors", (8, 4, 4, 4), (1.0, 2.0, 2.0, None))
    assert facts(header)["alphas"] == {"1": 1, "2": 2, NO_ALPHA: 1}
    assert sentences(facts(header))[-1] == (
        "Rank 4 (3), 8 (1); alpha 2 (2), 1 (1), none (strength 1) (1); stored as F32."
    )
    many = written(tmp_path / "b.safetensors", range(1, 7), [1.0] * 6)
    assert sentences(facts(many))[-1].startswith("Rank 1 (1), 2 (1), 3 (1), 4 (1) and 2 others; alpha 1;")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int64])
def test_alphas_of_every_dtype(tmp_path, dtype):
    assert written(tmp_path / "a.safetensors", (4,), (8,), dtype=dtype).alphas() == {NAMES[0]: 8}


def test_alphas_from_the_peft_metadata(tmp_path):
    header = written(tmp_path / "a.safetensors", (4, 4), (3.0, None), {"lora_adapter_metadata": '{"lora_alpha": 8}'})
    assert header.alphas() == {NAMES[0]: 3.0, NAMES[1]: 8.0}


def test_an_alpha_of_several_numbers_is_refused(tmp_path):
    header = written(tmp_path / "a.safetensors", (4,), ([1.0, 2.0],))
    with pytest.raises(ValueError, match=r"alpha is F32 of shape \[2\], not one number"):
        facts(header)


def test_tensors_of_other_kinds_are_counted(tmp_path):
    tensors = {f"{NAMES[0]}.lora_up.weight": torch.zeros(8, 4), "x.vera_w1_a": torch.zeros(1)}
    for more, ending in (({}, "x.vera_w1_a."), ({"x.vera_w1_b": torch.zeros(1)}, "x.vera_w1_a and 1 more.")):
        save_file(tensors | more, tmp_path / "a.safetensors")
        values = facts(read_header(tmp_path / "a.safetensors"))
        assert sentences(values)[-1] == f"Tensors of no LoRA style known here: {ending}"


def test_what_people_look_for_in_a_header():
    metadata = {
        "ss_sd_model_name": "my base.",
        "ss_training_comment": "two\nlines",
        "modelspec.author": "",
        "modelspec.description": "x" * 500,
        "modelspec.hash_sha256": "0x" + "ab" * 32,
        "ss_steps": "12",
    }
    lines = noted(metadata)
    assert lines[1:] == ["Made from: my base.", "Training comment: two lines.", "AutoV3 in the header: abababababab."]
    assert lines[0].startswith("Description: xxx") and len(lines[0]) < 230 and lines[0].endswith("....")
    assert noted(metadata | {"sshs_model_hash": "cd" * 32})[-1] == "AutoV3 in the header: cdcdcdcdcdcd."
    assert noted({}) == []
