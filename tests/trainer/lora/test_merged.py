"""Style LoRAs in the frozen weights: the teacher is the base with them, and whoever uses the LoRA is told."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phased_consistency.samplers import recipe_for_file
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.config.sections import lora_and_strength
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.families.generate import probe
from phased_consistency.trainer.lora.install import installed
from phased_consistency.trainer.lora.merged import check_merged, merge_into
from phased_consistency.trainer.training.loop import train
from phased_consistency.trainer.training.plan import plan
from support.runs import TINY, metadata, small_config
from support.sharing_files import MODULES, kohya_file, pair_of


@pytest.fixture(scope="module")
def style(tiny_base, tmp_path_factory):
    """A style's LoRA as trainers write it: no recipe, alphas that are not the rank, a part for the text encoder."""
    path = kohya_file(tmp_path_factory.mktemp("style") / "style.safetensors", tiny_base)
    tensors = load_file(path)
    down, up = pair_of(torch.zeros(96, 96), 4)
    encoder = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    save_file(tensors | {f"{encoder}.lora_down.weight": down, f"{encoder}.lora_up.weight": up}, path, {"ss_steps": "7"})
    return path


def output(base):
    x, tick = probe(base)
    with torch.no_grad():
        return base.denoise(x, tick, base.encode_prompts(["a red circle"]))


@pytest.mark.parametrize("strength", [1.0, 0.8, -0.5])
def test_the_merged_base_is_the_base_with_the_lora_in_it(style, strength):
    merged, other = load_base(TINY), load_base(TINY)
    (line,) = merge_into(merged, [f"{style}:{strength}"])
    assert line == (
        f"Merged into the base: style.safetensors at strength {strength:g}, {len(MODULES)} modules. 1 modules for text "
        "encoders are left out."
    )
    with installed(style, other, strength):
        with_lora = output(other)
    assert (output(merged) - with_lora).abs().max() < 1e-5 * (with_lora - output(other)).abs().max() + 1e-5
    assert not hasattr(merged.network, "peft_config")


def test_several_are_added_up(style, tmp_path, tiny_base):
    second = kohya_file(tmp_path / "second.safetensors", tiny_base, MODULES[:2])
    tensors = load_file(second)
    save_file(tensors, second)
    merged, by_turns = load_base(TINY), load_base(TINY)
    merge_into(merged, [f"{style}:0.5", str(second)])
    merge_into(by_turns, [str(second)])
    merge_into(by_turns, [f"{style}:0.5"])
    assert (output(merged) - output(by_turns)).abs().max() < 1e-5


def test_a_hash_tells_the_merged_weights_from_others(style, tiny_base):
    bases = {}
    for loras in ([], [str(style)], [f"{style}:0.8"]):
        base = load_base(TINY)
        merge_into(base, loras)
        bases[base.weights_hash] = base
        assert base.base_hash == tiny_base.base_hash
    assert len(bases) == 3 and tiny_base.weights_hash == tiny_base.base_hash in bases


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("style.safetensors", ("style.safetensors", 1.0)),
        ("style.safetensors:0.8", ("style.safetensors", 0.8)),
        ("C:\\loras\\style.safetensors", ("C:\\loras\\style.safetensors", 1.0)),
        ("C:\\loras\\style.safetensors:-1", ("C:\\loras\\style.safetensors", -1.0)),
        ("1", ("1", 1.0)),
    ],
)
def test_a_strength_is_what_follows_the_last_colon(text, parts):
    assert lora_and_strength(text) == parts


@pytest.mark.parametrize("number", ["0", "nan", "inf"])
def test_a_strength_that_cannot_be_is_refused(number):
    with pytest.raises(ValueError, match=rf"base.loras.*has strength {number}; expected a number other than 0"):
        load_config(None, {"base.loras": [f"style.safetensors:{number}"]}, "demo-sd15")


def test_the_run_says_what_its_teacher_is(style, tmp_path):
    config = small_config(tmp_path / "run", base__path=TINY, base__loras=json.dumps([f"{style}:0.8"]), train__steps=1)
    assert plan(config)["text"]
    header = metadata(train(config))
    recipe = json.loads(header[HEADER_KEY])
    assert recipe["base_name"] == "tiny-sd15 + style.safetensors:0.8"
    assert json.loads(header["pcm.config"])["base"]["loras"] == ["style.safetensors:0.8"]
    assert header["modelspec.description"].endswith("made from tiny-sd15 + style.safetensors:0.8.")
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert str(style.parent) not in log and "style.safetensors" in log


def test_a_run_on_another_style_is_not_gone_on_with(style, tmp_path, fails, pcm):
    changed = tmp_path / "style.safetensors"
    tensors = load_file(style)
    save_file(tensors, changed)
    settings = [f"{key}={value}" for key, value in small(tmp_path / "run", changed).items()]
    assert pcm("train", *settings).code == 0
    save_file({key: 2 * value for key, value in tensors.items()}, changed)
    assert "is not the one that this run was begun with" in fails(2, "train", *settings)


def small(output, style):
    from support.runs import settings

    rows = settings(output, base__path=TINY, base__loras=json.dumps([str(style)]), train__steps=2)
    return dict(row.split("=", 1) for row in rows)


# --- bad input


def test_a_style_of_zero_effect_is_refused(style, tmp_path):
    save_file({k: v * ("up" not in k) for k, v in load_file(style).items()}, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match=r"empty.safetensors changes nothing: all that it adds to \d+ layers is 0"):
        merge_into(load_base(TINY), [str(tmp_path / "empty.safetensors")])


@pytest.mark.parametrize(
    ("strength", "dtype", "words"),
    [
        (1e-12, torch.bfloat16, r"at strength 1e-12 changes nothing: .* less than .* hold in bfloat16. Set base.dtype"),
        (1e45, torch.float32, r"at strength 1e\+45 is beyond what weights can be: give a smaller strength"),
        (1e9, torch.float16, r"at strength 1e\+09 is beyond what weights can be"),
    ],
)
def test_a_strength_by_which_nothing_or_all_is_lost_is_refused(style, strength, dtype, words):
    base = load_base(TINY, dtype=dtype)
    before = {name: weight.clone() for name, weight in base.network.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        merge_into(base, [f"{style}:{strength}"])
    assert all(torch.equal(weight, before[name]) for name, weight in base.network.state_dict().items())


@pytest.mark.parametrize("strengths", [("", ":-1"), (":0.5", ":0.5")])
def test_a_style_that_is_there_twice_is_refused(style, strengths, tmp_path, tiny_base):
    (tmp_path / "other.safetensors").symlink_to(style)
    files = zip((style, tmp_path / "other.safetensors"), strengths, strict=True)
    with pytest.raises(ValueError, match="is in base.loras twice. Give it once, with the sum of both strengths"):
        check_merged([f"{file}{strength}" for file, strength in files], type(tiny_base))


def test_a_strength_without_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="base.loras.0 = ':0.8' is empty: name a place"):
        small_config(tmp_path, base__loras=":0.8")


def test_a_few_step_lora_is_no_style(lora, tiny_base):
    with pytest.raises(ValueError, match=r"is a few-step LoRA \(PCM\).*Put it into lora.init"):
        check_merged([str(lora)], type(tiny_base))
    assert recipe_for_file("lcm-lora-sdv1-5.safetensors", {})  # by its name, too


def test_a_style_for_another_family_or_model_is_refused(style, tmp_path, tiny_base):
    save_file(
        {
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.ones(4, 2048),
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight": torch.ones(640, 4),
        },
        tmp_path / "xl.safetensors",
    )
    with pytest.raises(ValueError, match="xl.safetensors is a LoRA for SDXL, the base is SD1.5"):
        check_merged([str(tmp_path / "xl.safetensors")], type(tiny_base))

    tensors = {k.replace("mid_block", "up_blocks_7"): v for k, v in load_file(style).items()}
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"odd.safetensors: 1 of \d+ modules do not fit"):
        merge_into(load_base(TINY), [str(tmp_path / "odd.safetensors")])


def test_what_is_refused_is_refused_by_the_dry_run(tmp_path, fails):
    missing = tmp_path / "no-such.safetensors"
    settings = ["--preset", "demo-sd15", f'base.loras=["{missing}"]', "--dry-run"]
    assert f"No file at {missing}" in fails(2, "train", *settings)
    digits = ["--preset", "digits", f'base.loras=["{missing}"]', "--dry-run"]
    assert "base.loras is for a frozen base" in fails(2, "train", *digits)


def test_pcm_sample_draws_with_the_merged_base(style, pcm, tmp_path):
    words = ["--base", TINY, "--prompt", "a red circle", "--resolution", 32, "--steps", 2]
    plain = pcm("sample", *words, "--out", "plain.png")
    styled = pcm("sample", *words, "--base-lora", f"{style}:0.8", "--out", "styled.png")
    assert plain.code == styled.code == 0, styled.err
    assert Path(tmp_path / "plain.png").read_bytes() != Path(tmp_path / "styled.png").read_bytes()
