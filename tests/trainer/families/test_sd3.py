"""SD3 and SD3.5: encodings, denoising and sampling as diffusers does them, features, and what is refused."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from phased_consistency.samplers import PhaseGrid
from phased_consistency.trainer.efficiency.blocks import recompute
from phased_consistency.trainer.families import loading
from phased_consistency.trainer.families.generate import generate
from phased_consistency.trainer.families.sd3 import SD3
from phased_consistency.trainer.lora.adapter import Adapter
from support.sd3_base import JOINT, make_pipeline, make_sd3_folder

PROMPTS = ["a red star on a blue background", ""]


@pytest.fixture(scope="module", params=["sd3", "sd3.5"])
def made(request, tiny_base, tmp_path_factory):
    """A diffusers folder with T5, its parts, and their pipeline; once as SD3, once as SD3.5."""
    folder, words = tmp_path_factory.mktemp(request.param), tiny_base.tokenizers[0]
    parts = make_sd3_folder(folder, words, dual=request.param == "sd3.5")
    return folder, parts, make_pipeline(parts, words)


@pytest.fixture(scope="module")
def base(made):
    return SD3.load(str(made[0]))


@pytest.fixture(scope="module")
def without_t5(made):
    return SD3.load(str(made[0]), t5=False)


@torch.no_grad()
def diffusers_encoding(pipeline, length):
    options = {"do_classifier_free_guidance": False, "max_sequence_length": length}
    hidden, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, **options)
    return {"hidden": hidden, "pooled": pooled}


def some_points(base, count=2, height=8, width=8):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 16, height, width, generator=generator), base.encode_prompts(PROMPTS[:count])


@pytest.mark.parametrize("length", [77, 12])
def test_prompts_are_encoded_as_diffusers_does(made, length):
    ours = SD3.load(str(made[0]), t5_length=length).encode_prompts(PROMPTS)
    assert ours["hidden"].shape == (2, 77 + length, JOINT)
    torch.testing.assert_close(ours, diffusers_encoding(made[2], length))


def test_without_t5_its_tokens_are_left_out(without_t5, made):
    """diffusers, told so, puts zeros in their place."""
    pipeline = made[2]
    t5, pipeline.text_encoder_3 = pipeline.text_encoder_3, None
    try:
        theirs = diffusers_encoding(pipeline, 77)
    finally:
        pipeline.text_encoder_3 = t5
    ours = without_t5.encode_prompts(PROMPTS)
    assert len(without_t5.text_encoders) == len(without_t5.tokenizers) == 2
    torch.testing.assert_close(ours["hidden"], theirs["hidden"][:, :77])
    torch.testing.assert_close(ours["pooled"], theirs["pooled"])
    assert theirs["hidden"].shape[1] == 154 and not theirs["hidden"][:, 77:].any()


def test_what_decides_the_encodings_is_told(base, without_t5):
    assert base.encoder_settings == "T5 of 77 tokens" and without_t5.encoder_settings == "no T5"


@pytest.mark.parametrize("ticks", [(1000, 250), (10, 999)])
def test_denoising_tells_the_transformer_its_shifted_time(base, made, ticks):
    x, condition = some_points(base)
    u = torch.tensor(ticks) / 1000
    with torch.no_grad():
        ours = base.denoise(x, torch.tensor(ticks), condition)
        time = 1000 * 3 * u / (1 + 2 * u)
        theirs = made[1].transformer(x, condition["hidden"], condition["pooled"], time).sample
    torch.testing.assert_close(ours, theirs)


def test_sampling_is_diffusers_flow_euler(base, made):
    """Four steps with guidance 4 over the grid's phase edges, which are sigmas 1, 0.9, 0.75, 0.5 at shift 3."""
    noise, condition = some_points(base, count=1)
    null = base.encode_prompts([""])
    ours = generate(base, condition, null, noise, PhaseGrid(100, 4).plan(4).ticks, 4.0, 0.0, seed=0)
    scheduler, x = FlowMatchEulerDiscreteScheduler(shift=3.0), noise
    scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    with torch.no_grad():
        for time in scheduler.timesteps:
            prompted, bare = (
                made[1].transformer(x, c["hidden"], c["pooled"], time.expand(1)).sample for c in (condition, null)
            )
            x = scheduler.step(bare + 4 * (prompted - bare), time, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_latents_are_shifted_and_scaled_both_ways(base, made):
    """Zeros in latent space are the VAE's shift factor, which PCM's own SD3 code forgets to subtract."""
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, spread = base.encode_images(pixels)
    vae = made[1].vae
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        torch.testing.assert_close(mean, (posterior.mean - 0.0609) * 1.5305)
        torch.testing.assert_close(spread, posterior.std * 1.5305)
        decoded = vae.decode(torch.full((1, 16, 4, 4), 0.0609)).sample
    torch.testing.assert_close(base.decode(torch.zeros(1, 16, 4, 4)), decoded.add(1).div(2).clamp(0, 1))


def test_the_shift_is_the_schedulers_unless_told(made, tmp_path):
    assert SD3.load(str(made[0])).schedule.shift == 3.0
    assert SD3.load(str(made[0]), shift=1.0).schedule.shift == 1.0


def test_a_scheduler_of_another_kind_is_refused(tiny_base, tmp_path):
    make_sd3_folder(tmp_path, tiny_base.tokenizers[0], t5=False)
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "DDIMScheduler", "beta_start": 0.1}))
    with pytest.raises(ValueError, match=r"is a DDIMScheduler .*; SD3 has FlowMatchEuler.* Set base.shift"):
        SD3.load(str(tmp_path))
    assert SD3.load(str(tmp_path), shift=3).schedule.shift == 3


def test_t5_is_used_where_there_is_one_and_missed_where_it_was_asked_for(base, tiny_base, tmp_path):
    assert len(base.text_encoders) == 3
    make_sd3_folder(tmp_path, tiny_base.tokenizers[0], t5=False)
    assert len(SD3.load(str(tmp_path)).text_encoders) == 2
    with pytest.raises(ValueError, match=r"has no text_encoder_3/, the T5-XXL .* or base.t5=false"):
        SD3.load(str(tmp_path), t5=True)


def test_only_the_flow_is_predicted(made):
    assert SD3.load(str(made[0]), prediction="flow", zero_terminal_snr=False, t5=False).prediction == "flow"
    with pytest.raises(ValueError, match="base.prediction is 'epsilon', but SD3 predicts the flow"):
        SD3.load(str(made[0]), prediction="epsilon")
    with pytest.raises(ValueError, match="zero_terminal_snr is for SD1.5 and SDXL"):
        SD3.load(str(made[0]), zero_terminal_snr=True)


@pytest.mark.parametrize(("resolution", "message"), [(40, "not a multiple of 16: use 32 or 48"), (144, "at most 128")])
def test_resolutions_that_the_transformer_cannot_take(base, resolution, message):
    assert base.latent_shape(128) == (16, 16, 16)
    with pytest.raises(ValueError, match=message):
        base.latent_shape(resolution)


def test_dummy_inputs_are_those_of_a_pass(base):
    inputs = base.dummy_inputs(base.network.config, 64, torch.zeros)
    assert base.network(**inputs).sample.shape == (1, *base.latent_shape(64))
    assert inputs["encoder_hidden_states"].shape[1:] == base.encode_prompts([""])["hidden"].shape[1:]


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_features_are_the_blocks_image_tokens_as_maps(base, size):
    x, condition = some_points(base, 2, *size)
    tick = torch.tensor([600, 40])
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: seen.append(output[1]))
        for block in base.feature_blocks(base.network)
    ]
    with torch.no_grad():
        base.denoise(x, tick, condition)
        for hook in hooks:
            hook.remove()
        features = base.features(x, tick, condition)
    assert [f.shape for f in features] == [(2, 32, size[0] // 2, size[1] // 2)] * 3
    for tokens, feature in zip(seen, features, strict=True):
        assert torch.equal(feature[:, :, 1, 2], tokens[:, size[1] // 2 + 2])


def test_features_have_the_same_gradient_with_gradient_checkpointing(made):
    base = SD3.load(str(made[0]))
    adapter = Adapter(base.network, base.lora_targets, rank=2, alpha=2.0, seed=0)
    x, condition = some_points(base)
    tick = torch.tensor([600, 40])

    def run():
        point = x.clone().requires_grad_()
        features = base.features(point, tick, condition)
        sum(f.square().mean() for f in features).backward()
        return features, point.grad

    plain, plain_gradient = run()
    recompute(adapter)
    checkpointed, gradient = run()
    base.denoise(x.clone().requires_grad_(), tick, condition).sum().backward()
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b)
    assert plain_gradient.abs().sum() > 0
    torch.testing.assert_close(plain_gradient, gradient)


def test_the_adapter_leaves_the_networks_precision_as_it_is(made):
    base = SD3.load(str(made[0]), dtype=torch.bfloat16, t5=False)
    Adapter(base.network, base.lora_targets, rank=2, alpha=1.0, seed=0)
    x, condition = some_points(base)
    assert base.network.dtype == torch.bfloat16
    assert base.denoise(x, torch.tensor([600, 40]), condition).dtype == torch.float32


FULL_SIZE = {
    "sd3": (2028.3, 340, [3, 7, 11, 15], 3072, "stable-diffusion-v3-medium/lora", "sd3_medium"),
    "sd35-medium": (2243.2, 392, [3, 7, 11, 15], 6144, "stable-diffusion-v3.5-medium/lora", "sd3.5_medium"),
    "sd35-large": (8056.6, 536, [5, 11, 18, 24], 3072, "stable-diffusion-v3.5-large/lora", "sd3.5_large"),
}


@pytest.mark.parametrize("variant", FULL_SIZE)
def test_full_size(variant):
    """Millions of parameters, adapted modules, feature blocks, the largest side, and what the LoRA says it is for."""
    parameters, modules, layers, side, architecture, version = FULL_SIZE[variant]
    config = json.loads((loading.CONFIGS / variant / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        network = SD3Transformer2DModel.from_config(config)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(parameters, abs=0.05)
    base = SD3(network, None, [], [], None, "flow", False, "empty", variant, "")
    assert [network.transformer_blocks[i] for i in layers] == base.feature_blocks(base.network)
    assert base.latent_shape(1024) == (16, 128, 128) and base.default_resolution == 1024
    with pytest.raises(ValueError, match=f"use at most {side}"):
        base.latent_shape(side + 16)
    assert (base.architecture, base.base_version) == (architecture, version)
    with torch.device("meta"):
        adapter = Adapter(network, SD3.lora_targets, rank=1, alpha=1.0, seed=0)
    assert len(adapter.layers) == modules
