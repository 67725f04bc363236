"""Checkpoints as shared on Civitai, in one file under the original names: small models, and every layer of SD1.5."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from host.tiny import make_unet
from phased_consistency.trainer.data import cache
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.families.detection import family_of
from phased_consistency.trainer.families.sd15 import SD15
from support.bases import clip_config, make_vae, save_without
from support.full_size import whole_sd15
from support.ldm_checkpoint import save_single_file
from support.runs import TINY, other_precision, settings


@pytest.fixture(scope="module")
def parts(tiny_base):
    """A small SD1.5: its width and its text conditioning at two levels, with the tiny base's words."""
    unet, vae = make_unet(), make_vae(levels=2)
    text = CLIPTextModel(clip_config(tiny_base.tokenizers[0], width=768))
    return SimpleNamespace(unet=unet, vae=vae.eval(), text_encoder=text.eval())


@pytest.fixture(scope="module")
def configs(parts, tiny_base, tmp_path_factory):
    """Folders of the small model's configs and of its tokenizer."""
    folder = tmp_path_factory.mktemp("configs")
    parts.unet.save_config(folder / "unet")
    parts.vae.save_config(folder / "vae")
    parts.text_encoder.config.save_pretrained(folder / "text_encoder")
    shutil.copytree(SD15.configs / "scheduler", folder / "scheduler")
    tiny_base.tokenizers[0].save_pretrained(folder / "words")
    return folder


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    return save_single_file(tmp_path_factory.mktemp("file") / "small.safetensors", **vars(parts))


@pytest.fixture
def without(checkpoint, tmp_path):
    """Writes the checkpoint without the weights whose names start so."""
    return partial(save_without, checkpoint, tmp_path / "partly.safetensors")


def load(path, configs, **options):
    return SD15.load(str(path), **{"config": str(configs), "tokenizer": str(configs / "words")} | options)


def test_every_weight_comes_back_to_the_bit(parts, configs, checkpoint):
    base = load(checkpoint, configs)
    modules = {"unet": base.network, "vae": base.vae, "text_encoder": base.text_encoders[0]}
    for name, module in vars(parts).items():
        loaded = {k.removeprefix("text_model."): v for k, v in modules[name].state_dict().items()}
        expected = {k.removeprefix("text_model."): v for k, v in module.state_dict().items()}
        assert loaded.keys() == expected.keys(), name
        assert all(torch.equal(loaded[k], expected[k]) for k in expected), name


def test_the_loaded_base_computes_the_same(parts, configs, checkpoint):
    base = load(checkpoint, configs)
    x, tick = torch.randn(2, 4, 8, 8), torch.tensor([1, 1000])
    condition = base.encode_prompts(["a red star", ""])
    with torch.no_grad():
        expected = parts.unet(x, torch.tensor([0, 999]), condition["hidden"]).sample
        torch.testing.assert_close(base.denoise(x, tick, condition), expected, atol=1e-5, rtol=1e-4)
        latent, spread = base.encode_images(torch.zeros(1, 3, 16, 16))
        posterior = parts.vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist
        assert torch.equal(latent, 0.18215 * posterior.mean) and torch.equal(spread, 0.18215 * posterior.std)


def test_the_unet_takes_the_asked_precision_and_the_encoders_stay_in_fp32(configs, checkpoint):
    base = load(checkpoint, configs, dtype=torch.bfloat16)
    assert [m.dtype for m in (base.network, base.vae, base.text_encoders[0])] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]
    assert not any(p.requires_grad for m in (base.network, base.vae, base.text_encoders[0]) for p in m.parameters())


def test_a_half_precision_file_is_read_into_fp32(parts, configs, tmp_path):
    path = save_single_file(tmp_path / "half.safetensors", **vars(parts), dtype=torch.float16)
    base = load(path, configs)
    assert base.network.dtype == base.text_encoders[0].dtype == torch.float32
    assert torch.equal(base.network.conv_in.weight, parts.unet.conv_in.weight.half().float())


def test_parts_supply_what_the_file_lacks(without, configs):
    """Another base's VAE, text encoder and words, which a cache must tell from the file's own."""
    base = load(without("first_stage_model."), configs, parts=TINY)
    tiny = load_base(TINY)
    assert isinstance(base.vae, AutoencoderTiny) and base.vae.dtype == torch.float32
    assert all(torch.equal(w, tiny.vae.state_dict()[name]) for name, w in base.vae.state_dict().items())
    whole = load(without("nothing"), configs, parts=TINY, tokenizer=None)
    assert whole.tokenizers[0].get_vocab() == tiny.tokenizers[0].get_vocab()
    assert whole.encoder_settings == "" != base.encoder_settings
    text = load(without("cond_stage_model."), configs, parts=TINY).text_encoders[0]
    assert all(torch.equal(w, tiny.text_encoders[0].state_dict()[name]) for name, w in text.state_dict().items())


def test_parts_that_cannot_supply_it_are_refused(without, configs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no diffusers folder of SD1.5: it lacks vae/"):
        load(without("first_stage_model."), configs, parts=str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="No folder at /gone. Set base.parts to a diffusers folder of SD1.5"):
        load(without("nothing"), configs, parts="/gone")


def test_a_missing_tokenizer_says_where_to_put_one(configs, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="small.safetensors brings no CLIP tokenizer") as raised:
        load(checkpoint, configs, tokenizer=None)
    assert "Put its vocab.json and merges.txt" in str(raised.value) and "set base.tokenizer" in str(raised.value)


@pytest.fixture
def stub(tmp_path):
    """A file with nothing but what tells families apart: the width of text conditioning, the UNet's input channels."""

    def stub(width=768, inputs=4, more=(), metadata=None):
        tensors = {
            "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, inputs, 3, 3),
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, width),
            **{name: torch.zeros(0) for name in more},
        }
        save_file(tensors, tmp_path / "other.safetensors", metadata)
        return str(tmp_path / "other.safetensors")

    return stub


@pytest.mark.parametrize(
    ("asked", "shape", "message"),
    [
        ("sd15", {"width": 2048}, "other.safetensors is SDXL, base.family is sd15. Set base.family=sdxl with a preset"),
        ("sdxl", {"width": 768}, "is SD1.5, base.family is sdxl. Set base.family=sd15 .*sd15-4step.*, or .* of SDXL"),
        ("sdxl", {"width": 1024}, "is SD2, of which no LoRA can be trained. Choose a base of SDXL"),
        (None, {"width": 1280}, "is an SDXL refiner, .*Choose a base of SD1.5, SDXL, SD3"),
        (None, {"inputs": 9}, "is an SD1.5 inpainting model"),
        ("sdxl", {"width": 2048, "inputs": 9}, "is an SDXL inpainting model"),
        ("sd15", {"inputs": 8}, "is an SD1.5 editing model"),
        (None, {"width": 512}, "Nothing in other.safetensors tells which family it is of. Set base.family"),
        ("sd15", {"width": 512}, "text conditioning 512 wide, base.family sd15 needs 768"),
        ("sd3", {}, "is SD1.5, base.family is sd3"),
        ("sd16", {}, "Unknown base.family 'sd16'; available: sd15, sdxl, sd3"),
    ],
)
def test_bases_of_another_family_are_refused_by_name(stub, asked, shape, message):
    with pytest.raises(ValueError, match=message):
        load_base(stub(**shape), family=asked)


def test_an_sd3_file_is_not_sdxl(tmp_path):
    save_file(
        {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(2)}, tmp_path / "3.safetensors"
    )
    with pytest.raises(ValueError, match="3.safetensors is SD3, base.family is sdxl. Set base.family=sd3"):
        load_base(str(tmp_path / "3.safetensors"), family="sdxl")


def test_folders_of_another_family_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="tiny-sd15 is SD1.5, base.family is sdxl"):
        load_base("tiny-sd15", family="sdxl")
    (tmp_path / "unet").mkdir()
    for config, message in (
        ({"cross_attention_dim": 2048, "addition_embed_type": "text_time"}, "is SDXL, base.family is sd15"),
        ({"cross_attention_dim": 1280, "addition_embed_type": "text_time"}, "is an SDXL refiner"),
        ({"cross_attention_dim": 768, "in_channels": 9}, "is an SD1.5 inpainting model"),
        ({"cross_attention_dim": 1024}, "is SD2, of which no LoRA"),
    ):
        (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"} | config))
        with pytest.raises(ValueError, match=message):
            load_base(str(tmp_path), family="sd15")


def test_settings_of_another_family_are_refused():
    with pytest.raises(ValueError, match="base.shift is not for SD1.5. Leave it out"):
        load_base(TINY, shift=3.0, t5=None)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (
            "cond_stage_model.",
            "partly.safetensors holds no CLIP-L text encoder .cond_stage_model.transformer.*set base.parts",
        ),
        ("first_stage_model.", "partly.safetensors holds no VAE .first_stage_model.*that has vae/"),
        (
            "cond_stage_model.transformer.text_model.final",
            "lacks 2 CLIP-L text encoder weights .such as .*final_layer_norm",
        ),
        (
            "model.diffusion_model.middle_block.0.in_layers.2.weight",
            "lacks 1 unet weights|lacks some of the weights",
        ),
        ("first_stage_model.decoder.conv_out.bias", "lacks 1 vae weights|lacks some of the weights"),
        ("model.diffusion_model.", "is no Stable Diffusion checkpoint"),
    ],
)
def test_partial_checkpoints_are_refused(without, configs, prefix, message):
    with pytest.raises(ValueError, match=message):
        load(without(prefix), configs)


@pytest.mark.parametrize(
    "scale",
    [
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.scale_weight",
        "model.diffusion_model.scaled_fp8",
        "first_stage_model.decoder.conv_in.weight_scale",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.scale_weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.comfy_quant",
    ],
)
def test_scaled_weights_are_refused(checkpoint, configs, tmp_path, scale):
    """Without its scale a weight can be a thousand times too large."""
    save_file(load_file(checkpoint) | {scale: torch.ones(1)}, tmp_path / "scaled.safetensors")
    with pytest.raises(
        ValueError, match=f"scaled.safetensors holds scaled fp8 .*it has {scale}.*Give the checkpoint in"
    ):
        load(tmp_path / "scaled.safetensors", configs)


@pytest.mark.parametrize(
    ("end", "method"),
    [
        ("SCB", "bitsandbytes int8"),
        ("quant_state.bitsandbytes__nf4", "bitsandbytes NF4"),
        ("absmax", "bitsandbytes 4 bits"),
        ("qweight", "GPTQ or AWQ"),
    ],
)
def test_quantised_weights_are_refused_by_name(checkpoint, configs, tmp_path, end, method):
    beside = f"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight.{end}"
    save_file(load_file(checkpoint) | {beside: torch.ones(1)}, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=rf"holds {method} weights \(it has {beside}\).*Give the checkpoint in fp16"):
        load(tmp_path / "small.safetensors", configs)


def test_integers_without_scales_are_refused(checkpoint, configs, tmp_path):
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    tensors = load_file(checkpoint)
    save_file(tensors | {name: tensors[name].to(torch.int8)}, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=rf"holds integers for weights \(I8: {name}\)"):
        load(tmp_path / "small.safetensors", configs)


@pytest.mark.parametrize("name", ["small.sft", "SMALL.SAFETENSORS", "small.SFT"])
def test_other_ends_of_names_are_the_same_file(parts, configs, checkpoint, tmp_path, name):
    path = shutil.copy(checkpoint, tmp_path / name)
    assert family_of(str(path)) == "sd15"
    base = load(path, configs)
    assert torch.equal(base.network.conv_in.weight, parts.unet.conv_in.weight)
    assert torch.equal(base.vae.encoder.conv_in.weight, parts.vae.encoder.conv_in.weight)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("base.gguf", b"GGUF\x03\0\0\0", "is a GGUF file, whose weights are quantised"),
        ("base.ckpt", b"PK\x03\x04....", "is a zip archive or a file of torch.save"),
        ("base.safetensors", b"version https://git-lfs.github.com/spec/v1", "is a git-lfs pointer"),
        ("base.SFT", b"<!DOCTYPE html><html>", "is a web page"),
    ],
)
def test_what_is_no_base_is_called_what_it_is(tmp_path, fails, name, content, message):
    (tmp_path / name).write_bytes(content)
    options = ("--prompt", "x", "--out", tmp_path / "x.png")
    assert f"{name} {message}" in fails(2, "sample", "--base", tmp_path / name, *options)


def test_words_come_from_a_comfyui_on_this_machine(checkpoint, configs, tmp_path, monkeypatch):
    host = tmp_path / "ComfyUI"
    shutil.copytree(configs / "words", host / "comfy" / "sd1_tokenizer")
    (host / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(host))
    base = load(checkpoint, configs, tokenizer=None)
    assert base.tokenizers[0].get_vocab() == load(checkpoint, configs).tokenizers[0].get_vocab()


def test_a_vae_under_the_other_prefix_is_found(checkpoint, configs, parts, tmp_path):
    tensors = {k.replace("first_stage_model.", "vae."): v for k, v in load_file(checkpoint).items()}
    save_file(tensors, tmp_path / "other.safetensors")
    vae = load(tmp_path / "other.safetensors", configs).vae
    assert all(torch.equal(w, vae.state_dict()[name]) for name, w in parts.vae.state_dict().items())


def test_a_tokenizer_folder_without_words_is_refused(checkpoint, configs, tmp_path):
    with pytest.raises(ValueError, match=f"base.tokenizer is {tmp_path}, which holds no tokenizer. Set it to a folder"):
        load(checkpoint, configs, tokenizer=str(tmp_path), parts=TINY)


def test_a_file_cut_short_is_refused(checkpoint, configs, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cut.safetensors is cut short"):
        load(tmp_path / "cut.safetensors", configs)


def test_the_shipped_configs_are_the_real_sd15():
    """Parameters of its networks."""
    read = lambda part: json.loads((SD15.configs / part / "config.json").read_text())  # noqa: E731
    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel.from_config(read("unet")),
            "vae": AutoencoderKL.from_config(read("vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**read("text_encoder"))),
        }
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in modules.items()}
    assert counts == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


def test_a_whole_sd15_is_trained_and_its_lora_fits(tiny_base, tmp_path, pcm, monkeypatch):
    """An update on 64-pixel latents in bf16; then all of PCM's 278 modules match."""
    monkeypatch.setattr(cache, "TRIAL_STEPS", 1)  # of what it predicts, of which random weights tell nothing
    tokenizer, configs = tmp_path / "words", tmp_path / "configs"
    tiny_base.tokenizers[0].save_pretrained(tokenizer)
    checkpoint = whole_sd15(tmp_path / "whole.safetensors", configs)
    base = {"base__path": checkpoint, "base__tokenizer": tokenizer, "base__config": configs}
    size = {
        "data__resolution": 64,
        "data__count": 1,
        "data__teacher_steps": 1,
        "train__batch_size": 1,
        "train__steps": 1,
    }
    with other_precision():
        run = pcm("train", *settings(tmp_path / "run", **base, **size, base__dtype="bf16"))
    assert run.code == 0, run.err
    assert "on 278 modules" in run.err and "0 keys unmatched of 278 modules" in run.err

    lora = tmp_path / "run" / "pcm-lora.safetensors"
    options = ("--base", checkpoint, "--tokenizer", tokenizer, "--config", configs)
    check = pcm("check", lora, *options)
    assert check.code == 0, check.err
    assert check.out.startswith("OK: 0 keys unmatched of 278 modules, 0 not loaded by diffusers")
