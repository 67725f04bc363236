"""SD3 and SD3.5 in one file, as Stability and ComfyUI write them: every part of it, and what it may lack."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from phased_consistency.trainer.families.sd3 import SD3
from support.bases import save_without
from support.sd3_base import clip_weights, make_sd3_folder, save_sd3_single_file, t5_tokenizer


@pytest.fixture(scope="module", params=["sd3", "sd3.5"])
def shared(request, tiny_base, tmp_path_factory):
    """A checkpoint, its parts, and a folder with their configs and tokenizers alone."""
    folder, words = tmp_path_factory.mktemp(request.param), tiny_base.tokenizers[0]
    parts = make_sd3_folder(folder / "configs", words, dual=request.param == "sd3.5")
    for weights in (folder / "configs").rglob("*.safetensors"):
        weights.unlink()
    return save_sd3_single_file(folder / "small.safetensors", parts), parts, folder / "configs"


@pytest.fixture
def without(shared, tmp_path):
    """Writes the checkpoint without the weights whose names start so."""
    return partial(save_without, shared[0], tmp_path / "partly.safetensors")


def weights_of(module):
    return clip_weights(module) if "CLIP" in type(module).__name__ else module.state_dict()


def load(path, configs, **options):
    return SD3.load(str(path), config=str(configs), **options)


def test_every_weight_comes_back_to_the_bit(shared):
    path, parts, configs = shared
    base = load(path, configs)
    loaded = [base.network, base.vae, *base.text_encoders]
    assert len(loaded) == 5
    for module, expected in zip(loaded, vars(parts).values(), strict=True):
        actual, wanted = weights_of(module), weights_of(expected)
        assert actual.keys() == wanted.keys()
        assert all(torch.equal(actual[k], wanted[k]) for k in wanted), type(expected).__name__
        assert not any(p.requires_grad for p in module.parameters()) and not module.training


def test_it_computes_the_same_as_the_folder(shared):
    path, parts, configs = shared
    base = load(path, configs)
    condition = base.encode_prompts(["a red star", ""])
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        theirs = parts.transformer(x, condition["hidden"], condition["pooled"], torch.tensor([1000.0, 500.0])).sample
    torch.testing.assert_close(base.denoise(x, torch.tensor([1000, 250]), condition), theirs)


def test_t5s_words_are_one_table(shared):
    encoder = load(*shared[::2]).text_encoders[2]
    assert encoder.shared.weight.data_ptr() == encoder.encoder.embed_tokens.weight.data_ptr()


def test_a_projection_of_clip_l_in_the_file_is_not_applied(shared, tmp_path):
    """ComfyUI writes one beside SD3 too, and never uses it."""
    path, parts, configs = shared
    name = "text_encoders.clip_l.transformer.text_projection.weight"
    save_file(load_file(path) | {name: torch.randn(32, 32)}, tmp_path / "more.safetensors")
    more = load(tmp_path / "more.safetensors", configs).encode_prompts(["a red star"])
    torch.testing.assert_close(more, load(path, configs).encode_prompts(["a red star"]))


def test_a_half_precision_file(shared, tmp_path):
    _, parts, configs = shared
    path = save_sd3_single_file(tmp_path / "half.safetensors", parts, torch.float16)
    base = load(path, configs, dtype=torch.bfloat16)
    assert base.network.dtype == torch.bfloat16
    assert {m.dtype for m in (base.vae, *base.text_encoders)} == {torch.float32}
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    assert torch.equal(base.text_encoders[2].state_dict()[name], parts.text_encoder_3.state_dict()[name].half().float())


def test_plain_fp8_of_t5_is_read_and_scaled_fp8_refused(shared, tmp_path):
    path, parts, configs = shared
    tensors = load_file(path)
    t5 = [k for k in tensors if k.startswith("text_encoders.t5xxl.")]
    small = {k: v.to(torch.float8_e4m3fn) for k, v in tensors.items() if k in t5}
    save_file(tensors | small, tmp_path / "fp8.safetensors")
    weight = load(tmp_path / "fp8.safetensors", configs).text_encoders[2].state_dict()["shared.weight"]
    assert torch.equal(weight, parts.text_encoder_3.shared.weight.to(torch.float8_e4m3fn).float())
    scale = {t5[0].replace(".weight", ".scale_weight"): torch.ones(())}
    save_file(tensors | small | scale, tmp_path / "scaled.safetensors")
    with pytest.raises(ValueError, match=r"scaled.safetensors holds T5-XXL in scaled fp8.* or base.t5=false"):
        load(tmp_path / "scaled.safetensors", configs)
    assert len(load(tmp_path / "scaled.safetensors", configs, t5=False).text_encoders) == 2


@pytest.mark.parametrize(
    "scale",
    [
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.scale_weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.scale_weight",
        "text_encoders.clip_g.transformer.scaled_fp8",
    ],
)
def test_scaled_weights_are_refused_with_or_without_t5(shared, tmp_path, scale):
    path, _, configs = shared
    save_file(load_file(path) | {scale: torch.ones(1)}, tmp_path / "scaled.safetensors")
    with pytest.raises(ValueError, match=f"scaled.safetensors holds scaled fp8 .*it has {scale}"):
        load(tmp_path / "scaled.safetensors", configs, t5=False)


def test_a_spiece_model_without_its_packages_says_what_to_install(shared, monkeypatch):
    def lacking(*_):
        raise ImportError("T5Converter requires the protobuf library")

    monkeypatch.setattr("phased_consistency.trainer.families.sd3_loading.T5TokenizerFast.from_pretrained", lacking)
    with pytest.raises(FileNotFoundError, match="Run: pip install sentencepiece protobuf.* or base.t5=false"):
        load(*shared[::2])


def test_a_file_without_t5_does_without(without, shared):
    path = without("text_encoders.t5xxl.")
    assert load(path, shared[2]).encoder_settings == "no T5"
    with pytest.raises(ValueError, match=r"holds no T5-XXL text encoder .*, base.t5=false to do without.*base.parts"):
        load(path, shared[2], t5=True)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("text_encoders.clip_l.", r"holds no CLIP-L text encoder \(text_encoders.clip_l.*set base.parts to a"),
        ("text_encoders.clip_g.", "holds no CLIP-bigG text encoder .*diffusers folder of SD3 that has text_encoder_2/"),
        ("first_stage_model.", r"holds no VAE \(first_stage_model.*set base.parts .* that has vae/"),
        (
            "text_encoders.clip_g.transformer.text_model.final",
            "lacks 2 CLIP-bigG text encoder weights .*final_layer_norm",
        ),
        ("text_encoders.t5xxl.transformer.shared", "lacks 2 T5-XXL text encoder weights"),
        (
            "text_encoders.t5xxl.transformer.encoder.final",
            "lacks 1 T5-XXL text encoder weights .*final_layer_norm",
        ),
        ("first_stage_model.decoder.conv_out.bias", "lacks 1 vae weights|lacks some of the weights"),
        ("model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight", "lacks"),
        (
            "model.diffusion_model.joint_blocks.",
            "is no SD3 checkpoint",
        ),
        ("model.diffusion_model.", "is no Stable Diffusion checkpoint"),
    ],
)
def test_partial_checkpoints_are_refused(without, shared, prefix, message):
    with pytest.raises(ValueError, match=message):
        load(without(prefix), shared[2])


def test_a_folder_supplies_what_a_file_lacks(without, shared, tiny_base, tmp_path):
    path, parts, configs = shared
    network_alone = without(("text_encoders.", "first_stage_model."))
    make_sd3_folder(tmp_path / "other", tiny_base.tokenizers[0], dual="sd3.5" in str(path))
    base, whole = load(network_alone, configs, parts=str(tmp_path / "other")), load(path, configs)
    torch.testing.assert_close(base.encode_prompts(["a red star"]), whole.encode_prompts(["a red star"]))
    assert base.encoder_settings.startswith("T5 of 77 tokens, parts ") and len(base.supplied) == 64
    with pytest.raises(FileNotFoundError, match="No folder at nowhere. Set base.parts"):
        load(network_alone, configs, parts="nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no diffusers folder of SD3: it lacks vae"):
        load(network_alone, configs, parts=str(tmp_path / "empty"))


def test_the_variant_is_known_by_its_weights_and_another_size_refused(shared):
    path, _, _ = shared
    variant = "sd35-medium" if "sd3.5" in str(path) else "sd3"
    with pytest.raises(ValueError, match=f"has 4 blocks 32 wide, {variant} has 24 of 1536. Set base.config"):
        SD3.load(str(path))


def test_the_large_variant_is_known_by_its_norms(shared, tmp_path):
    path = tmp_path / "large.safetensors"
    block = "model.diffusion_model.joint_blocks.0.x_block.attn"
    save_file({f"{block}.qkv.weight": torch.zeros(3, 8), f"{block}.ln_q.weight": torch.zeros(8)}, path)
    with pytest.raises(ValueError, match="has 1 blocks 8 wide, sd35-large has 38 of 2432"):
        SD3.load(str(path))


def test_a_missing_t5_tokenizer_says_where_to_find_one(shared, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    path, parts, configs = shared
    bare = tmp_path / "configs"
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "scheduler"):
        (bare / part).mkdir(parents=True)
        for file in (configs / part).glob("*.json"):
            (bare / part / file.name).write_text(file.read_text())
    tiny_base.tokenizers[0].save_pretrained(tmp_path / "words")
    options = {"tokenizer": str(tmp_path / "words")}
    with pytest.raises(FileNotFoundError, match="brings no usable T5 tokenizer") as raised:
        load(path, bare, **options)
    assert "Put the tokenizer_3 folder" in str(raised.value) and "or base.t5=false" in str(raised.value)
    assert len(load(path, bare, t5=False, **options).tokenizers) == 2
    t5_tokenizer().save_pretrained(tmp_path / "words" / "tokenizer_3")
    base, whole = load(path, bare, **options), load(path, configs)
    torch.testing.assert_close(base.encode_prompts(["a red star"]), whole.encode_prompts(["a red star"]))
    with pytest.raises(FileNotFoundError, match="brings no CLIP tokenizer"):
        load(path, bare, t5=False)


def test_t5_is_in_bf16_on_a_gpu(shared):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    base = load(*shared[::2], device="cuda")
    assert [e.dtype for e in base.text_encoders] == [torch.float32, torch.float32, torch.bfloat16]
    assert base.encode_prompts(["a red star"])["hidden"].dtype == torch.float32
