"""LoRAs of other methods, known by their names: the same nodes against the host's own samplers and diffusers' TCD."""

from __future__ import annotations

import pytest
import torch

from host.graphs import core_sampler, custom, loaded, pcm_sampler, sample, scheduler
from host.reference import conditioning, tcd
from host.server import Graph, out
from host.test_flow import sd3
from host.test_sampling import LATENT_SCALE, largest_difference
from host.test_sdxl import sdxl
from host.tiny import make_unet, merge

SNAPPED = "ModelSamplingDiscrete (lcm) moves timesteps by up to 10: remove that node."


def with_lcm_timesteps(graph: Graph, links: dict[str, list]) -> list:
    return out(graph.add("ModelSamplingDiscrete", model=links["model"], sampling="lcm", zsnr=False))


def parts(graph: Graph, links: dict[str, list], **settings) -> str:
    """PCM Scheduler and PCM Sampler, all from the recipe."""
    ours = pcm_sampler(graph, "from recipe", recipe=links["recipe"])
    return custom(graph, links, ours, out(scheduler(graph, links)), **settings)


def re_noised(graph: Graph, links: dict[str, list], sigmas: list) -> list[str]:
    """The host's lcm, with the seeds at one of which it draws our noise (0.3.64 does not add 1 to it)."""
    return [
        custom(graph, links, core_sampler(graph, "lcm"), sigmas, add_noise=False, noise_seed=seed) for seed in (7, 8)
    ]


def simple(graph: Graph, model: list, name: str = "simple") -> list:
    return out(graph.add("BasicScheduler", model=model, scheduler=name, steps=4, denoise=1.0))


def test_an_lcm_file_is_the_hosts_lcm_with_its_timesteps(server):
    """The host's boundary terms, at most 4e-8 at these levels, are all that differs."""
    graph, links = loaded("lcm-lora-sdv1-5.safetensors")
    theirs = {**links, "model": with_lcm_timesteps(graph, links)}
    sigmas = simple(graph, theirs["model"])
    level_nodes = [graph.add("TestSigmas", sigmas=s) for s in (out(scheduler(graph, links)), sigmas)]
    nodes = [parts(graph, links, add_noise=False), *re_noised(graph, theirs, sigmas)]
    nodes += [sample(graph, links), sample(graph, theirs)]
    run, (ours, *others, whole, patched) = server.latents(graph, *nodes)
    levels, core = (run.outputs[node]["sigmas"] for node in level_nodes)
    assert levels == pytest.approx(core, rel=1e-5)
    assert min(largest_difference(ours, other) for other in others) < 1e-3
    assert largest_difference(whole, patched) < 1e-3, "ModelSamplingDiscrete (lcm) is not needed, and does no harm"
    assert run.text(links["model"][0]).splitlines()[0] == "4 steps, CFG 1 (1 to 2), stochastic."
    assert "SD1.5 LCM, " in run.text(links["model"][0])
    assert run.text(nodes[-1]) == "4 steps at CFG 1, stochastic."


def test_a_tcd_file_is_diffusers_tcd_on_merged_weights(server, models):
    graph, links = loaded("TCD-SD15-LoRA.safetensors")
    run, (latent,) = server.latents(graph, sample(graph, links))
    unet = make_unet()
    merge(unet, models.lora)
    x = tcd(unet, conditioning(768)[0], gamma=0.3)
    assert (LATENT_SCALE * latent - x).abs().max() < 2e-5 * x.abs().max()
    assert run.text(links["model"][0]).splitlines()[0] == "4 steps, CFG 1 (1 to 2), stochastic, gamma 0.3."


def test_the_widgets_can_describe_a_tcd_file(server):
    latents = []
    for lora, widgets in (
        ("TCD-SD15-LoRA.safetensors", {}),
        ("unnamed.safetensors", {"mode": "stochastic", "gamma": 0.3, "levels": "lcm"}),
        ("unnamed.safetensors", {"mode": "stochastic", "gamma": 0.3}),
        ("unnamed.safetensors", {"mode": "stochastic"}),
    ):
        graph, links = loaded(lora, **widgets)
        latents += server.latents(graph, sample(graph, links))[1]
    known, same, *others = latents
    assert torch.equal(known, same)
    assert all(largest_difference(known, other) > 0.1 for other in others)


def test_a_lightning_file_is_the_hosts_euler_and_a_dmd2_file_its_lcm(server):
    """Lightning's authors take sgm_uniform, which rounds otherwise: sigmas up to 0.3 % away."""
    graph, links = sdxl(lora="sdxl_lightning_4step_lora.safetensors")
    loader = graph.add(
        "PCMLoadLora", **graph[links["model"][0]]["inputs"] | {"lora": "dmd2_sdxl_4step_lora.safetensors"}
    )
    dmd2 = {**links, "model": out(loader), "recipe": out(loader, 1)}
    sigmas = simple(graph, links["model"])
    euler = custom(graph, links, core_sampler(graph, "euler"), sigmas)
    level_nodes = [graph.add("TestSigmas", sigmas=s) for s in (sigmas, simple(graph, links["model"], "sgm_uniform"))]
    nodes = [sample(graph, links), euler, parts(graph, dmd2, add_noise=False), *re_noised(graph, dmd2, sigmas)]
    run, (lightning, euler, ours, *others) = server.latents(graph, *nodes)
    assert (lightning - euler).abs().max() < 1e-5 * euler.abs().max()
    assert min((ours - other).abs().max() for other in others) < 1e-5 * ours.abs().max()
    exact, rounded = (run.outputs[node]["sigmas"] for node in level_nodes)
    assert exact == pytest.approx(rounded, rel=3e-3)
    assert "SDXL Lightning, " in run.text(links["model"][0]) and "SDXL DMD2, " in run.text(loader)


def test_cfg_and_timesteps_that_do_not_fit_are_told(server):
    graph, links = loaded("Hyper-SD15-8steps-CFG-lora.safetensors")
    snapped = sample(graph, {**links, "model": with_lcm_timesteps(graph, links)}, cfg=1.0)
    unmoved = sample(graph, {**links, "model": with_lcm_timesteps(graph, links)}, cfg=5.0, steps=2)
    run, _ = server.latents(graph, snapped, unmoved)
    assert run.text(links["model"][0]).splitlines()[0] == "8 steps, CFG 5 (5 to 8), deterministic."
    assert run.text(snapped).splitlines() == [
        "CFG 1 is below 5 and leaves the negative prompt unused: set CFG to 5.",
        SNAPPED,
        "8 steps at CFG 1, deterministic.",
    ]
    assert SNAPPED not in run.text(unmoved), "timesteps 999 and 499 are LCM's, too"


def test_a_strength_that_does_not_fit_is_told(server):
    graph, links = sd3("Hyper-SD3-4steps-CFG-lora.safetensors")
    run, _ = server.latents(graph, sample(graph, links))
    first, second, *_ = run.text(links["model"][0]).splitlines()
    assert first == "Made for strength 0.125, not 1: set strength to 0.125."
    assert second == "4 steps, CFG 3 (2 to 4), deterministic."
