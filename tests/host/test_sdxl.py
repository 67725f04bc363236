"""The nodes on SDXL: eps-prediction, and v-prediction with zero terminal SNR, against the host's own and diffusers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from host.graphs import core_sampler, custom, loaded, pcm_sampler, sample, scheduler
from host.reference import conditioning, ddim
from host.server import Graph, out
from host.tiny import merge
from host.tiny_sdxl import make_sdxl_unet

LATENT_SCALE = 0.13025  # SDXL latents are stored unscaled and sampled scaled
KINDS = {
    "sdxl": ("sdxl_kohya.safetensors", {}),
    "sdxl_v": ("sdxl_v.safetensors", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
}


def sdxl(kind: str = "sdxl", lora: str = "") -> tuple[Graph, dict[str, list]]:
    return loaded(lora or KINDS[kind][0], f"{kind}.safetensors", text_width=2048, pooled_width=1280)


@pytest.fixture(scope="module", params=KINDS)
def results(request, server):
    """All of a kind's latents and texts by name, from one graph: the checkpoints are large for a test's."""
    graph, links = sdxl(request.param)
    sigmas = out(scheduler(graph, links))
    simple = graph.add("BasicScheduler", model=links["model"], scheduler="simple", steps=4, denoise=1.0)
    level_nodes = [graph.add("TestSigmas", sigmas=s) for s in (sigmas, out(simple))]
    nodes = {
        "ours": sample(graph, links),
        "euler": custom(graph, links, core_sampler(graph, "euler"), sigmas),
        "bare": sample(graph, {**links, "model": links["base"]}),
    }
    start = {"add_noise": False}
    nodes["stochastic"] = custom(graph, links, pcm_sampler(graph, "stochastic"), sigmas, noise_seed=7, **start)
    for seed in (7, 8):
        nodes[f"lcm {seed}"] = custom(graph, links, core_sampler(graph, "lcm"), sigmas, noise_seed=seed, **start)
    run, latents = server.latents(graph, *nodes.values())
    return SimpleNamespace(
        kind=request.param,
        report=run.text(links["model"][0]),
        sigmas=[run.outputs[node]["sigmas"] for node in level_nodes],
        **{name.replace(" ", "_"): latent for name, latent in zip(nodes, latents, strict=True)},
    )


def test_sigmas_are_the_hosts_table_values(results):
    """With zero terminal SNR the first is where the host ends its table."""
    ours, core = results.sigmas
    assert ours == pytest.approx(core, rel=1e-5)
    assert ours[0] == pytest.approx({"sdxl": 14.6146, "sdxl_v": 4518.76}[results.kind], rel=1e-5)


def test_deterministic_is_the_hosts_euler(results, models):
    """At sigma 4519 euler loses three digits where we lose none: it takes 4515 times the noise from 4519 times it."""
    size = results.ours.abs().max()
    assert (results.ours - results.euler).abs().max() < {"sdxl": 1e-5, "sdxl_v": 1e-3}[results.kind] * size
    assert (results.ours - results.bare).abs().max() > 0.1 * size
    matched = f"SDXL PCM, {len(models.sdxl_lora)} of {len(models.sdxl_lora)} modules matched."
    assert results.report.splitlines()[:2] == ["4 steps, CFG 1 (1 to 2), deterministic.", matched]


def test_stochastic_is_the_hosts_lcm(results):
    """From the same start, with the seed at which this host's lcm draws our noise (0.3.64 does not add 1 to it)."""
    differences = [(results.stochastic - other).abs().max() for other in (results.lcm_7, results.lcm_8)]
    assert min(differences) < 1e-5 * results.stochastic.abs().max()


def test_deterministic_is_diffusers_ddim_on_merged_weights(results, models):
    unet = make_sdxl_unet()
    merge(unet, models.sdxl_lora)
    text, pooled = conditioning(2048, 1280)
    # original size, crop, target size: the host's own for a picture of 64 x 64
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    x = ddim(unet, text, added=added, **KINDS[results.kind][1])
    assert (LATENT_SCALE * results.ours - x).abs().max() < 2e-5 * x.abs().max()


def test_key_styles_give_the_same_picture(server):
    graph, links = sdxl()
    nodes = [sample(graph, links)]
    for style in ("sdxl_peft.safetensors", "sdxl_raw.safetensors"):
        loader = graph.add("PCMLoadLora", **graph[links["model"][0]]["inputs"] | {"lora": style})
        nodes.append(sample(graph, {**links, "model": out(loader)}))
    kohya, *others = server.latents(graph, *nodes)[1]
    assert all(torch.equal(kohya, other) for other in others)


def test_a_lora_for_the_other_prediction_is_told(server):
    graph, links = sdxl("sdxl_v", "sdxl_kohya.safetensors")
    run, _ = server.latents(graph, sample(graph, links))
    first = run.text(links["model"][0]).splitlines()[0]
    assert first == "Made for models that predict noise, not this kind: load another checkpoint."


def test_an_unmarked_v_checkpoint_draws_as_the_marked_one(server):
    """ModelSamplingDiscrete says what the checkpoint does not, before or after the LoRA is loaded."""
    graph, links = sdxl("sdxl_v")
    base = out(graph.add("CheckpointLoaderSimple", ckpt_name="sdxl.safetensors"))
    loader = graph[links["model"][0]]["inputs"]
    early = graph.add("PCMLoadLora", **loader | {"model": as_v(graph, base)})
    late = graph.add("PCMLoadLora", **loader | {"model": base})
    before = {**links, "model": out(early), "recipe": out(early, 1)}
    after = {**links, "model": as_v(graph, out(late)), "recipe": out(late, 1)}
    levels = graph.add("TestSigmas", sigmas=out(scheduler(graph, after)))
    run, (marked, *others) = server.latents(graph, *(sample(graph, each) for each in (links, before, after)))
    assert all(torch.equal(marked, other) for other in others)
    assert run.outputs[levels]["sigmas"][0] == pytest.approx(4518.76, rel=1e-5), "the file's, which the model bears out"


def as_v(graph: Graph, model: list) -> list:
    """A link to this model, declared to predict v on a schedule with zero terminal SNR."""
    return out(graph.add("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=True))


def test_an_sd15_lora_is_refused(server):
    graph, links = sdxl(lora="kohya.safetensors")
    graph.add("SaveLatent", samples=out(sample(graph, links)), filename_prefix="test")
    message = server.run(graph).error["exception_message"]
    assert message.startswith("kohya.safetensors is a LoRA for SD1.5, but the model is SDXL.")
