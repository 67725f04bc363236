"""Models of other precisions, and with too little memory: the steps are the host's own, whatever the network is in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from host.graphs import core_sampler, custom, edit, loaded, picture, sample, scheduler
from host.server import Graph, out
from host.test_batches import ksampler
from host.test_editing import drawn, keeps_the_rest, nchw
from host.test_sampling import largest_difference

DTYPES = {  # weights as the loader stores them, and what they are computed in -> how far the picture may move
    ("default", "fp16"): 0.002,
    ("default", "bf16"): 0.02,
    ("fp8_e4m3fn", "fp32"): 0.2,
    ("fp8_e4m3fn", "bf16"): 0.2,
}


def in_precision(graph: Graph, links: dict[str, list], weights: str, computed: str) -> dict[str, list]:
    """The links, the LoRA put on the same network in another precision."""
    unet = graph.add("UNETLoader", unet_name="tiny.safetensors", weight_dtype=weights)
    loader = graph[links["model"][0]]["inputs"]
    patched = graph.add("PCMLoadLora", **loader | {"model": out(unet)})
    return {**links, "model": out(graph.add("ModelComputeDtype", model=out(patched), dtype=computed))}


@pytest.mark.parametrize("weights, computed", DTYPES)
def test_other_precisions(server, weights, computed):
    """Sample PCM on them is core's euler on them; and both come near what they are in fp32."""
    graph, links = loaded()
    links_of_model = in_precision(graph, links, weights, computed)
    euler = custom(graph, links_of_model, core_sampler(graph, "euler"), out(scheduler(graph, links)))
    ours, core, whole = server.latents(graph, sample(graph, links_of_model), euler, sample(graph, links))[1]
    assert ours.dtype == torch.float32
    assert largest_difference(ours, core) < 1e-4
    assert 1e-5 < (ours - whole).abs().max() / whole.abs().max() < DTYPES[weights, computed]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_model_that_is_loaded_in_part(server, share):
    """The LoRA stays on it, also on what the host patches as it runs; and so it does through an edit's VAE."""
    graph, links = loaded()
    short = {**links, "base": out(graph.add("TestOffload", model=links["base"], share=share))}
    loader = graph[links["model"][0]]["inputs"]
    short["model"] = out(graph.add("PCMLoadLora", **loader | {"model": short["base"]}))
    image_inputs = picture(graph, 64, 64)
    before = server.log.count("TestOffload")
    nodes = [sample(graph, each) for each in (links, short)]
    nodes += [out_of_edit(graph, each, image_inputs) for each in (links, short)]
    nodes += [sample(graph, {**links, "model": links["base"]})]
    whole, part, edited, edited_in_part, bare = server.latents(graph, *nodes)[1]
    said = server.log.split("TestOffload")[before + 1 :]
    assert said and all(share - 0.2 <= float(line.split()[0]) <= share + 0.01 for line in said)
    assert largest_difference(whole, part) < 1e-4
    assert largest_difference(edited, edited_in_part) < 1e-3
    assert largest_difference(whole, bare) > 0.1


def out_of_edit(graph: Graph, links: dict[str, list], image_inputs: dict[str, Any]) -> str:
    """An edit whose latent is passed on, so that it can be saved as those of samplers are."""
    node = edit(graph, links, "Inpaint", **image_inputs)
    return graph.add("RepeatLatentBatch", samples=out(node, 1), amount=1)


def test_the_lora_survives_an_unloading_between_nodes(server):
    graph, links = loaded()
    first = sample(graph, links)
    unloaded = graph.add("TestUnload", samples=out(first))
    later = [sample(graph, {**links, "latent": out(node)}, denoise=0.5) for node in (first, unloaded)]
    latents = server.latents(graph, *later, ksampler(graph, links))[1]
    assert torch.equal(latents[0], latents[1])


@pytest.mark.parametrize("height, most", [(64, 1e-5), (640, 0.01)])
def test_tiled_decoding(server, height, most):
    """The same for a picture smaller than a tile, nearly so for a larger one; what an edit keeps it still keeps."""
    graph, links = loaded()
    image_inputs = picture(graph, 64, height)
    nodes = [
        edit(graph, links, "Inpaint", **image_inputs, last_decode=last_decode) for last_decode in ("whole", "tiled")
    ]
    latent = graph.add("EmptyLatentImage", width=64, height=height, batch_size=1)
    samples = out(sample(graph, {**links, "latent": out(latent)}, steps=2))
    tiles = {"tile_size": 512, "overlap": 128, "temporal_size": 64, "temporal_overlap": 8}
    nodes += [graph.add("VAEDecode", samples=samples, vae=links["vae"])]
    nodes += [graph.add("VAEDecodeTiled", samples=samples, vae=links["vae"], **tiles)]
    _, (whole, tiled, core_whole, core_tiled) = server.tensors(graph, *map(out, nodes))
    assert (whole - tiled).abs().max() < most and (core_whole - core_tiled).abs().max() < most
    before, mask = drawn(64, height)
    assert keeps_the_rest(before, nchw(tiled), mask)
