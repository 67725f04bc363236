"""SDXL: what it makes of prompts, sizes and files is what diffusers makes of them, and its LoRA fits."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from phased_consistency.samplers import recipe_for_file
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.families.sdxl import SDXL
from phased_consistency.trainer.lora.install import install_by_diffusers
from phased_consistency.trainer.training.loop import train
from support.bases import make_sdxl_folder, make_sdxl_pipeline, save_without
from support.full_size import planned
from support.ldm_checkpoint import save_single_file
from support.runs import metadata, small_config

PROMPTS = ["a red star on a blue background", "", "two " * 90]


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    """A small SDXL: its folder, its parts, and its words."""
    folder, words = tmp_path_factory.mktemp("sdxl"), tiny_base.tokenizers[0]
    return SimpleNamespace(folder=folder, parts=make_sdxl_folder(folder, words), words=words)


@pytest.fixture(scope="module")
def base(made):
    return load_base(str(made.folder))


@pytest.fixture(scope="module")
def pipeline(made):
    return make_sdxl_pipeline(made.parts, made.words)


@pytest.fixture(scope="module")
def checkpoint(made, tmp_path_factory):
    return save_single_file(tmp_path_factory.mktemp("file") / "small.safetensors", **vars(made.parts))


@pytest.fixture
def without(checkpoint, tmp_path):
    """Writes the checkpoint without the weights whose names start so."""
    return partial(save_without, checkpoint, tmp_path / "partly.safetensors")


def load(path, made, **options):
    return load_base(
        str(path), **{"family": "sdxl", "config": str(made.folder), "tokenizer": str(made.folder)} | options
    )


def test_prompts_are_encoded_as_in_diffusers(base, pipeline):
    hidden, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    condition = base.encode_prompts(PROMPTS)
    assert condition.keys() == {"hidden", "pooled"}
    assert torch.equal(condition["hidden"], hidden) and torch.equal(condition["pooled"], pooled)


@pytest.mark.parametrize(("null", "negative"), [(None, None), ("zeros", None), ("empty", "")])
def test_no_prompt_is_zeros_as_published_or_the_empty_prompt(made, pipeline, null, negative):
    base = load_base(str(made.folder), null=null)
    _, hidden, _, pooled = pipeline.encode_prompt(["a red star"], negative_prompt=negative)
    actual = base.null_condition(base.encode_prompts([""]))
    torch.testing.assert_close(actual, {"hidden": hidden, "pooled": pooled})


@pytest.mark.parametrize("sizes", [None, ((600, 513), (17, 0), (64, 48))])
def test_points_are_denoised_as_in_diffusers(base, pipeline, sizes):
    """Without sizes a picture counts as whole and of its own size, here 64 x 48 pixels."""
    x, tick, condition = torch.randn(2, 4, 8, 6), torch.tensor([1, 700]), base.encode_prompts(PROMPTS[:2])
    original, corner, target = sizes or ((64, 48), (0, 0), (64, 48))
    width = base.text_encoders[1].config.projection_dim
    ids = pipeline._get_add_time_ids(original, corner, target, torch.float32, width).repeat(2, 1)
    added = {"text_embeds": condition["pooled"], "time_ids": ids}
    if sizes:
        condition["time_ids"] = torch.tensor([[*original, *corner, *target]]).repeat(2, 1)
    with torch.no_grad():
        expected = pipeline.unet(x, tick - 1, condition["hidden"], added_cond_kwargs=added).sample
        torch.testing.assert_close(base.denoise(x, tick, condition), expected, atol=1e-5, rtol=1e-4)


def test_sizes_change_the_output_and_are_told_exactly_in_bf16(made):
    base = load_base(str(made.folder), dtype=torch.bfloat16)
    seen = []
    base.network.add_embedding.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x, tick, condition = torch.randn(1, 4, 8, 8), torch.tensor([700]), base.encode_prompts([""])
    outputs = [
        base.denoise(x, tick, condition | {"time_ids": torch.tensor([[1023, 1025, 301, 0, 64, 64]]) + i})
        for i in (0, 1)
    ]
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(*outputs)


def test_guidance_gives_both_halves_the_same_sizes(base):
    condition = base.encode_prompts(["a red star"]) | {"time_ids": torch.arange(6.0)[None]}
    both = base.with_null(condition, base.null_condition(base.encode_prompts([""])))
    assert torch.equal(both["time_ids"], torch.arange(6.0).repeat(2, 1))
    assert both["hidden"].shape[0] == 2 and not both["pooled"][1].any()


def test_every_weight_of_a_single_file_comes_back_to_the_bit(made, checkpoint):
    base = load(checkpoint, made)
    modules = {"unet": base.network, "vae": base.vae}
    modules |= dict(zip(("text_encoder", "text_encoder_2"), base.text_encoders, strict=True))
    for name, module in vars(made.parts).items():
        loaded, expected = modules[name].state_dict(), module.state_dict()
        assert loaded.keys() == expected.keys(), name
        assert all(torch.equal(loaded[k], expected[k]) for k in expected), name


def test_a_half_precision_file_keeps_vae_and_encoders_in_fp32(made, tmp_path):
    path = save_single_file(tmp_path / "half.safetensors", **vars(made.parts), dtype=torch.float16)
    base = load(path, made, dtype=torch.float16)
    assert base.network.dtype == torch.float16
    assert {m.dtype for m in (base.vae, *base.text_encoders)} == {torch.float32}
    projection = made.parts.text_encoder_2.text_projection.weight
    assert torch.equal(base.text_encoders[1].text_projection.weight, projection.half().float())


def test_the_second_tokenizer_pads_with_token_0_where_only_the_first_is_given(made, checkpoint, tmp_path):
    made.words.save_pretrained(tmp_path)
    first, second = load(checkpoint, made, tokenizer=str(tmp_path)).tokenizers
    ids = [t("a red star!", padding="max_length", max_length=20).input_ids for t in (first, second)]
    end = ids[0].index(first.eos_token_id) + 1
    assert ids[0][:end] == ids[1][:end] and set(ids[0][end:]) == {first.eos_token_id} and set(ids[1][end:]) == {0}


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (
            "conditioner.embedders.0.",
            r"holds no CLIP-L text encoder \(conditioner.embedders.0.*that has text_encoder/\.",
        ),
        ("conditioner.embedders.1.", r"holds no OpenCLIP-bigG text encoder .*base.parts to a diffusers folder of SDXL"),
        ("conditioner.", r"holds no CLIP-L .*, no OpenCLIP-bigG .*that has text_encoder/, text_encoder_2/\."),
        ("first_stage_model.", r"holds no VAE \(first_stage_model\.\*\)"),
        ("conditioner.embedders.1.model.text_projection", "lacks 1 OpenCLIP-bigG text encoder weights"),
        (
            "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_bias",
            "lacks 3 OpenCLIP-bigG text encoder",
        ),
        ("model.diffusion_model.label_emb.0.0.weight", "lacks 1 unet weights|lacks some of the weights of its unet"),
    ],
)
def test_a_file_that_is_not_whole_says_what_it_lacks(made, without, prefix, message):
    with pytest.raises(ValueError, match=message):
        load(without(prefix), made)


@pytest.mark.parametrize(
    "scale",
    [
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight_scale",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.scale_weight",
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.scale_weight",
    ],
)
def test_scaled_weights_are_refused(made, checkpoint, tmp_path, scale):
    save_file(load_file(checkpoint) | {scale: torch.ones(1)}, tmp_path / "scaled.safetensors")
    with pytest.raises(ValueError, match=f"scaled.safetensors holds scaled fp8 .*it has {scale}"):
        load(tmp_path / "scaled.safetensors", made)


def test_the_projection_may_be_a_linear_layers(made, checkpoint, base, tmp_path):
    """`text_projection.weight`, (out, in), in place of OpenCLIP's transposed `text_projection`."""
    tensors, name = load_file(checkpoint), "conditioner.embedders.1.model.text_projection"
    tensors[f"{name}.weight"] = tensors.pop(name).T.contiguous()
    save_file(tensors, tmp_path / "linear.safetensors")
    linear = load(tmp_path / "linear.safetensors", made)
    assert torch.equal(linear.encode_prompts(PROMPTS)["pooled"], base.encode_prompts(PROMPTS)["pooled"])


def test_parts_supply_what_a_file_lacks(made, without, base):
    partly = load(without("conditioner."), made, parts=str(made.folder), tokenizer=None)
    assert torch.equal(partly.encode_prompts(PROMPTS)["hidden"], base.encode_prompts(PROMPTS)["hidden"])
    assert partly.encoder_settings.startswith("parts ")


def test_the_shipped_configs_are_the_real_sdxl():
    """Parameters of SDXL-base-1.0's networks, and what its VAE multiplies by."""
    read = lambda part: json.loads((SDXL.configs / part / "config.json").read_text())  # noqa: E731
    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel.from_config(read("unet")),
            "vae": AutoencoderKL.from_config(read("vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**read("text_encoder"))),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**read("text_encoder_2"))),
        }
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in modules.items()}
    assert counts == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }
    assert modules["vae"].config.scaling_factor == 0.13025 and modules["unet"].config.sample_size == 128


def test_a_full_size_run_is_planned_without_a_weight():
    plain, adversarial = (planned(f"sdxl-4step{kind}") for kind in ("", "-adv"))
    assert (plain["lora_modules"], plain["trained_parameters"]) == (788, 196_751_360)
    gib, more = plain["memory_gib"], adversarial["memory_gib"]
    assert gib["frozen UNet"] == pytest.approx(2_567_463_684 * 2 / 2**30, abs=1e-3)
    before = gib["frozen UNet"] + 83_653_863 * 4 / 2**30
    assert gib["before: the larger of UNet and encoders"] == pytest.approx(before, abs=2e-3), "and the VAE"
    assert 8 < gib["training in all, at least"] < more["training in all, at least"] < 16
    assert (plain["forward_passes_per_sample"], adversarial["forward_passes_per_sample"]) == (4, 6)


def test_a_broken_vae_is_named(made):
    base = load_base(str(made.folder))
    base.vae.encoder.conv_in.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="turns pictures into numbers that are not finite.*Use another copy"):
        base.encode_images(torch.zeros(1, 3, 64, 64))


def test_a_small_sdxl_is_trained_and_its_lora_fits(made, tiny_base, tmp_path):
    """v-prediction with zero terminal SNR, from what its scheduler says to what the LoRA's header says."""
    folder = tmp_path / "base"
    make_sdxl_folder(folder, made.words, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    size = {"data__count": 3, "data__teacher_steps": 1, "train__steps": 1}
    config = small_config(tmp_path / "run", base__path=folder, **size)
    path = train(config)
    recipe = recipe_for_file(path.name, metadata(path))
    assert (recipe.family, recipe.prediction, recipe.zero_terminal_snr) == ("sdxl", "v_prediction", True)
    assert metadata(path)["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    base = load_base(str(folder))
    before = base.denoise(torch.ones(1, 4, 8, 8), torch.tensor([700]), base.encode_prompts([""]))
    install_by_diffusers(path, base, "mine")
    after = base.denoise(torch.ones(1, 4, 8, 8), torch.tensor([700]), base.encode_prompts([""]))
    assert not torch.equal(before, after)
