"""The sampling nodes against the host's own samplers, and against diffusers."""

from __future__ import annotations

import pytest
import torch

from host.graphs import core_sampler, custom, ksampler, loaded, pcm_sampler, sample, scheduler
from host.reference import conditioning, ddim
from host.server import Graph, out
from host.tiny import RECIPE, make_unet, merge

LATENT_SCALE = 0.18215  # SD1.5 latents are stored unscaled and sampled scaled


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between two saved latents, in the units that the model works in; a random network's reach 49 there."""
    return LATENT_SCALE * (a - b).abs().max().item()


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_sigmas_are_the_hosts_table_values(server, steps):
    graph, links = loaded()
    ours = graph.add("TestSigmas", sigmas=out(scheduler(graph, links, steps=steps)))
    simple = graph.add("BasicScheduler", model=links["model"], scheduler="simple", steps=steps, denoise=1.0)
    core = graph.add("TestSigmas", sigmas=out(simple))
    outputs = server.run(graph).outputs
    assert outputs[ours]["sigmas"] == pytest.approx(outputs[core]["sigmas"], rel=1e-6)


@pytest.mark.parametrize("steps, cfg", [(4, 1.0), (8, 1.5)])
def test_deterministic_is_the_hosts_euler(server, steps, cfg):
    graph, links = loaded()
    sigmas = out(scheduler(graph, links, steps=steps))
    ours = sample(graph, links, steps=steps, cfg=cfg)
    euler = custom(graph, links, core_sampler(graph, "euler"), sigmas, cfg=cfg)
    parts = custom(graph, links, pcm_sampler(graph, "from recipe", recipe=links["recipe"]), sigmas, cfg=cfg)
    latents = server.latents(graph, ours, euler, parts)[1]
    assert largest_difference(latents[0], latents[1]) < 1e-4
    assert torch.equal(latents[0], latents[2])


def test_deterministic_is_diffusers_ddim_on_merged_weights(server, models):
    """The same weights, noise and steps in another library; float32, so other kernels may differ by 1e-6."""
    graph, links = loaded()
    (latent,) = server.latents(graph, sample(graph, links))[1]
    unet = make_unet()
    merge(unet, models.lora)
    x = ddim(unet, conditioning(768)[0])
    assert (LATENT_SCALE * latent - x).abs().max() < 1e-5 * x.abs().max()


def test_stochastic_follows_the_seed(server):
    graph, links = loaded("stochastic.safetensors")
    first, other = sample(graph, links, seed=7), sample(graph, links, seed=8)
    latents = server.latents(graph, first, other)[1]
    assert largest_difference(*latents) > 0.1


def test_stochastic_is_the_hosts_lcm(server):
    """From the same start, with the seed at which this host's lcm draws our noise (0.3.64 does not add 1 to it)."""
    graph, links = loaded("stochastic.safetensors")
    sigmas = out(scheduler(graph, links))
    settings = {"add_noise": False}
    ours = custom(graph, links, pcm_sampler(graph, "stochastic"), sigmas, noise_seed=7, **settings)
    theirs = [custom(graph, links, core_sampler(graph, "lcm"), sigmas, noise_seed=s, **settings) for s in (7, 8)]
    latents = server.latents(graph, ours, *theirs)[1]
    assert min(largest_difference(latents[0], other) for other in latents[1:]) < 1e-4


def test_gamma_runs_from_deterministic_to_stochastic(server):
    graph, links = loaded()
    sigmas = out(scheduler(graph, links))
    modes = [("deterministic", 0.3), ("gamma", 0.0), ("gamma", 0.3), ("gamma", 1.0), ("stochastic", 0.3)]
    nodes = [custom(graph, links, pcm_sampler(graph, mode, gamma), sigmas) for mode, gamma in modes]
    none, zero, some, one, all_fresh = server.latents(graph, *nodes)[1]
    assert torch.equal(none, zero)
    assert torch.equal(one, all_fresh)
    assert min(largest_difference(some, none), largest_difference(some, one)) > 0.01


def test_denoise_enters_the_grid_at_an_edge_and_says_so(server):
    graph, links = loaded()
    links["latent"] = out(graph.add("TestLatent", seed=3, batch=1))
    ours = sample(graph, links, denoise=0.4)
    halves = graph.add("SplitSigmas", sigmas=out(scheduler(graph, links)), step=2)
    euler = custom(graph, links, core_sampler(graph, "euler"), out(halves, 1))
    run, latents = server.latents(graph, ours, euler)
    assert "denoise 0.4 starts at the nearest phase edge, which is 0.5: 2 of 4 steps." in run.text(ours)
    assert largest_difference(*latents) < 1e-4


@pytest.mark.parametrize(("denoise", "steps"), [(0.25, 1), (0.5, 2), (0.75, 3)])
def test_the_hosts_ksampler_is_the_same_at_steps_times_denoise(server, denoise, steps):
    """With euler and simple, and nothing to say of it."""
    graph, links = loaded()
    links["latent"] = out(graph.add("TestLatent", seed=3, batch=1))
    core = ksampler(graph, links, denoise=denoise, steps=steps)
    run, latents = server.latents(graph, sample(graph, links, denoise=denoise), core)
    assert largest_difference(*latents) < 1e-4
    assert "never saw" not in run.text(links["model"][0])


def test_wrong_steps_and_cfg_are_told_on_the_node(server):
    graph, links = loaded()
    wrong, right = sample(graph, links, steps=3, cfg=7.0), sample(graph, links)
    run, _ = server.latents(graph, wrong, right)
    lines = run.text(wrong).splitlines()
    warnings = RECIPE.warnings(3, 7.0)
    assert len(warnings) == 2 and lines[:2] == warnings
    assert lines[-1] == "3 steps at CFG 7, deterministic."
    assert run.text(right) == "4 steps at CFG 1, deterministic."


def test_a_browser_sees_text_previews_and_progress(server):
    graph, links = loaded()
    node = sample(graph, links, seed=100, steps=2)  # a seed of its own, so that nothing is cached
    graph.add("SaveLatent", samples=out(node), filename_prefix="test")
    seen = server.watch(graph)
    assert seen.texts[node].splitlines()[0] == RECIPE.warnings(2, 1.0)[0]
    assert seen.progress[node] == (2, 2)
    assert seen.previews == 2


def test_the_masked_rest_stays(server):
    graph, links = loaded()
    start = graph.add("TestLatent", seed=3, batch=1)
    half = graph.add("SolidMask", value=1.0, width=32, height=64)
    none = graph.add("SolidMask", value=0.0, width=64, height=64)
    mask = graph.add("MaskComposite", destination=out(none), source=out(half), x=0, y=0, operation="add")
    links["latent"] = out(graph.add("SetLatentNoiseMask", samples=out(start), mask=out(mask)))
    before, after = server.latents(graph, start, sample(graph, links))[1]
    assert largest_difference(before[..., 4:], after[..., 4:]) < 1e-4
    assert largest_difference(before[..., :4], after[..., :4]) > 0.1


def test_one_of_a_batch_can_be_had_again(server):
    graph, links = loaded()
    batch = graph.add("TestLatent", seed=3, batch=2)
    second = graph.add("LatentFromBatch", samples=out(batch), batch_index=1, length=1)
    both = sample(graph, {**links, "latent": out(batch)})
    alone = sample(graph, {**links, "latent": out(second)})
    latents = server.latents(graph, both, alone)[1]
    assert largest_difference(latents[0][1:], latents[1]) < 1e-3


def test_with_a_controlnet(server):
    graph, links = loaded()
    net = graph.add("ControlNetLoader", control_net_name="tiny.safetensors")
    picture = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0x8040C0)
    settings = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    inputs = {"positive": links["positive"], "negative": links["negative"], "image": out(picture)}
    applied = graph.add("ControlNetApplyAdvanced", control_net=out(net), **inputs, **settings)
    guided = {**links, "positive": out(applied), "negative": out(applied, 1)}
    euler = custom(graph, guided, core_sampler(graph, "euler"), out(scheduler(graph, links)))
    latents = server.latents(graph, sample(graph, guided), euler, sample(graph, links))[1]
    assert largest_difference(latents[0], latents[1]) < 1e-4
    assert largest_difference(latents[0], latents[2]) > 0.1


def test_with_another_lora_and_the_advanced_sampler(server):
    graph, links = loaded()
    style = {"lora_name": "style.safetensors", "strength_model": 0.7}
    stacked = graph.add("LoraLoaderModelOnly", model=links["model"], **style)
    pcm = graph.add("LoraLoaderModelOnly", model=links["base"], lora_name="kohya.safetensors", strength_model=1.0)
    core = graph.add("LoraLoaderModelOnly", model=out(pcm), **style)
    sigmas, noise = out(scheduler(graph, links)), out(graph.add("RandomNoise", noise_seed=7))

    def advanced(model: str, sampler: str) -> str:
        guider = graph.add("BasicGuider", model=out(model), conditioning=links["positive"])
        rest = {"sampler": out(sampler), "sigmas": sigmas, "latent_image": links["latent"]}
        return graph.add("SamplerCustomAdvanced", noise=noise, guider=out(guider), **rest)

    ours = advanced(stacked, pcm_sampler(graph, "from recipe", recipe=links["recipe"]))
    theirs = advanced(core, core_sampler(graph, "euler"))
    alone = sample(graph, links)
    latents = server.latents(graph, ours, theirs, alone)[1]
    assert largest_difference(latents[0], latents[1]) < 1e-4
    assert largest_difference(latents[0], latents[2]) > 0.1


def test_a_clamped_lora_divides_by_at_least_min_alpha(server):
    """One step of euler is x0, which the clamp scales. What a mask keeps is not scaled, however soft the mask."""
    graph, links = loaded("clamped.safetensors")
    start = out(graph.add("TestLatent", seed=3, batch=1))
    mask = graph.add("SolidMask", value=0.25, width=64, height=64)
    masked = {**links, "latent": out(graph.add("SetLatentNoiseMask", samples=start, mask=out(mask)))}
    sigmas = out(scheduler(graph, links))
    ours = pcm_sampler(graph, "from recipe", recipe=links["recipe"])
    nodes = [sample(graph, links), custom(graph, links, ours, sigmas)]
    nodes += [custom(graph, links, core_sampler(graph, "euler"), sigmas)]
    nodes += [custom(graph, masked, sampler, sigmas) for sampler in (ours, core_sampler(graph, "euler"))]
    run, (whole, parts, plain, kept, mixed) = server.latents(graph, *nodes)
    (start,) = server.latents(Graph({"1": graph[start[0]]}), "1")[1]
    factor = 0.068265 / 0.5
    assert torch.equal(whole, parts)
    assert largest_difference(whole, factor * plain) < 1e-3
    assert largest_difference(kept, factor * (mixed - 0.75 * start) + 0.75 * start) < 1e-3
    assert run.text(nodes[0]) == "1 step at CFG 1, deterministic."


def test_a_sampler_without_a_recipe_says_what_to_do(server):
    graph, links = loaded()
    sampled = custom(graph, links, pcm_sampler(graph, "from recipe"), out(scheduler(graph, links)))
    graph.add("SaveLatent", samples=out(sampled), filename_prefix="test")
    error = server.run(graph).error
    assert error["exception_message"].startswith("PCM Sampler has the mode 'from recipe' but no recipe: connect")
