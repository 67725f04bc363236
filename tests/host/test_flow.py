"""The nodes on a flow model (SD3): the same nodes, another schedule."""

from __future__ import annotations

import pytest
import torch

from host.graphs import core_sampler, custom, loaded, pcm_sampler, sample, scheduler
from host.reference import conditioning, flow_euler
from host.server import Graph, out
from host.tiny import merge
from host.tiny_sd3 import file_of, make_transformer, make_vae
from phased_consistency.trainer.tiny.single_file import LATENT_SCALE, LATENT_SHIFT


def sd3(lora: str = "sd3.safetensors") -> tuple[Graph, dict[str, list]]:
    graph, links = loaded(lora, checkpoint="sd3.safetensors", text_width=4096)
    links["latent"] = out(graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1))
    return graph, links


def sampled(latent: torch.Tensor) -> torch.Tensor:
    """A stored latent as the model works on it."""
    return (latent - LATENT_SHIFT) * LATENT_SCALE


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
    modules = len(models.sd3_loras["everything"])
    assert run.text(links["model"][0]).splitlines() == [
        "4 steps, CFG 1 (1 to 2), deterministic.",
        f"SD3 PCM, {modules} of {modules} modules matched.",
        "Recipe from the file's header.",
    ]


def test_deterministic_is_diffusers_euler_on_merged_weights(server, models):
    graph, links = sd3()
    (latent,) = server.latents(graph, sample(graph, links))[1]
    transformer = make_transformer()
    merge(transformer, models.sd3_loras["everything"])
    x = flow_euler(transformer, *conditioning(4096), [1.0, 0.9, 0.75, 0.5])
    assert (sampled(latent) - x).abs().max() < 2e-5 * x.abs().max()


def test_every_kind_of_module_is_adapted_as_in_diffusers(server, models):
    """One LoRA per kind of module, its rows where the host wants them: fused q, k, v; scale and shift swapped."""
    graph, links = sd3()
    widgets = {"strength": 1.0, "recipe": "auto", "phases": 4, "mode": "deterministic", "cfg": 1.0}
    adapted = {"none": links["base"]}
    for kind in models.sd3_loras:
        adapted[kind] = out(graph.add("PCMLoadLora", model=links["base"], lora=file_of(kind), **widgets))
    nodes = {kind: sample(graph, {**links, "model": model}, steps=1) for kind, model in adapted.items()}
    latents = dict(zip(nodes, server.latents(graph, *nodes.values())[1], strict=True))
    text, wrong, idle = conditioning(4096), {}, []
    for kind, latent in latents.items():
        transformer = make_transformer()
        merge(transformer, models.sd3_loras.get(kind, {}))
        x = flow_euler(transformer, *text, [1.0])
        difference = (sampled(latent) - x).abs().max().item()
        if difference > 1e-5 * x.abs().max():
            wrong[kind] = difference
        if kind != "none" and (latent - latents["none"]).abs().max() < 1e-3:
            idle.append(kind)
    assert wrong == {}
    assert idle == []


def test_the_core_loader_reads_the_same_file_alike(server):
    """So what the trainer writes for SD3 needs this pack only for its recipe."""
    graph, links = sd3()
    core = graph.add("LoraLoaderModelOnly", model=links["base"], lora_name="sd3.safetensors", strength_model=1.0)
    latents = server.latents(graph, sample(graph, links), sample(graph, {**links, "model": out(core)}))[1]
    assert torch.equal(*latents)


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


def test_a_model_gets_the_shift_of_its_lora(server):
    """So that the host's own schedulers, and whatever else goes by the model, are right too."""
    graph, links = sd3("sd3_shift1.safetensors")
    simple = graph.add("BasicScheduler", model=links["model"], scheduler="simple", steps=4, denoise=1.0)
    level_nodes = [graph.add("TestSigmas", sigmas=s) for s in (out(simple), out(scheduler(graph, links)))]
    ours = sample(graph, links)
    euler = custom(graph, links, core_sampler(graph, "euler"), out(simple))
    run, latents = server.latents(graph, ours, euler)
    for node in level_nodes:
        assert run.outputs[node]["sigmas"] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0], abs=1e-6)
    assert (latents[0] - latents[1]).abs().max() < 1e-4
    assert run.text(links["model"][0]).splitlines()[-1] == "Shift set to 1, the LoRA's; it was 3."
    assert run.text(ours) == "4 steps at CFG 1, deterministic."


def test_a_shift_set_after_the_loader_is_told_and_not_used(server):
    graph, links = sd3("sd3_shift1.safetensors")
    shifted = out(graph.add("ModelSamplingSD3", model=links["model"], shift=5.0))
    shifted_twice, plain = sample(graph, {**links, "model": shifted}), sample(graph, links)
    run, latents = server.latents(graph, shifted_twice, plain)
    assert torch.equal(*latents)
    assert run.text(shifted_twice).splitlines()[0] == (
        "Shift 5 is not used, the LoRA's is 1: remove the node that sets it."
    )


def test_strength_0_leaves_the_shift_alone(server):
    graph, links = loaded("sd3_shift1.safetensors", checkpoint="sd3.safetensors", text_width=4096, strength=0.0)
    simple = graph.add("BasicScheduler", model=links["model"], scheduler="simple", steps=4, denoise=1.0)
    show = graph.add("TestSigmas", sigmas=out(simple))
    run = server.run(graph)
    assert run.outputs[show]["sigmas"] == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0], abs=1e-6)
    assert "Shift" not in run.text(links["model"][0])


def test_the_decoder_takes_sd3s_scaling_into_account(server):
    """TAESD for SD3 works on latents as they are sampled; the host hands it those it stores."""
    graph, links = sd3()
    latent = sample(graph, links)
    picture = graph.add("VAEDecode", samples=out(latent), vae=links["vae"])
    again = graph.add("VAEEncode", pixels=out(picture), vae=links["vae"])
    stored, encoded = server.latents(graph, latent, again)[1]
    vae = make_vae()
    with torch.no_grad():
        decoded = vae.decode(sampled(stored)).sample.clamp(-1, 1)
        expected = vae.encode(decoded).latents / LATENT_SCALE + LATENT_SHIFT
    assert (encoded - expected).abs().max() < 1e-4


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
