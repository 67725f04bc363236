"""Today's transformers, small and random, built by the host from its own configs: with the authors' files and settings
Sample PCM draws what core's samplers draw."""

from __future__ import annotations

import math

import pytest

from host.dits import (
    FILES,
    LATENTS,
    core_lora,
    loaded_on,
    skip_where_lcm_repeats_its_noise,
    skip_without,
    transformer,
)
from host.graphs import core_sampler, custom, ksampler, sample, scheduler
from host.server import Graph, out

FLUX, TURBO, FLUX2 = "Hyper-FLUX.1-dev-8steps-lora", "FLUX.1-Turbo-Alpha", "flux.2-turbo-lora"
QWEN, QWEN_EDIT = "Qwen-Image-Lightning-4steps-V1.0", "Qwen-Image-Edit-2509-Lightning-8steps-V1.0-bf16"
ZIMAGE = "Z-Image-Fun-Lora-Distill-8-Steps-2602-ComfyUI"
LTX2, ANIMA = "ltx-2-19b-distilled-lora-384", "anima-turbo-lora-v0.2"
COSMOS, LTXV = "cosmos_of_tomorrow", "ltxv_of_tomorrow"
HIGH, LOW = (f"wan2.2_t2v_lightx2v_4steps_lora_v1.1_{noise}_noise" for noise in ("high", "low"))
WAN21 = "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32"
UNKNOWN = "something_of_tomorrow"
CLOSE = 1e-4


def flux_guided(graph: Graph, links: dict[str, list], guidance: float) -> dict[str, list]:
    """The links with FluxGuidance on the positive prompt."""
    return links | {"positive": out(graph.add("FluxGuidance", conditioning=links["positive"], guidance=guidance))}


def shifted(graph: Graph, model: list, kind: str, shift: float) -> list:
    """A model with the shift that core's workflows give it."""
    if kind == "flux":
        size = LATENTS[kind][1]
        return out(graph.add("ModelSamplingFlux", model=model, max_shift=1.15, base_shift=0.5, **size))
    node = "ModelSamplingSD3" if kind == "wan" else "ModelSamplingAuraFlow"
    return out(graph.add(node, model=model, shift=shift))


@pytest.mark.parametrize(
    ("file", "strength", "shift", "steps", "sampler"),
    [
        (FLUX, 0.125, None, 8, "euler"),
        (TURBO, 1.0, None, 8, "euler"),
        (QWEN, 1.0, 3.0, 4, "euler"),
        (QWEN_EDIT, 1.0, 3.0, 8, "euler"),
        (ZIMAGE, 0.8, 3.0, 8, "euler"),
        (WAN21, 1.0, 5.0, 4, "lcm"),
        (ANIMA, 1.0, 3.0, 8, "euler"),
    ],
)
def test_sample_pcm_is_cores_sampler_with_the_authors_settings(server, file, strength, shift, steps, sampler):
    kind = FILES[file]
    skip_without(server, kind)
    if sampler == "lcm":
        skip_where_lcm_repeats_its_noise(server)
    graph, links = transformer(kind, file, strength=strength)
    if kind == "flux":
        links = flux_guided(graph, links, 3.5)
    ours = sample(graph, links)
    model = shifted(graph, core_lora(graph, links["base"], file, strength), kind, shift)
    core = ksampler(graph, {**links, "model": model}, steps=steps, sampler_name=sampler)
    bare = sample(graph, {**links, "model": links["base"]})
    run, latents = server.latents(graph, ours, core, bare)
    assert (latents[0] - latents[1]).abs().max() < CLOSE
    assert (latents[0] - latents[2]).abs().max() > 0.01
    assert run.warnings(ours) == run.warnings(links["model"][0]) == []


def test_flux2_turbo_is_shifted_by_the_size_of_the_picture(server):
    """Its authors' numbers go through diffusers' pipeline, which shifts them by FLUX.2's mu for so many positions."""
    skip_without(server, "flux2")
    numbers = (1.0, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031)
    positions, steps = 8 * 6, 8
    line_10, line_200 = 8.73809524e-05 * positions + 1.89833333, 0.00016927 * positions + 0.45666666
    alpha = math.exp(line_200 + (line_10 - line_200) * (200 - steps) / 190)
    sigmas = [alpha * u / (1 + (alpha - 1) * u) for u in numbers]

    graph, links = transformer("flux2", FLUX2)
    links = flux_guided(graph, links, 2.5)
    ours = sample(graph, links)
    core = core_lora(graph, links["base"], FLUX2)
    levels = graph.add("TestNoise", seed=0, amount=1.0, sigmas=" ".join(map(repr, [*sigmas, 0.0])))
    euler = custom(graph, {**links, "model": core}, core_sampler(graph, "euler"), out(levels, 1))
    shown = graph.add("TestSigmas", sigmas=out(scheduler(graph, links, width=128, height=96)))
    run, latents = server.latents(graph, ours, euler)
    assert (latents[0] - latents[1]).abs().max() < CLOSE
    assert run.outputs[shown]["sigmas"] == pytest.approx([*sigmas, 0], abs=1e-6)
    assert run.warnings(ours) == []


def test_video_and_sound_in_one_latent(server):
    """LTX-2 by its authors' list of levels, as core's euler with the list; both parts are drawn."""
    skip_without(server, "ltxav")
    graph, links = transformer("ltxav", LTX2)
    both = graph.add(
        "LTXVConcatAVLatent", video_latent=links["latent"], audio_latent=out(graph.add("TestSound", length=8))
    )
    links["latent"] = out(both)
    ours = sample(graph, links)
    sigmas = "1 0.99375 0.9875 0.98125 0.975 0.909375 0.725 0.421875 0"
    levels = graph.add("TestNoise", seed=0, amount=1.0, sigmas=sigmas)
    core = {**links, "model": core_lora(graph, links["base"], LTX2)}
    euler = custom(graph, core, core_sampler(graph, "euler"), out(levels, 1))
    parts = [graph.add("LTXVSeparateAVLatent", av_latent=out(node)) for node in (ours, euler)]
    run, (video, sound, *other) = server.tensors(graph, *(out(part, slot) for part in parts for slot in (0, 1)))
    assert video.shape == (1, 128, 2, 3, 4) and sound.shape == (1, 8, 8, 16)
    for part, same in zip((video, sound), other, strict=True):
        assert part.std() > 0.1 and (part - same).abs().max() < CLOSE
    assert run.warnings(ours) == run.warnings(links["model"][0]) == []


def two_experts(low: str = LOW) -> tuple[Graph, dict[str, list]]:
    """Wan 2.2's two experts, each with its LoRA; low_noise_model is among the links."""
    graph, links = transformer("wan", HIGH)
    second = out(graph.add("TestTransformer", architecture="wan", seed=1))
    links |= {"low_base": second, "low_noise_model": loaded_on(graph, second, low)["model"]}
    return graph, links


def core_experts(graph: Graph, high: list, low: list, links: dict[str, list], split: int = 2) -> str:
    """Core's way: two KSamplerAdvanced, the second going on with the noisy latent of the first."""
    shared = {"noise_seed": 7, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    shared |= {"positive": links["positive"], "negative": links["negative"]}
    first = graph.add(
        "KSamplerAdvanced",
        **shared | {"model": high, "add_noise": "enable", "return_with_leftover_noise": "enable"},
        latent_image=links["latent"],
        start_at_step=0,
        end_at_step=split,
    )
    return graph.add(
        "KSamplerAdvanced",
        **shared | {"model": low, "add_noise": "disable", "return_with_leftover_noise": "disable"},
        latent_image=out(first),
        start_at_step=split,
        end_at_step=10000,
    )


def test_two_experts_are_cores_two_samplers(server):
    graph, links = two_experts()
    ours = sample(graph, links, low_noise_model=links["low_noise_model"])
    swapped = sample(graph, links | {"model": links["low_noise_model"]}, low_noise_model=links["model"])
    high = shifted(graph, core_lora(graph, links["base"], HIGH), "wan", 5.0)
    low = shifted(graph, core_lora(graph, links["low_base"], LOW), "wan", 5.0)
    run, latents = server.latents(graph, ours, core_experts(graph, high, low, links), swapped)
    assert latents[0].shape == (1, 16, 3, 12, 16)
    assert (latents[0] - latents[1]).abs().max() < CLOSE
    assert (latents[0] - latents[2]).abs().max() > 0.01
    assert run.text(ours).splitlines() == [
        "2 steps by the high-noise model, 2 by the low-noise one.",
        "4 steps at CFG 1, deterministic.",
    ]
    assert run.warnings(swapped) == [
        "The LoRA on model is for the low-noise expert: swap model and low_noise_model.",
    ]


def test_a_picture_set_in_motion_by_two_experts(server):
    """Wan 2.2's I2V, whose networks take the first frame beside the latent: the second expert has it too."""
    skip_without(server, "flux2")  # an older host's VAE for clips has one size alone
    high, low = (f"wan2.2_i2v_lightx2v_4steps_lora_v1_{noise}_noise" for noise in ("high", "low"))
    graph, links = transformer("wan_i2v", high)
    second = out(graph.add("TestTransformer", architecture="wan_i2v", seed=1, unet_name=""))
    more = {"low_noise_model": loaded_on(graph, second, low)["model"]}
    still = graph.add("TestPicture", width=128, height=96, channels=3, batch=1, seed=5, mask="middle")
    vae = out(graph.add("TestClipAutoencoder", seed=0))
    prompts = {name: links[name] for name in ("positive", "negative")}
    size = {"width": 128, "height": 96, "length": 9, "batch_size": 1}
    start = graph.add("WanImageToVideo", **prompts, **size, vae=vae, start_image=out(still))
    blank = sample(graph, links, **more)
    links |= {"positive": out(start), "negative": out(start, 1), "latent": out(start, 2)}
    ours = sample(graph, links, **more)
    models = [shifted(graph, core_lora(graph, *pair), "wan", 5.0) for pair in ((links["base"], high), (second, low))]
    run, latents = server.latents(graph, ours, core_experts(graph, *models, links), blank)
    assert (latents[0] - latents[1]).abs().max() < CLOSE
    assert (latents[0] - latents[2]).abs().max() > 0.01
    assert run.text(ours).splitlines()[0] == "2 steps by the high-noise model, 2 by the low-noise one."
    assert run.warnings(ours) == []


@pytest.mark.parametrize(
    ("kind", "name", "steps", "size"),
    [("schnell", "flux1-schnell", 4, 1), ("krea2", "krea2_turbo_fp8_scaled", 8, 5)],
)
def test_a_distilled_model_is_known_by_its_name(server, kind, name, steps, size):
    """They need no LoRA: PCM Recipe gives their levels, which are the host's own. size: of what the random networks
    draw, by which roundings grow."""
    skip_without(server, kind)
    graph, links = transformer(kind, unet_name=f"{name}.safetensors")
    widgets = {"recipe": "auto", "phases": 4, "mode": "deterministic", "cfg": 1.0}
    node = graph.add("PCMRecipe", model=links["base"], **widgets)
    ours = sample(graph, links | {"model": out(node), "recipe": out(node, 1)})
    core = ksampler(graph, links | {"model": links["base"]}, steps=steps)
    run, latents = server.latents(graph, ours, core)
    assert (latents[0] - latents[1]).abs().max() < CLOSE * size
    assert latents[1].std() > size / 2
    assert run.warnings(ours) == run.warnings(node) == []


@pytest.mark.parametrize("mode", ["deterministic", "stochastic"])
def test_a_flow_model_whose_levels_are_ratios(server, mode):
    """Cosmos Predict2: ComfyUI counts sigma / (1 - sigma), up to 80; a recipe's sigmas are the flow's own."""
    if mode == "stochastic":
        skip_where_lcm_repeats_its_noise(server)
    graph, links = transformer("cosmos", COSMOS, recipe="widgets", sigmas="1, 0.75, 0.5, 0.2", mode=mode)
    ours = sample(graph, links)
    levels = graph.add("TestNoise", seed=0, amount=1.0, sigmas="80 3 1 0.25 0")
    core = {**links, "model": core_lora(graph, links["base"], COSMOS)}
    sampler = core_sampler(graph, {"deterministic": "euler", "stochastic": "lcm"}[mode])
    theirs = custom(graph, core, sampler, out(levels, 1))
    bare = sample(graph, links | {"model": links["base"]})
    parts = custom(graph, links, sampler, out(scheduler(graph, links)))
    run, latents = server.latents(graph, ours, theirs, bare, parts)
    assert latents[0].shape == (1, 16, 3, 12, 16)
    rounding = 2e-5 * latents[1].abs().max()  # of points as large as 80 times the noise
    assert max((latents[0] - other).abs().max() for other in (latents[1], latents[3])) < rounding
    assert (latents[0] - latents[2]).abs().max() > 0.01
    assert run.warnings(ours) == run.warnings(links["model"][0]) == []


def test_a_mask_on_a_model_whose_levels_are_ratios(server):
    graph, links = transformer("cosmos", COSMOS, recipe="widgets", sigmas="1, 0.75, 0.5, 0.2")
    mask = graph.add("TestPicture", width=128, height=96, channels=3, batch=1, seed=5, mask="middle")
    links["latent"] = out(graph.add("SetLatentNoiseMask", samples=links["latent"], mask=out(mask, 1)))
    levels = graph.add("TestNoise", seed=0, amount=1.0, sigmas="80 3 1 0.25 0")
    core = {**links, "model": core_lora(graph, links["base"], COSMOS)}
    theirs = custom(graph, core, core_sampler(graph, "euler"), out(levels, 1))
    _, latents = server.latents(graph, sample(graph, links), theirs)
    assert (latents[0] - latents[1]).abs().max() < 2e-5 * latents[1].abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "This recipe is for two experts, and noise levels below 0.875 are the low-noise one's: connect that"),
        ({"recipe": None}, "A low-noise model is connected, but the recipe tells no boundary: set it"),
    ],
)
def test_a_second_expert_too_few_or_too_many_is_a_sentence(server, settings, message):
    graph, links = two_experts()
    more = {}
    if settings:
        links |= loaded_on(graph, links["base"], UNKNOWN, recipe="widgets")
        more = {"low_noise_model": links["low_noise_model"]}
    server_run = server.run(with_saved(graph, sample(graph, links, **more)))
    assert server_run.error["exception_message"].startswith(message)


def with_saved(graph: Graph, node: str) -> Graph:
    graph.add("SaveLatent", samples=out(node), filename_prefix="test")
    return graph


def test_fresh_noise_goes_on_through_both_experts(server):
    """A run over two equal models is the run of one, with fresh noise between its steps and under a mask too."""
    graph, links = transformer("wan", UNKNOWN, recipe="widgets", mode="stochastic", timesteps="1000, 750, 500, 250")
    mask = graph.add("TestPicture", width=128, height=96, channels=3, batch=1, seed=5, mask="middle")
    links["latent"] = out(graph.add("SetLatentNoiseMask", samples=links["latent"], mask=out(mask, 1)))
    one = sample(graph, links)
    by_hand = {"mode": "stochastic", "timesteps": "1000, 750, 500, 250", "boundary": 0.9}
    split = loaded_on(graph, links["base"], UNKNOWN, recipe="widgets", **by_hand)
    both = sample(graph, links | split, low_noise_model=links["model"])
    run, latents = server.latents(graph, one, both)
    assert (latents[0] - latents[1]).abs().max() < 1e-5
    assert run.text(both).splitlines()[0].startswith("2 steps by the high-noise model, 2 by")


@pytest.mark.parametrize("file", [UNKNOWN, LTXV])
def test_a_family_of_tomorrow_works_by_hand(server, file):
    """A file that nobody knows, on a model as the host has it: levels and shift are the widgets'."""
    graph, links = transformer(FILES[file], file, recipe="widgets", sigmas="1.0, 0.8, 0.3, 0")
    ours = sample(graph, links)
    levels = graph.add("TestNoise", seed=0, amount=1.0, sigmas="1 0.8 0.3 0")
    model = core_lora(graph, links["base"], file)
    euler = custom(graph, {**links, "model": model}, core_sampler(graph, "euler"), out(levels, 1))
    run, latents = server.latents(graph, ours, euler)
    assert (latents[0] - latents[1]).abs().max() < CLOSE
    assert run.text(links["model"][0]).splitlines()[0] == "3 steps, CFG 1 (1 to 2), deterministic."


@pytest.mark.parametrize("file", [TURBO, FLUX2, QWEN, ZIMAGE, HIGH])
def test_loras_take_what_core_takes(server, file):
    """Also biases and norms, which lightx2v's files have: with every file the model is core's with it."""
    skip_without(server, FILES[file])
    graph, links = transformer(FILES[file], file)
    model = core_lora(graph, links["base"], file)
    nodes = [ksampler(graph, {**links, "model": each}, steps=1) for each in (links["model"], model, links["base"])]
    _, latents = server.latents(graph, *nodes)
    assert (latents[0] - latents[1]).abs().max() < 1e-6
    assert (latents[0] - latents[2]).abs().max() > 0.01
