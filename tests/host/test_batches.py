"""Batches, masks, regions and hooks go through Sample PCM and the edits as they go through core's KSampler."""

from __future__ import annotations

import pytest

from host.graphs import core_sampler, custom, edit, ksampler, loaded, pcm_sampler, picture, sample, scheduler
from host.server import Graph, out
from host.test_sampling import largest_difference

LINKS = dict[str, list]


def batch(graph: Graph, links: LINKS, length: int = 3) -> LINKS:
    return {**links, "latent": out(graph.add("TestLatent", seed=3, batch=length))}


def two_of_them(graph: Graph, links: LINKS) -> LINKS:
    return {**links, "latent": out(graph.add("LatentFromBatch", samples=links["latent"], batch_index=1, length=2))}


def one_of_them_again(graph: Graph, links: LINKS) -> LINKS:
    """Repeated ones have the noise of the places after the last."""
    last = graph.add("LatentFromBatch", samples=links["latent"], batch_index=2, length=1)
    return {**links, "latent": out(graph.add("RepeatLatentBatch", samples=out(last), amount=2))}


def masked(graph: Graph, links: LINKS) -> LINKS:
    mask = picture(graph, 64, 64, mask="soft")["mask"]
    return {**links, "latent": out(graph.add("SetLatentNoiseMask", samples=links["latent"], mask=mask))}


def regions(graph: Graph, links: LINKS) -> LINKS:
    """One prompt in the left half, another beyond step 2 of 4 and everywhere."""
    area = {"width": 0.5, "height": 1.0, "x": 0.0, "y": 0.0, "strength": 0.7}
    left = graph.add("ConditioningSetAreaPercentage", conditioning=links["negative"], **area)
    late = graph.add("ConditioningSetTimestepRange", conditioning=links["positive"], start=0.5, end=1.0)
    early = graph.add("ConditioningSetTimestepRange", conditioning=out(left), start=0.0, end=0.75)
    both = graph.add("ConditioningCombine", conditioning_1=out(late), conditioning_2=out(early))
    whole = graph.add("ConditioningCombine", conditioning_1=out(both), conditioning_2=links["positive"])
    return {**links, "positive": out(whole)}


def hooks(graph: Graph, links: LINKS) -> LINKS:
    """Another LoRA on the prompts alone, from the third step on."""
    files = {"lora_name": "style.safetensors", "strength_model": 0.8}
    hook = graph.add("CreateHookLoraModelOnly", **files)
    frames = graph.add("CreateHookKeyframe", strength_mult=0.0, start_percent=0.0)
    frames = graph.add("CreateHookKeyframe", strength_mult=1.0, start_percent=0.5, prev_hook_kf=out(frames))
    hook = graph.add("SetHookKeyframes", hooks=out(hook), hook_kf=out(frames))
    settings = {"strength": 1.0, "set_cond_area": "default", "hooks": out(hook)}
    prompts = {"positive_NEW": links["positive"], "negative_NEW": links["negative"]}
    pair = graph.add("PairConditioningSetProperties", **prompts, **settings)
    return {**links, "positive": out(pair), "negative": out(pair, 1)}


@pytest.mark.parametrize("make", [two_of_them, one_of_them_again, masked, regions, hooks], ids=lambda m: m.__name__)
def test_it_goes_through_as_in_the_hosts_ksampler(server, make):
    """With CFG, so that both prompts count; and it is not what comes of the same batch without."""
    graph, links = loaded()
    links = batch(graph, links)
    batch_links = make(graph, links)
    nodes = [sample(graph, batch_links, cfg=1.5), ksampler(graph, batch_links, cfg=1.5), sample(graph, links, cfg=1.5)]
    ours, theirs, plain = server.latents(graph, *nodes)[1]
    assert ours.shape == theirs.shape and largest_difference(ours, theirs) < 1e-4
    assert largest_difference(ours[:1], plain[:1]) > 0.1


def test_every_place_of_a_batch_has_its_own_noise(server):
    """The KSampler's: the same one in every batch that is as long or longer."""
    graph, links = loaded()
    nodes = [sample(graph, batch(graph, links, length)) for length in (2, 3)]
    two, three, core = server.latents(graph, *nodes, ksampler(graph, batch(graph, links)))[1]
    assert largest_difference(three, core) < 1e-4
    assert largest_difference(two, three[:2]) < 1e-3
    assert min(largest_difference(three[i], three[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 0.1


def test_one_seed_is_one_picture_where_noise_is_fresh(server):
    """The second of a batch is what it is by itself; with core's way it is another."""
    graph, links = loaded("stochastic.safetensors")
    links = batch(graph, links)
    one = {**links, "latent": out(graph.add("LatentFromBatch", samples=links["latent"], batch_index=1, length=1))}
    three, alone = server.latents(graph, sample(graph, links), sample(graph, one))[1]
    assert largest_difference(three[1:2], alone) < 1e-4 < largest_difference(three[:1], alone)


def test_noise_per_batch_is_as_the_hosts_lcm_draws_it(server):
    """At the seed at which this host's lcm draws ours (0.3.64 does not add 1 to it)."""
    graph, links = loaded("stochastic.safetensors")
    links = batch(graph, links)
    sigmas = out(scheduler(graph, links))
    by_batch = pcm_sampler(graph, "stochastic", noise="per batch")
    ours = custom(graph, links, by_batch, sigmas, noise_seed=7, add_noise=False)
    lcm = core_sampler(graph, "lcm")
    theirs = [custom(graph, links, lcm, sigmas, noise_seed=seed, add_noise=False) for seed in (7, 8)]
    latents = server.latents(graph, ours, *theirs)[1]
    assert min(largest_difference(latents[0], other) for other in latents[1:]) < 1e-4


def test_an_edit_gives_each_picture_of_a_batch_the_noise_that_the_ksampler_would(server):
    """So the second of two is another picture than it is alone. The mask is full: nothing pulls them together."""
    graph, links = loaded()
    image_inputs = picture(graph, 64, 64, mask="full", batch=2)
    last = graph.add("ImageFromBatch", image=image_inputs["image"], batch_index=1, length=1)
    both = edit(graph, links, "Inpaint", **image_inputs, steps=4)
    alone = edit(graph, links, "Inpaint", image=out(last), mask=image_inputs["mask"], steps=4)
    encoded = graph.add("VAEEncode", pixels=image_inputs["image"], vae=links["vae"])
    core = ksampler(graph, {**links, "latent": out(encoded)})
    _, (ours, single, theirs) = server.tensors(graph, out(both, 1), out(alone, 1), out(core))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert largest_difference(ours[1:], single) > 0.1
