"""Our patched model under the samplers of well-known packs: the picture of core's KSampler, and our watch's words."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch

from host.graphs import ksampler, loaded, picture
from host.packs import EFFICIENCY, IMPACT, UPSCALER, basic_pipe
from host.server import Graph, Server, out

LCM = "lcm-lora-sdv1-5.safetensors"
BURNS = "CFG 7 is above 2 and burns the image: set CFG to 1."
SAMPLER = "Sampler dpmpp_2m does not suit this LoRA: take euler, or PCM Sampler."
STEPS = "This LoRA was made for 4 steps, not 8: set steps to 4."
LEVELS = "This LoRA never saw these sigmas: for denoise 0.5 set steps to 2, scheduler simple."
RIGHT = "4 steps, CFG 1 (1 to 2), deterministic."  # what our loader begins with where nothing is wrong
MISTAKES = {BURNS: {"cfg": 7.0}, SAMPLER: {"sampler_name": "dpmpp_2m"}, STEPS: {"steps": 8}}
Links = dict[str, list]


def by_efficient(graph: Graph, links: Links, **settings: Any) -> list:
    """The latent of KSampler (Efficient)."""
    node = ksampler(graph, links, **settings)
    graph[node]["class_type"] = "KSampler (Efficient)"
    graph[node]["inputs"] |= {"preview_method": "none", "vae_decode": "false"}
    return out(node, 3)


def by_efficient_advanced(graph: Graph, links: Links, **settings: Any) -> list:
    """The latent of KSampler Adv. (Efficient), with all steps."""
    latent = by_efficient(graph, links, **settings)
    entry = graph[latent[0]]
    entry["class_type"] = "KSampler Adv. (Efficient)"
    entry["inputs"] |= {"noise_seed": entry["inputs"].pop("seed"), "start_at_step": 0, "end_at_step": 10000}
    entry["inputs"] |= {"add_noise": "enable", "return_with_leftover_noise": "disable"}
    del entry["inputs"]["denoise"]
    return latent


def by_pipe(graph: Graph, links: Links, **settings: Any) -> list:
    """The latent of Impact-Pack's KSampler (pipe)."""
    node = ksampler(graph, links, **settings)
    graph[node]["class_type"] = "ImpactKSamplerBasicPipe"
    for name in ("model", "positive", "negative"):
        del graph[node]["inputs"][name]
    graph[node]["inputs"]["basic_pipe"] = basic_pipe(graph, links)
    return out(node, 1)


def by_provider(graph: Graph, links: Links, **settings: Any) -> list:
    """The latent of Impact-Pack's KSamplerProvider, by its node that samples outside a mask, then inside: here all is
    inside."""
    node = by_pipe(graph, links, **settings)[0]
    latent = graph[node]["inputs"].pop("latent_image")
    copy = out(graph.add("RepeatLatentBatch", samples=latent, amount=1))  # it writes into the latent that it gets
    graph[node]["class_type"] = "KSamplerProvider"
    everywhere = out(graph.add("SolidMask", value=1.0, width=64, height=64))
    both = {"base_sampler": out(node), "mask_sampler": out(node), "mask": everywhere}
    return out(graph.add("TwoSamplersForMask", latent_image=copy, **both))


WAYS = {by_efficient: EFFICIENCY, by_efficient_advanced: EFFICIENCY, by_pipe: IMPACT, by_provider: IMPACT}
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@each_way
@pytest.mark.parametrize(("lora", "sampler"), [("kohya.safetensors", "euler"), (LCM, "lcm"), (LCM, "euler")])
def test_the_picture_is_core_ksamplers_to_the_bit(beside, way: Callable, lora, sampler):
    graph, links = loaded(lora)
    theirs = way(graph, links, sampler_name=sampler)
    core = out(ksampler(graph, links, sampler_name=sampler))
    _, latents = beside(WAYS[way]).tensors(graph, theirs, core)
    assert torch.equal(*latents) and latents[0].abs().max() > 0.1


@each_way
def test_mistakes_there_are_told_on_our_loader(beside, way: Callable):
    server = beside(WAYS[way])
    for sentence, settings in MISTAKES.items():
        assert words(server, way, **settings)[0] == sentence
    assert words(server, way, seed=40)[0] == RIGHT


def words(server: Server, way: Callable[..., list], **settings: Any) -> list[str]:
    """What our loader says of a run, as a browser is told."""
    graph, links = loaded()
    graph.add("TestTensor", value=way(graph, links, **settings), name=uuid.uuid4().hex)
    seen = server.watch(graph)
    assert seen.error is None, seen.error["exception_message"]
    return seen.texts[links["model"][0]].splitlines()


def by_regions(graph: Graph, links: Links, **settings: Any) -> list:
    """The latent of Impact-Pack's RegionalSampler, which runs two KSamplerAdvancedProviders a step at a time."""
    widgets = {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "sigma_factor": 1.0} | settings
    sampler = out(graph.add("KSamplerAdvancedProvider", basic_pipe=basic_pipe(graph, links), **widgets))
    regions = out(graph.add("RegionalPrompt", mask=picture(graph, 64, 64)["mask"], advanced_sampler=sampler))
    seeds = {"seed": 41, "seed_2nd": 0, "seed_2nd_mode": "ignore"}
    more = {"additional_mode": "ratio between", "additional_sampler": "AUTO", "additional_sigma_ratio": 0.3}
    more |= {"steps": 4, "base_only_steps": 1, "denoise": 1.0, "overlap_factor": 0, "restore_latent": True}
    inputs = {"samples": links["latent"], "base_sampler": sampler, "regional_prompts": regions}
    return out(graph.add("RegionalSampler", **inputs, **seeds, **more))


def test_impacts_regions(beside):
    server = beside(IMPACT)
    assert words(server, by_regions, cfg=7.0)[0] == BURNS
    assert words(server, by_regions)[0] == RIGHT


def by_detailer(graph: Graph, links: Links, **settings: Any) -> list:
    """The picture of Impact-Pack's DetailerForEach, with its defaults but for sizes, on the middle of a picture.

    It would put DifferentialDiffusion on the model itself, which its versions of 2024 cannot do on newer hosts.
    """
    part = picture(graph, 64, 64)
    widgets = {"combined": False, "crop_factor": 1.5, "bbox_fill": False, "drop_size": 1, "contour_fill": False}
    segs = out(graph.add("MaskToSEGS", mask=part["mask"], **widgets))
    soft = out(graph.add("DifferentialDiffusion", model=links["model"]))
    node = ksampler(graph, links | {"model": soft}, denoise=0.5, **settings)
    graph[node]["class_type"] = "DetailerForEach"
    del graph[node]["inputs"]["latent_image"]
    graph[node]["inputs"] |= {"image": part["image"], "segs": segs, "vae": links["vae"], "wildcard": "", "feather": 5}
    graph[node]["inputs"] |= {"clip": [links["base"][0], 1], "guide_size": 64, "guide_size_for": True, "max_size": 64}
    graph[node]["inputs"] |= {"noise_mask": True, "force_inpaint": True, "cycle": 1, "noise_mask_feather": 20}
    return out(node)


def by_high_res(graph: Graph, links: Links, **settings: Any) -> list:
    """The latent of KSampler (Efficient) with a HighRes-Fix Script, which samples again, larger, at denoise 0.5."""
    hires = {"hires_steps": settings.pop("steps"), "denoise": 0.5, "iterations": 1, "upscale_type": "latent"}
    hires |= {"upscale_by": 1.25, "latent_upscaler": "nearest-exact", "hires_ckpt_name": "(use same)"}
    unused = {"pixel_upscaler": UPSCALER, "control_net_name": "tiny.safetensors", "strength": 1.0}
    unused |= {"use_controlnet": "_", "preprocessor": "_", "preprocessor_imgs": False, "use_same_seed": True, "seed": 0}
    script = out(graph.add("HighRes-Fix Script", **hires, **unused))
    return by_efficient(graph, links, script=script, **settings)


@pytest.mark.parametrize(("way", "pack"), [(by_detailer, IMPACT), (by_high_res, EFFICIENCY)])
def test_levels_of_half_the_denoise(beside, way: Callable, pack):
    server = beside(pack)
    assert words(server, way, steps=4)[0] == LEVELS
    assert words(server, way, steps=2)[0] == RIGHT
    assert words(server, way, steps=2, cfg=7.0)[0] == BURNS
