"""Checkpoints as shared on Civitai, in one file under the original names: small models, and a whole SD1.5."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from host.tiny import make_unet
from ldm_checkpoint import save_single_file
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.families.sd15 import SD15
from runs import settings, start_pcm


@pytest.fixture(scope="module")
def parts(tiny_base):
    """A small SD1.5: its width and its text conditioning at two levels, with the tiny base's words."""
    unet = make_unet()
    two = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(32, 32), **two)
    text = CLIPTextConfig(
        vocab_size=len(tiny_base.tokenizers[0]),
        hidden_size=768,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=tiny_base.tokenizers[0].bos_token_id,
        eos_token_id=tiny_base.tokenizers[0].eos_token_id,
    )
    return SimpleNamespace(unet=unet, vae=vae.eval(), text_encoder=CLIPTextModel(text).eval())


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
    """The checkpoint without the weights whose names start so."""

    def without(prefix):
        path = tmp_path / "partly.safetensors"
        save_file({k: v for k, v in load_file(checkpoint).items() if not k.startswith(prefix)}, path)
        return str(path)

    return without


def load(path, configs, **options):
    return SD15.load(str(path), **{"config": str(configs), "tokenizer": str(configs / "words")} | options)


def test_every_weight_comes_back_to_the_bit(parts, configs, checkpoint):
    base = load(checkpoint, configs)
    found = {"unet": base.network, "vae": base.vae, "text_encoder": base.text_encoders[0]}
    for name, module in vars(parts).items():
        loaded = {k.removeprefix("text_model."): v for k, v in found[name].state_dict().items()}
        own = {k.removeprefix("text_model."): v for k, v in module.state_dict().items()}
        assert loaded.keys() == own.keys(), name
        assert all(torch.equal(loaded[k], own[k]) for k in own), name


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


def test_prediction_can_be_told(configs, checkpoint):
    assert load(checkpoint, configs).prediction == "epsilon"
    assert load(checkpoint, configs, prediction="v_prediction").prediction == "v_prediction"


def test_a_missing_tokenizer_says_where_to_put_one(configs, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="small.safetensors brings no CLIP tokenizer") as raised:
        load(checkpoint, configs, tokenizer=None)
    assert "Put its vocab.json and merges.txt" in str(raised.value) and "set base.tokenizer" in str(raised.value)


@pytest.mark.parametrize(("width", "family"), [(2048, "SDXL"), (1024, "SD2"), (512, "an unknown family")])
def test_other_families_are_refused_by_name(tmp_path, width, family):
    path = tmp_path / "other.safetensors"
    name = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({name: torch.zeros(8, width)}, path)
    with pytest.raises(
        ValueError, match=f"text conditioning {width} wide, which is {family}; base.family sd15 needs 768"
    ):
        load_base(str(path))


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("cond_stage_model.", "partly.safetensors holds no text encoder"),
        ("first_stage_model.", "partly.safetensors lacks a part of a full checkpoint|lacks .* vae weights"),
        ("cond_stage_model.transformer.text_model.final", "lacks 2 text encoder weights .such as .*final_layer_norm"),
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


def test_a_file_cut_short_is_refused(checkpoint, configs, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cut.safetensors is cut short"):
        load(tmp_path / "cut.safetensors", configs)


def full_size(kind, part: str):
    """One of SD1.5's networks in fp16 with cheap random weights; the norms stay what they are."""
    config = json.loads((SD15.configs / part / "config.json").read_text())
    with torch.device("meta"):
        module = CLIPTextModel(CLIPTextConfig(**config)) if kind is CLIPTextModel else kind.from_config(config)
    module.half().to_empty(device="cpu")
    noise = 0.02 * torch.randn(2**20)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                fill = noise.repeat(-(-tensor.numel() // len(noise)))[: tensor.numel()].view_as(tensor)
                tensor.copy_(torch.full_like(fill, name.endswith("weight")) if tensor.ndim == 1 else fill)
    return module


@pytest.fixture
def full_checkpoint(tmp_path):
    """A whole SD1.5 in one fp16 file, 2 GB; deleted afterwards."""
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    modules = {part: full_size(kind, part) for part, kind in kinds.items()}
    path = save_single_file(tmp_path / "full.safetensors", **modules)
    del modules
    yield path
    path.unlink()


def test_a_full_size_sd15_is_trained_and_its_lora_fits(full_checkpoint, tiny_base, tmp_path):
    """Two updates on 64-pixel latents in bf16; then all of PCM's 278 modules match."""
    tokenizer = tmp_path / "words"
    tiny_base.tokenizers[0].save_pretrained(tokenizer)
    shutil.copytree(SD15.configs, tmp_path / "configs")
    unet = tmp_path / "configs" / "unet" / "config.json"
    unet.write_text(json.dumps(json.loads(unet.read_text()) | {"sample_size": 8}))  # what self-test and check look at
    base = {"base__path": full_checkpoint, "base__tokenizer": tokenizer, "base__config": tmp_path / "configs"}
    size = {
        "data__resolution": 64,
        "data__count": 2,
        "data__teacher_steps": 2,
        "train__batch_size": 1,
        "train__steps": 2,
    }
    run = start_pcm("train", *settings(tmp_path / "run", **base, **size, base__dtype="bf16"))
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    assert "on 278 modules" in errors and "0 keys unmatched of 278 modules" in errors

    lora = tmp_path / "run" / "pcm-lora.safetensors"
    options = ("--base", full_checkpoint, "--tokenizer", tokenizer, "--config", tmp_path / "configs")
    check = start_pcm("check", lora, *options)
    out, errors = check.communicate()
    assert check.returncode == 0, errors
    assert out.startswith("OK: 0 keys unmatched of 278 modules, 0 not loaded by diffusers")
