"""What nodes say where a transformer, its LoRA and its settings do not go together; nothing is said where they do."""

from __future__ import annotations

import pytest

from host.dits import core_lora, loaded_on, skip_where_lcm_repeats_its_noise, skip_without, transformer
from host.graphs import core_sampler, custom, ksampler, loaded, sample, scheduler
from host.server import Graph, out
from host.test_families import (
    ANIMA,
    COSMOS,
    FLUX,
    FLUX2,
    HIGH,
    LOW,
    QWEN,
    TURBO,
    UNKNOWN,
    WAN21,
    core_experts,
    flux_guided,
    shifted,
    two_experts,
    with_saved,
)


def watched(server, graph: Graph, *nodes: str) -> dict[str, list[str]]:
    """The warnings that a browser sees in the end, by node, once these nodes have drawn: also what a loader says of the
    runs of its model."""
    for node in nodes:
        with_saved(graph, node)
    seen = server.watch(graph)
    assert seen.error is None, seen.error["exception_message"]
    return seen.warnings


def test_guidance_of_the_network(server):
    skip_without(server, "flux2")
    graph, links = transformer("flux2", FLUX2)
    bare = sample(graph, links)
    other = sample(graph, flux_guided(graph, links, 7.0))
    right = sample(graph, flux_guided(graph, links, 3.0))
    twice = sample(graph, flux_guided(graph, flux_guided(graph, links, 4.0), 2.5))
    run, _ = server.latents(graph, bare, other, right, twice)
    assert run.warnings(bare) == ["FluxGuidance is missing on the positive prompt: add it with 2.5, the LoRA's."]
    assert run.warnings(other) == ["FluxGuidance is 7, and this LoRA is for 2.5: set guidance to 2.5."]
    assert run.warnings(right) == []
    assert run.warnings(twice) == [
        "FluxGuidance is on the positive prompt twice, and the last one counts: remove one.",
    ]


def test_flux1_has_a_guidance_of_its_own_where_none_is_set(server):
    """The host takes 3.5, which is that of the LoRAs."""
    graph, links = transformer("flux", TURBO)
    node = sample(graph, links)
    assert watched(server, graph, node)[node] == []


def test_true_cfg_on_distilled_guidance(server):
    graph, links = transformer("flux", TURBO)
    node, core = sample(graph, links, cfg=3.5), ksampler(graph, links, steps=8, cfg=3.5)
    warnings = watched(server, graph, node, core)
    sentence = "CFG 3.5 is above 1 and burns the image: set CFG to 1."
    assert warnings[node] == warnings[links["model"][0]] == [sentence]


def test_a_shift_that_is_set_after_the_loader(server):
    graph, links = transformer("qwen", QWEN)
    moved = shifted(graph, links["model"], "qwen", 6.0)
    ours, core = sample(graph, links | {"model": moved}), ksampler(graph, links | {"model": moved})
    warnings = watched(server, graph, ours, core)
    assert warnings[ours] == ["Shift 6 is not used, the LoRA's is 3: remove the node that sets it."]
    assert warnings[links["model"][0]] == ["Shift 6 is not this LoRA's: remove the node that sets it."]


def test_the_loader_gives_the_model_the_shift(server):
    """So that core's KSampler is right after it, with nothing between; mu 1.15 of Qwen-Image in the host is 3.158."""
    graph, links = transformer("qwen", QWEN)
    ours, core = sample(graph, links), ksampler(graph, links)
    run, latents = server.latents(graph, ours, core)
    assert (latents[0] - latents[1]).abs().max() < 1e-4
    assert run.warnings(links["model"][0]) == []
    assert run.text(links["model"][0]).splitlines()[-1] == "Shift set to 3, the LoRA's; it was 3.158."


def test_a_flux_lora_suits_both_the_usual_shift_and_that_of_the_size(server):
    """ModelSamplingFlux after the loader is right where its size is the latent's; core's constant shift is no fault."""
    graph, links = transformer("flux", TURBO)
    sized = shifted(graph, links["model"], "flux", 0)
    nodes = [ksampler(graph, links | {"model": each}, steps=8) for each in (links["model"], sized)]
    nodes.append(sample(graph, links | {"model": sized}))
    warnings = watched(server, graph, *nodes)
    assert warnings[links["model"][0]] == warnings[nodes[-1]] == []


def test_core_with_the_authors_settings_is_no_mistake(server):
    """By KSampler after the loader, and by two KSamplerAdvanced for two experts: nothing is said of them."""
    for kind, file, steps, name in (("qwen", QWEN, 4, "euler"), ("flux", TURBO, 8, "euler"), ("wan", WAN21, 4, "lcm")):
        graph, links = transformer(kind, file)
        warnings = watched(server, graph, ksampler(graph, links, steps=steps, sampler_name=name))
        assert warnings[links["model"][0]] == [], kind
    graph, links = two_experts()
    warnings = watched(server, graph, core_experts(graph, links["model"], links["low_noise_model"], links))
    assert warnings[links["model"][0]] == warnings[links["low_noise_model"][0]] == []


def test_a_lora_on_the_other_expert_is_told_by_the_models_name(server):
    graph, links = transformer("wan", HIGH, unet_name="wan2.2_t2v_low_noise_14B_fp16.safetensors")
    right = loaded_on(graph, links["base"], LOW)["model"]
    run, _ = server.latents(graph, *(ksampler(graph, links | {"model": each}) for each in (links["model"], right)))
    assert run.warnings(links["model"][0])[0] == (
        "This LoRA is for the high-noise model, and wan2.2_t2v_low_noise_14B_fp16.safetensors is the low-noise one: "
        "swap them."
    )
    assert run.warnings(right[0]) == []


def test_a_lora_of_another_transformer_does_nothing(server):
    graph, links = transformer("wan", QWEN)
    message = server.run(with_saved(graph, sample(graph, links))).error["exception_message"]
    assert message.startswith(f"{QWEN}.safetensors does nothing to this Wan model: ")


def test_a_header_tells_which_transformer_a_lora_is_for(server):
    graph, links = transformer("wan")
    checkpoint = out(graph.add("CheckpointLoaderSimple", ckpt_name="tiny.safetensors"))
    for model, title in ((links["base"], "Wan"), (checkpoint, "SD1.5")):
        one = Graph(graph)
        drawn = sample(one, links | loaded_on(one, model, "a_style"))
        message = server.run(with_saved(one, drawn)).error["exception_message"].strip()
        assert message == (
            f"a_style.safetensors is a LoRA for Qwen-Image, but the model is {title}. Load a model of Qwen-Image, or a "
            f"LoRA made for {title}."
        )


def test_a_model_that_no_recipe_can_be_made_for_says_what_to_use(server):
    """SVD, which predicts v at EDM's noise levels: by the loader, by PCM Recipe and by Sample PCM alone."""
    graph, links = transformer("svd")
    widgets = {"recipe": "widgets", "phases": 4, "mode": "deterministic", "cfg": 1.0}
    by_hand = graph.add("PCMRecipe", model=links["base"], **widgets)
    for model, recipe in ((links["base"], {}), (out(by_hand), {"recipe": out(by_hand, 1)})):
        one = Graph(graph)
        drawn = sample(one, links | {"model": model, "recipe": []})
        del one[drawn]["inputs"]["recipe"]
        one[drawn]["inputs"] |= recipe
        error = server.run(with_saved(one, drawn)).error
        assert error["exception_message"].strip() == (
            "No recipe can be made for a SVD model: it is no flow model, and none of SD1.5, SD2, SDXL, SD3. Load its "
            "LoRA with LoraLoaderModelOnly, and set steps, cfg, sampler_name and scheduler of KSampler as its authors "
            "say."
        )


def test_another_way_of_counting_levels_is_told(server):
    """Cosmos Predict2's, put on Wan by core's node, and SD3's on Cosmos."""
    for kind, file, node, widgets, culprit in (
        ("wan", UNKNOWN, "ModelSamplingContinuousEDM", {"sampling": "cosmos_rflow"}, "ModelSamplingContinuousEDM"),
        ("cosmos", COSMOS, "ModelSamplingSD3", {"shift": 3.0}, "A node"),
    ):
        graph, links = transformer(kind, file, recipe="widgets")
        widgets |= {"sigma_max": 80.0, "sigma_min": 0.002} if "sampling" in widgets else {}
        changed = out(graph.add(node, model=links["model"], **widgets))
        ours, core = (draw(graph, links | {"model": changed}) for draw in (sample, ksampler))
        warnings = watched(server, graph, ours, core)
        sentence = f"{culprit} changes the noise levels: remove that node."
        assert (warnings[ours][:1], warnings[links["model"][0]][:1]) == ([sentence], [sentence])


def test_an_unknown_file_says_what_to_set(server):
    graph, links = transformer("wan", UNKNOWN)
    warnings = watched(server, graph, sample(graph, links))
    assert warnings[links["model"][0]][:1] == [
        "Nothing is known of this file: set its phases, mode and cfg, and recipe to widgets."
    ]


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        ({"sigmas": "1, many"}, "sigmas is '1, many': write numbers with commas, such as 1, 0.75, 0.5."),
        ({"sigmas": "0.5, 1"}, "Not a usable recipe: sigmas are 0.5, 1; they have to fall from 1 at most to above 0"),
        ({"sigmas": "1, 0.5", "timesteps": "1000, 500"}, "Not a usable recipe: timesteps and sigmas are given"),
        ({"timesteps": "1200, 500"}, "Not a usable recipe: timesteps are 1200, 500; they have to fall from 1000"),
    ],
)
def test_levels_that_cannot_be_are_sentences(server, widgets, message):
    graph, links = transformer("wan", UNKNOWN, recipe="widgets", **widgets)
    error = server.run(with_saved(graph, sample(graph, links))).error
    assert error["exception_message"].startswith(message)


def test_core_samples_a_list_that_the_nodes_hand_out(server):
    """PCM Scheduler and PCM Sampler, in core's SamplerCustom, for a list with fresh noise; nothing is said."""
    skip_where_lcm_repeats_its_noise(server)
    graph, links = transformer("wan", WAN21)
    sampler = graph.add("PCMSampler", mode="from recipe", gamma=0.3, recipe=links["recipe"])
    parts = custom(graph, links, sampler, out(scheduler(graph, links)))
    lcm = custom(graph, links, core_sampler(graph, "lcm"), out(scheduler(graph, links)))
    run, latents = server.latents(graph, sample(graph, links), parts, lcm)
    assert max((latents[0] - other).abs().max() for other in latents[1:]) < 1e-4
    assert run.warnings(links["model"][0]) == []


def test_a_stamped_copy_keeps_its_levels(server):
    """By hand once, then read from the header, whatever the file is called."""
    graph, links = transformer("wan", UNKNOWN, recipe="widgets", sigmas="1, 0.8, 0.3", boundary=0.5)
    graph.add("PCMStampRecipe", lora=f"{UNKNOWN}.safetensors", recipe=links["recipe"], name="stamped", overwrite=True)
    assert server.run(graph).error is None
    graph, links = transformer("wan", "stamped")
    shown = graph.add("TestSigmas", sigmas=out(scheduler(graph, links)))
    run = server.run(graph)
    assert run.outputs[shown]["sigmas"] == pytest.approx([1, 0.8, 0.3, 0])
    text = run.text(links["model"][0])
    assert "Recipe from the file's header." in text


def test_pcm_recipe_by_hand_is_load_pcm_loras(server):
    graph, links = transformer("wan", UNKNOWN, recipe="widgets", sigmas="1, 0.8, 0.3")
    model = core_lora(graph, links["base"], UNKNOWN)
    by_hand = {"recipe": "widgets", "phases": 4, "mode": "deterministic", "cfg": 1.0, "sigmas": "1, 0.8, 0.3"}
    node = graph.add("PCMRecipe", model=model, **by_hand)
    _, latents = server.latents(
        graph, sample(graph, links), sample(graph, links | {"model": out(node), "recipe": out(node, 1)})
    )
    assert (latents[0] - latents[1]).abs().max() < 1e-5


def test_a_method_that_the_family_has(server):
    graph, links = transformer("flux")
    widgets = {"phases": 8, "mode": "deterministic", "cfg": 1.0}
    node = graph.add("PCMRecipe", model=core_lora(graph, links["base"], FLUX, 0.125), recipe="Hyper-SD", **widgets)
    drawn = sample(graph, links | {"model": out(node), "recipe": out(node, 1)})
    warnings = watched(server, graph, drawn)
    assert warnings[drawn] == warnings[node] == []


def test_edits_are_for_cells_of_8_pixels(server):
    skip_without(server, "flux2")
    graph, links = transformer("flux2", FLUX2)
    vae = out(graph.add("CheckpointLoaderSimple", ckpt_name="sd3.safetensors"), 2)
    picture = graph.add("TestPicture", width=64, height=64, channels=3, batch=1, seed=5, mask="middle")
    shared = {k: links[k] for k in ("model", "recipe", "positive", "negative")}
    node = graph.add("PCMColorize", **shared, vae=vae, image=out(picture), seed=7, steps=0, cfg=0.0, denoise=1.0)
    graph.add("PreviewImage", images=out(node))
    message = server.run(graph).error["exception_message"]
    assert message.startswith(
        "Edits are made in latents with cells of 8 pixels, and this model's have cells of 16 pixels"
    )


def test_a_shift_that_was_worked_out_for_another_clip(server):
    """ModelSamplingLTXV before the loader, whose recipe by hand keeps its shift: for one latent, and for 4096
    positions where none is connected. mu is 0.95 at 1024 positions and 2.05 at 4096."""
    graph, links = transformer("ltxv")
    size = {"width": 128, "height": 96, "batch_size": 1}
    longer = out(graph.add("EmptyLTXVLatentVideo", **size, length=2001))
    for connected, sampled, shifts in (
        (links["latent"], links["latent"], None),
        (longer, longer, None),
        (longer, links["latent"], (5.269, 24, 1.807)),
        (None, links["latent"], (7.768, 24, 1.807)),
    ):
        one = Graph(graph)
        latent = {"latent": connected} if connected else {}
        patched = one.add("ModelSamplingLTXV", model=links["base"], max_shift=2.05, base_shift=0.95, **latent)
        given = links | loaded_on(one, out(patched), "ltxv_of_tomorrow", recipe="widgets") | {"latent": sampled}
        ours, core = sample(one, given), ksampler(one, given)
        warnings = watched(server, one, ours, core)
        sentence = (
            "ModelSamplingLTXV's shift {:.4g} is for another latent; for {} positions it is {:.4g}: connect this "
            "latent to it."
        )
        expected = [sentence.format(*shifts)] if shifts else []
        assert warnings[ours] == warnings[given["model"][0]] == expected


def test_a_shift_for_the_frames_after_the_loader_is_not_used(server):
    """One sentence, and not two that say the opposite."""
    graph, links = transformer("ltxv", "ltxv_of_tomorrow", recipe="widgets")
    patched = out(graph.add("ModelSamplingLTXV", model=links["model"], max_shift=2.05, base_shift=0.95))
    node = sample(graph, links | {"model": patched})
    assert watched(server, graph, node)[node] == [
        "Shift 7.768 is not used, the LoRA's is 10.7: remove the node that sets it."
    ]


def test_a_shift_that_was_worked_out_for_another_size(server):
    """ModelSamplingFlux before the loader, by hand; a known file has a shift of its own, whatever was set before."""
    graph, links = transformer("flux")
    sentence = (
        "ModelSamplingFlux's shift 3.158 is for another size; for 128 x 96 it is 1.592: set its width and height."
    )
    for (width, height), sentences in (((128, 96), []), ((1024, 1024), [sentence])):
        one = Graph(graph)
        ends = {"max_shift": 1.15, "base_shift": 0.5, "width": width, "height": height}
        sized = out(one.add("ModelSamplingFlux", model=links["base"], **ends))
        by_hand, known = (links | loaded_on(one, sized, TURBO, recipe=recipe) for recipe in ("widgets", "auto"))
        nodes = [sample(one, by_hand), ksampler(one, by_hand), sample(one, known)]
        warnings = watched(server, one, *nodes)
        assert warnings[nodes[0]] == warnings[by_hand["model"][0]] == sentences
        assert warnings[nodes[2]] == []


@pytest.mark.parametrize(("kind", "file"), [("qwen", QWEN), ("anima", ANIMA)])
def test_a_clip_for_a_model_of_pictures(server, kind, file):
    """Sample PCM does not draw it; core's KSampler does, and the loader says so."""
    skip_without(server, kind)
    graph, links = transformer(kind, file)
    links["latent"] = out(graph.add("EmptyHunyuanLatentVideo", width=128, height=96, length=9, batch_size=1))
    title = {"qwen": "Qwen-Image", "anima": "Anima"}[kind]
    sentence = (
        f"This latent has 3 frames, and a {title} model draws pictures: set length to 1, or batch_size to the number "
        "of pictures."
    )
    ours = Graph(graph)
    assert server.run(with_saved(ours, sample(ours, links))).error["exception_message"].strip() == sentence
    skip_without(server, "flux2")  # an older host's Qwen-Image fails on clips itself
    steps = {"qwen": 4, "anima": 8}[kind]
    assert watched(server, graph, ksampler(graph, links, steps=steps))[links["model"][0]] == [sentence]


def test_a_clip_for_a_model_whose_latents_have_no_frames(server):
    """FLUX.1 and SD1.5, where the host fails with the numbers of its dimensions."""
    flux, links = transformer("flux", TURBO)
    tiny, others = loaded()
    for graph, given, title in ((flux, links, "FLUX.1"), (tiny, others, "SD1.5")):
        given["latent"] = out(graph.add("EmptyHunyuanLatentVideo", width=128, height=96, length=9, batch_size=1))
        message = server.run(with_saved(graph, sample(graph, given))).error["exception_message"].strip()
        assert message == (
            f"This latent is a clip's, and a {title} model draws pictures: take that of EmptyLatentImage, or of a "
            "picture."
        )


def test_a_model_that_draws_frame_by_frame(server):
    skip_without(server, "wan_causal")
    graph, links = transformer("wan_causal", UNKNOWN, recipe="widgets")
    message = server.run(with_saved(graph, sample(graph, links))).error["exception_message"].strip()
    assert message == (
        "This Wan model draws a clip frame by frame, which no PCM node does: take core's SamplerARVideo in "
        "SamplerCustomAdvanced."
    )
