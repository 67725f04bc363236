"""The nodes on a flow model (SD3): the same nodes, another schedule."""

from __future__ import annotations

import pytest
import torch

from host.graphs import core_sampler, custom, loaded, pcm_sampler, sample, scheduler
from host.server import Graph, out


def sd3(lora: str = "sd3.safetensors") -> tuple[Graph, dict[str, list]]:
    graph, links = loaded(lora, checkpoint="sd3.safetensors", text_width=4096)
    links["latent"] = out(graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1))
    return graph, links


def test_deterministic_is_the_hosts_euler_on_its_simple_schedule(server, models):
    graph, links = sd3()
    ours = sample(graph, links)
    core = graph.add("LoraLoaderModelOnly", model=links["base"], lora_name="sd3.safetensors", strength_model=1.0)
    simple = graph.add("BasicScheduler", model=out(core), scheduler="simple", steps=4, denoise=1.0)
    euler = custom(graph, {**links, "model": out(core)}, core_sampler(graph, "euler"), out(simple))
    bare = sample(graph, {**links, "model": links["base"]})
    run, latents = server.latents(graph, ours, euler, bare)
    assert (latents[0] - latents[1]).abs().max() < 1e-4
    assert (latents[0] - latents[2]).abs().max() > 0.05
    assert f"{models.sd3_modules} of {models.sd3_modules} modules matched" in run.text(links["model"][0])


def test_stochastic_is_the_hosts_lcm(server):
    """With add_noise off the start is the same for every seed, so only the fresh noise is compared."""
    graph, links = sd3()
    sigmas = out(scheduler(graph, links))
    ours = custom(graph, links, pcm_sampler(graph, "stochastic"), sigmas, noise_seed=7, add_noise=False)
    lcm = [custom(graph, links, core_sampler(graph, "lcm"), sigmas, noise_seed=s, add_noise=False) for s in (7, 8)]
    latents = server.latents(graph, ours, *lcm)[1]
    assert min((latents[0] - other).abs().max() for other in latents[1:]) < 1e-4


def test_sigmas_follow_the_recipes_shift(server):
    graph, links = sd3()
    show = graph.add("TestSigmas", sigmas=out(scheduler(graph, links)))
    assert server.run(graph).outputs[show]["sigmas"] == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0], abs=1e-6)


def test_an_empty_latent_of_another_family_is_fitted(server):
    """A 4-channel EmptyLatentImage is what people leave in the graph when they change the checkpoint."""
    graph, links = sd3()
    four = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    latents = server.latents(graph, sample(graph, links), sample(graph, {**links, "latent": out(four)}))[1]
    assert torch.equal(*latents)


def test_an_sd15_lora_is_refused(server):
    graph, links = sd3("kohya.safetensors")
    graph.add("SaveLatent", samples=out(sample(graph, links)), filename_prefix="test")
    message = server.run(graph).error["exception_message"]
    assert message.startswith("kohya.safetensors is a LoRA for SD1.5, but the model is SD3.")
