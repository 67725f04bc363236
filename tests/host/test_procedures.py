"""Strokes, denoising and interpolation: each is what simpler nodes make of it."""

from __future__ import annotations

import pytest
import torch

from host.graphs import edit, loaded, picture, sample
from host.server import out
from host.test_editing import drawn, from_file, odd_vae
from host.test_flow import sd3
from host.test_sampling import LATENT_SCALE as SD15_SCALE
from phased_consistency.samplers import FlowSchedule, PhaseGrid, VPSchedule
from phased_consistency.samplers.editing import denoise_plan, estimated_noise, k_noise_to_signal
from phased_consistency.trainer.tiny.single_file import LATENT_SCALE as SD3_SCALE

SCALE = {"sd15": SD15_SCALE, "sd3": SD3_SCALE}


@pytest.mark.parametrize("lora", ["kohya", "TCD-SD15-LoRA"])
def test_interpolation_begins_and_ends_with_the_single_pictures(server, lora):
    graph, links = loaded(f"{lora}.safetensors")
    other_links = {**links, "positive": links["negative"]}
    frames = edit(graph, links, "Interpolate", latent_image=links["latent"], positive_b=other_links["positive"])
    ends = [sample(graph, links, seed=7, steps=2), sample(graph, other_links, seed=9, steps=2)]
    images = [out(graph.add("VAEDecode", samples=out(end), vae=links["vae"])) for end in ends]
    wanted = [out(frames), out(frames, 1), *map(out, ends), *images]
    run, (images, latents, first, last, first_image, last_image) = server.tensors(graph, *wanted)
    assert torch.equal(latents[:1], first) and torch.equal(latents[2:], last)
    assert torch.equal(images[:1], first_image) and torch.equal(images[2:], last_image)
    assert min((latents[1] - end).abs().max() for end in (first, last)) > 0.1
    assert run.text(frames).splitlines()[-1] == "3 frames, each of them sampled by itself."


def test_interpolating_one_prompt_and_seed_stands_still_and_prompts_alone_go_the_cores_way(server):
    """ConditioningAverage adds up otherwise than lerp. Its texts are of two lengths here, as from long prompts."""
    graph, links = loaded()
    longer = out(
        graph.add("ConditioningConcat", conditioning_to=links["negative"], conditioning_from=links["positive"])
    )
    average = graph.add(
        "ConditioningAverage",
        conditioning_to=longer,
        conditioning_from=links["positive"],
        conditioning_to_strength=0.5,
    )
    one = {"latent_image": links["latent"], "seed_b": 7}
    still = edit(graph, links, "Interpolate", positive_b=links["positive"], **one)
    prompts = edit(graph, links, "Interpolate", positive_b=longer, **one)
    single = sample(graph, {**links, "positive": out(average)}, steps=2)
    _, (same, moving, middle) = server.tensors(graph, out(still, 1), out(prompts, 1), out(single))
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    assert (moving[1] - middle).abs().max() < 1e-4 * middle.abs().max()
    assert (moving[1] - moving[2]).abs().max() > 0.01


def test_interpolation_under_a_mask_keeps_the_rest(server):
    graph, links = loaded()
    image_inputs = picture(graph, 64, 64)
    encoded = graph.add("VAEEncode", pixels=image_inputs["image"], vae=links["vae"])
    masked = graph.add("SetLatentNoiseMask", samples=out(encoded), mask=image_inputs["mask"])
    frames = edit(graph, links, "Interpolate", latent_image=out(masked), positive_b=links["negative"], frames=2)
    again = sample(graph, {**links, "latent": out(frames, 1)}, steps=1)
    _, (start, latents, later) = server.tensors(graph, out(encoded), out(frames, 1), out(again))
    for each in (latents, later):
        assert (each - start)[..., 5:, :].abs().max() < 1e-4
    assert (latents[0] - latents[1]).abs().max() > 0.1


def test_strokes_are_sample_pcm_from_the_nearest_edge(server):
    graph, links = loaded()
    image = picture(graph, 64, 64)["image"]
    encoded = out(graph.add("VAEEncode", pixels=image, vae=links["vae"]))
    painted = edit(graph, links, "Stroke", image=image, strength=0.7, steps=0)
    plain = sample(graph, {**links, "latent": encoded}, denoise=0.75)
    run, latents = server.tensors(graph, out(painted, 1), out(plain))
    assert torch.equal(*latents)
    assert run.text(painted).splitlines() == [
        "strength 0.7 starts at the nearest phase edge, which is 0.75: 3 of 4 steps.",
        "3 steps at CFG 1, deterministic.",
        "The strength is 0.75.",
    ]


def test_strokes_take_two_levels_of_a_lora_without_phases(server):
    graph, links = loaded("lcm-lora-sdv1-5.safetensors")
    painted = edit(graph, links, "Stroke", image=picture(graph)["image"], strength=0.75, steps=0)
    run, _ = server.tensors(graph, out(painted))
    assert run.text(painted).splitlines()[:2] == ["2 steps at CFG 1, stochastic.", "The strength is 0.76."]


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_denoising_enters_at_the_level_that_is_as_noisy(server, family):
    """Against core nodes, with the noise in the latent measured here: what of the level is missing is added."""
    graph, links = loaded() if family == "sd15" else sd3()
    links["vae"] = odd_vae(graph, links, "loud")  # a random one hears little of noise
    image_link = picture(graph, 64, 64)["image"]
    image, _ = drawn(64, 64)
    encoded = out(graph.add("VAEEncode", pixels=image_link, vae=links["vae"]))
    first = edit(graph, links, "Denoise", image=image_link, noise=40.0, steps=0)
    more = image + torch.randn(image.shape, generator=torch.Generator().manual_seed(7)) * 40 / 255
    noisier = graph.add("VAEEncode", pixels=from_file(server, graph, more.clamp(0, 1)), vae=links["vae"])
    _, (clean, noisy) = server.tensors(graph, encoded, out(noisier))
    ratio = SCALE[family] * (noisy - clean).std().item()

    schedule = VPSchedule.from_betas() if family == "sd15" else FlowSchedule(3.0)
    plan = denoise_plan(PhaseGrid(40 if family == "sd15" else 100, 4), schedule, ratio)
    missing = (1 - (ratio / k_noise_to_signal(schedule)[plan.ticks[0]].item()) ** 2) ** 0.5
    assert 0.05 < missing < 0.999 and plan.steps >= 1
    sigmas = " ".join(map(repr, schedule.k_sigma(plan.ticks).tolist()))
    start = graph.add("TestNoise", seed=7, amount=missing, sigmas=sigmas)
    guider = graph.add("BasicGuider", model=links["model"], conditioning=links["positive"])
    euler = graph.add("KSamplerSelect", sampler_name="euler")
    theirs = graph.add(
        "SamplerCustomAdvanced",
        noise=out(start),
        guider=out(guider),
        sampler=out(euler),
        sigmas=out(start, 1),
        latent_image=encoded,
    )
    _, (ours, core) = server.tensors(graph, out(first, 1), out(theirs))
    assert (ours - core).abs().max() < 1e-4 * core.abs().max()


def test_noise_is_estimated_and_told(server):
    graph, links = loaded()
    noisy = edit(graph, links, "Denoise", image=picture(graph)["image"], steps=0)
    even = out(graph.add("EmptyImage", width=70, height=50, batch_size=1, color=0x406080))
    clean = edit(graph, links, "Denoise", image=even, steps=0)
    run, (after, before, _) = server.tensors(graph, out(clean), even, out(noisy))
    estimate = 255 * estimated_noise(drawn()[0])
    assert run.text(noisy).splitlines()[0] == f"The noise was estimated: {estimate:.1f} levels of 255."
    assert torch.equal(after, before)
    assert run.text(clean).splitlines()[1] == "There is none to take out: the picture is given back as it is."
