"""The editing nodes: what must stay stays, both forms are one, and each is what simpler nodes make of it."""

from __future__ import annotations

import uuid

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from host.graphs import composed, edit, loaded, picture, sample
from host.helper_nodes import TestPicture
from host.server import Graph, out
from host.test_flow import sd3
from host.test_sdxl import sdxl
from phased_consistency.samplers.operators import Colorize, luminance

FAMILIES = {"sdxl": sdxl, "sd3": sd3}


def drawn(width: int = 70, height: int = 50, mask: str = "middle", channels: int = 3, batch: int = 1):
    """The picture (B, C, H, W) and mask of `graphs.picture`."""
    image, mask = TestPicture().make(width, height, channels, batch, 5, mask)
    return image.movedim(-1, 1), mask


def nchw(image: torch.Tensor) -> torch.Tensor:
    return image.movedim(-1, 1)


def eight_bits(image: torch.Tensor) -> torch.Tensor:
    """As it comes back from a PNG."""
    return (image * 255).round() / 255


def beyond(mask: torch.Tensor, grow: int) -> torch.Tensor:
    """(H, W) which pixels are farther than this from the mask."""
    return F.max_pool2d(mask[None], 2 * grow + 1, 1, grow)[0, 0] == 0


def keeps_the_rest(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor, grow: int = 8) -> bool:
    """Whether all beyond the grown mask is as it was, and the mask is not."""
    far = beyond(mask, grow)
    return torch.equal(before[..., far], after[..., far]) and not torch.equal(before[..., ~far], after[..., ~far])


def odd_vae(graph: Graph, links: dict[str, list], how: str) -> list:
    return out(graph.add("TestVAE", vae=links["vae"], how=how))


def with_controlnet(graph: Graph, links: dict[str, list], image: list) -> dict[str, list]:
    """The links, the prompts led by a ControlNet."""
    net = graph.add("ControlNetLoader", control_net_name="tiny.safetensors")
    prompts = {"positive": links["positive"], "negative": links["negative"], "image": image}
    settings = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    applied = graph.add("ControlNetApplyAdvanced", control_net=out(net), **prompts, **settings)
    return {**links, "positive": out(applied), "negative": out(applied, 1)}


def from_file(server, graph: Graph, image: torch.Tensor) -> list:
    """A picture (B, C, H, W) as a link to an IMAGE."""
    path = server.base / f"{uuid.uuid4().hex}.safetensors"
    save_file({"image": image.movedim(1, -1).contiguous()}, path)
    return out(graph.add("TestImage", path=str(path)))


def failed(server, graph: Graph, link: list) -> str:
    """What the graph that leads to this link fails with."""
    graph.add("TestTensor", value=link, name="none")
    return server.run(graph).error["exception_message"]


KINDS = {
    "Inpaint": {},
    "latent": {"projection": "latent"},
    "plain": {"form": "plain", "every": 2},
    "Outpaint": {},
    "Colorize": {},
    "SuperResolution": {},
}


@pytest.fixture(scope="module")
def both(server):
    """Each edit of a 70x50 picture (35x25 to be enlarged) by its node and by its parts: image, latent, the same."""
    graph, links = loaded()
    wanted, notes = {}, {}
    for name, loop in KINDS.items():
        kind = name if name[0].isupper() else "Inpaint"
        image_inputs = picture(graph, *((35, 25) if kind == "SuperResolution" else (70, 50)))
        if kind != "Inpaint":
            del image_inputs["mask"]
        whole = edit(graph, links, kind, **image_inputs, **loop)
        parts = composed(graph, links, kind, **image_inputs, **loop)
        wanted[name] = (out(whole), out(whole, 1), parts["image"], parts["latent"], parts["encoded"])
        notes[name] = (whole, parts["operator"][0])
    run, tensors = server.tensors(graph, *(link for links in wanted.values() for link in links))
    rows = dict(zip(wanted, zip(*(iter(tensors),) * 5, strict=True), strict=True))
    return rows, {name: [run.text(node) for node in nodes] for name, nodes in notes.items()}


@pytest.mark.parametrize("name", KINDS)
def test_the_parts_make_what_the_node_makes(both, name):
    image, latent, image_of_parts, latent_of_parts, _ = both[0][name]
    assert torch.equal(image, image_of_parts) and torch.equal(latent, latent_of_parts)


def test_the_ways_of_projecting_differ(both):
    latents = [both[0][name][1] for name in ("Inpaint", "latent", "plain")]
    assert min((a - b).abs().max() for a, b in zip(latents, latents[1:], strict=False)) > 1e-3


@pytest.mark.parametrize("name", ["Inpaint", "latent", "plain"])
def test_what_no_mask_covers_stays(both, name):
    before, mask = drawn()
    assert keeps_the_rest(before, nchw(both[0][name][0]), mask)


def test_cells_of_the_latent_stay_where_it_is_projected_itself(both):
    """The mask is x 23 to 34, y 12 to 24: cells 2 to 4, 1 to 3."""
    _, latent, _, _, start = both[0]["latent"]
    hole = torch.zeros(8, 9, dtype=torch.bool)
    hole[1:4, 2:5] = True
    assert (latent - start)[..., ~hole].abs().max() < 1e-5
    assert (latent - start)[..., hole].abs().amin((0, 1)).min() > 1e-3


def test_outpainting_keeps_the_picture(both):
    before, _ = drawn()
    after = nchw(both[0]["Outpaint"][0])
    assert after.shape[-2:] == (50, 94)
    assert torch.equal(after[..., 16:70], before[..., 8:62])


def test_colorizing_keeps_the_lightness(both):
    before, _ = drawn()
    after = nchw(both[0]["Colorize"][0])
    assert (luminance(after) - luminance(before)).abs().max() < 1e-5
    assert (luminance(eight_bits(after)) - luminance(before)).abs().max() <= 0.5 / 255 + 1e-6
    assert (after - luminance(after)).abs().max() > 0.05, "and it is not grey"


def test_super_resolution_scales_down_to_the_picture(both):
    before, _ = drawn(35, 25)
    after = nchw(both[0]["SuperResolution"][0])
    assert after.shape[-2:] == (50, 70)
    assert (F.avg_pool2d(after, 2) - before).abs().max() < 1e-5
    assert (F.avg_pool2d(eight_bits(after), 2) - before).abs().max() <= 1 / 255


def test_the_nodes_say_how_they_worked(both):
    made_for = "This LoRA was made for 4 steps, not 2: set steps to 4."
    node, operator = both[1]["Inpaint"]
    assert operator == "70x50 is worked on as 72x64, then cut."
    assert node.splitlines() == [made_for, operator, "2 steps at CFG 1, deterministic."]
    assert both[1]["SuperResolution"][0].splitlines()[-1] == "1 step at CFG 1, deterministic."


def test_a_full_mask_is_sample_pcm_from_the_same_start(server):
    """Nothing is known, so the residual form adds nothing to x0."""
    graph, links = loaded()
    image_inputs = picture(graph, 64, 64, mask="full")
    whole, parts = edit(graph, links, "Inpaint", **image_inputs), composed(graph, links, "Inpaint", **image_inputs)
    plain = sample(graph, {**links, "latent": parts["encoded"]}, steps=2)
    decoded = graph.add("VAEDecode", samples=out(plain), vae=links["vae"])
    run, (ours, theirs, image, picture_of_theirs) = server.tensors(
        graph, out(whole, 1), out(plain), out(whole), out(decoded)
    )
    assert torch.equal(ours, theirs) and torch.equal(image, picture_of_theirs)
    assert run.text(whole).splitlines()[0] == "The mask covers everything: nothing is kept."


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(server, family):
    graph, links = FAMILIES[family]()
    image_inputs = picture(graph)
    nodes = [edit(graph, links, "Inpaint", **image_inputs), edit(graph, links, "Colorize", image=image_inputs["image"])]
    _, (inpainted, colorized) = server.tensors(graph, *map(out, nodes))
    before, mask = drawn()
    assert keeps_the_rest(before, nchw(inpainted), mask)
    assert (luminance(nchw(colorized)) - luminance(before)).abs().max() < 1e-5


@pytest.mark.parametrize("lora", ["lcm-lora-sdv1-5", "TCD-SD15-LoRA", "clamped"])
def test_other_methods(server, lora):
    """Also with noise between steps, which is the seed's in both forms."""
    graph, links = loaded(f"{lora}.safetensors")
    image_inputs = picture(graph, mask="soft")
    whole, parts = edit(graph, links, "Inpaint", **image_inputs), composed(graph, links, "Inpaint", **image_inputs)
    _, (image, other) = server.tensors(graph, out(whole), parts["image"])
    before, mask = drawn(mask="soft")
    assert torch.equal(image, other)
    assert keeps_the_rest(before, nchw(image), mask)


def test_with_a_controlnet_and_a_latent_mask(server):
    """What the guider has loaded besides the model goes on working, and core's mask holds its own cells back."""
    graph, links = loaded()
    image_inputs = picture(graph, 64, 64)
    guided = with_controlnet(graph, links, image_inputs["image"])
    plain, led = (composed(graph, each, "Inpaint", **image_inputs) for each in (links, guided))
    masked = graph.add("SetLatentNoiseMask", samples=plain["encoded"], mask=image_inputs["mask"])
    sampled = graph[led["latent"][0]]["inputs"]
    both = graph.add("SamplerCustom", **sampled | {"latent_image": out(masked)})
    _, (bare, controlled, kept, start) = server.tensors(
        graph, plain["latent"], led["latent"], out(both), plain["encoded"]
    )
    assert (bare - controlled).abs().max() > 0.1
    assert (kept - start)[..., 5:, :].abs().max() < 0.01 * (controlled - start)[..., 5:, :].abs().max()


def test_odd_pictures(server):
    """One pixel, grey, transparent, and two with one mask."""
    graph, links = loaded()
    dot = picture(graph, 1, 1)["image"]
    dots = [edit(graph, links, kind, image=dot, steps=1) for kind in ("Colorize", "Stroke", "Denoise")]
    dots += [edit(graph, links, "SuperResolution", image=dot, factor=3, steps=1)]
    grey = edit(graph, links, "Inpaint", **picture(graph, channels=1), steps=1)
    two = edit(graph, links, "Inpaint", **picture(graph, batch=2), steps=1)
    see_through = picture(graph, mask="soft")
    alpha = graph.add("JoinImageWithAlpha", image=see_through["image"], alpha=see_through["mask"])
    clear = edit(graph, links, "Inpaint", image=out(alpha), mask=picture(graph)["mask"], steps=1)
    preview = graph.add("PreviewImage", images=out(clear))
    run, tensors = server.tensors(graph, *map(out, (*dots, grey, two, clear)))
    *dots, grey, two, clear = map(nchw, tensors)
    assert [tuple(each.shape) for each in dots] == [(1, 3, 1, 1)] * 3 + [(1, 3, 3, 3)]
    before, _ = drawn(1, 1)
    assert (luminance(dots[0]) - luminance(before)).abs().max() < 1e-5
    assert (F.avg_pool2d(dots[3], 3) - before).abs().max() < 1e-5
    for after, channels, batch in ((grey, 1, 1), (two, 3, 2), (clear[:, :3], 3, 1)):
        before, mask = drawn(channels=channels, batch=batch)
        assert keeps_the_rest(before.expand(-1, 3, -1, -1), after, mask)
    assert not torch.equal(two[:1, :, :25], two[1:, :, :25])
    _, soft = drawn(mask="soft")
    assert torch.equal(clear[:, 3], 1 - soft)
    assert "images" in run.outputs[preview]


def test_an_empty_mask_draws_nothing_and_says_so(server):
    graph, links = loaded()
    node = edit(graph, links, "Inpaint", **picture(graph, mask="empty"), steps=1)
    run, (after,) = server.tensors(graph, out(node))
    assert torch.equal(nchw(after), drawn()[0])
    assert run.text(node).splitlines()[0] == "The mask is empty: nothing is drawn."


@pytest.mark.parametrize("every, times", [(1, 4), (2, 2), (3, 2)])
def test_every_so_many_steps_go_through_the_step_vae(server, every, times):
    """Counted back from the last; the last decode is the other VAE's. With a rim, one step less: see `to_the_end`."""
    graph, links = loaded()
    counted = odd_vae(graph, links, "log")
    loop = {"steps": 4, "every": every, "step_vae": counted, "grow": 0}
    node = edit(graph, links, "Inpaint", **picture(graph, 64, 64), **loop)
    before = server.log.count("TestVAE log")
    server.tensors(graph, out(node))
    assert server.log.count("TestVAE log") - before == times


@pytest.mark.parametrize("form", ["residual", "plain"])
def test_one_step_is_what_core_nodes_make_of_the_projected_picture(server, form):
    graph, links = loaded()
    image_inputs = picture(graph, 64, 64)["image"]
    ours = edit(graph, links, "Colorize", image=image_inputs, steps=1, form=form)
    start = composed(graph, links, "Colorize", image=image_inputs)["encoded"]
    plain = out(sample(graph, {**links, "latent": start}, steps=1))
    seen = out(graph.add("VAEDecode", samples=plain, vae=links["vae"]))
    encoded = out(graph.add("VAEEncode", pixels=seen, vae=links["vae"]))
    _, (latent, x0, decoded, here) = server.tensors(graph, out(ours, 1), plain, seen, encoded)

    right = Colorize(drawn(64, 64)[0]).project(nchw(decoded))
    there = graph.add("VAEEncode", pixels=from_file(server, graph, right), vae=links["vae"])
    _, (there,) = server.tensors(graph, out(there))
    expected = x0 + there - here if form == "residual" else there
    assert (latent - expected).abs().max() < 1e-5 * x0.abs().max()
    assert (there - here).abs().max() > 1e-3


def test_a_model_that_had_to_go_comes_back(server):
    """With its LoRA and the ControlNet: the VAE may need their memory."""
    graph, links = loaded()
    guided = with_controlnet(graph, links, picture(graph, 64, 64)["image"])
    image_inputs = picture(graph, 64, 64) | {"grow": 0}
    unloading = odd_vae(graph, links, "unload")
    nodes = [
        edit(graph, guided, "Inpaint", **image_inputs),
        edit(graph, guided, "Inpaint", **image_inputs, step_vae=unloading),
    ]
    nodes += [edit(graph, {**guided, "model": links["base"]}, "Inpaint", **image_inputs)]
    before = server.log.count("TestVAE unload")
    _, (stayed, came_back, bare) = server.tensors(graph, *(out(node, 1) for node in nodes))
    assert server.log.count("TestVAE unload") == before + 2
    assert torch.equal(stayed, came_back)
    assert (stayed - bare).abs().max() > 0.1


def test_tiles_are_refused_in_the_loop_and_told_of_at_the_end(server):
    graph, links = loaded()
    short = {**links, "vae": odd_vae(graph, links, "memory")}
    image_inputs = picture(graph, 64, 64, mask="full")
    refused = edit(graph, short, "Inpaint", **image_inputs)
    message = failed(server, graph, out(refused))
    assert message.startswith("The VAE ran out of memory, and in tiles it would draw their seams into every step.")

    graph, links = loaded()
    image_inputs = picture(graph, 64, 64, mask="full")
    short = {**links, "vae": odd_vae(graph, links, "memory")}
    helped = edit(graph, short, "Inpaint", **image_inputs, step_vae=links["vae"])
    tiled_by_choice = edit(graph, links, "Inpaint", **image_inputs, last_decode="tiled")
    core = graph.add(
        "VAEDecodeTiled",
        samples=out(tiled_by_choice, 1),
        vae=links["vae"],
        tile_size=512,
        overlap=128,
        temporal_size=64,
        temporal_overlap=8,
    )
    run, (fallen_back, tiled, theirs) = server.tensors(graph, out(helped), out(tiled_by_choice), out(core))
    assert torch.equal(tiled, theirs) and torch.equal(fallen_back, theirs)
    assert run.text(helped).splitlines()[0] == "Memory ran out: the last decode is tiled."
    assert "tiled" not in run.text(tiled_by_choice)


def test_an_edit_can_be_interrupted(server):
    graph, links = loaded()
    stopping = odd_vae(graph, links, "interrupt")
    node = edit(graph, links, "Inpaint", **picture(graph, 64, 64), steps=4, step_vae=stopping)
    graph.add("TestTensor", value=out(node), name="none")
    before = server.log.count("TestVAE interrupt")
    prompt = server.queue(graph)
    server.wait(prompt)
    messages = [kind for kind, _ in server.get(f"/history/{prompt}")[prompt]["status"]["messages"]]
    assert "execution_interrupted" in messages
    assert server.log.count("TestVAE interrupt") == before + 1


def test_a_browser_sees_previews_and_progress(server):
    graph, links = loaded()
    one = edit(graph, links, "Inpaint", **picture(graph, 64, 64), seed=101)  # seeds of their own: nothing is cached
    frames = edit(graph, links, "Interpolate", latent_image=links["latent"], positive_b=links["negative"], seed=102)
    for node in (one, frames):
        graph.add("TestTensor", value=out(node), name=node)
    seen = server.watch(graph)
    assert seen.progress[one] == (2, 2) and seen.progress[frames] == (6, 6)
    assert seen.previews == 8
    assert "2 steps at CFG 1, deterministic." in seen.texts[one]


def wrong_size(graph: Graph, links: dict[str, list]) -> list:
    image_inputs = picture(graph)
    return out(edit(graph, links, "Inpaint", image=image_inputs["image"], mask=picture(graph, 32, 24)["mask"]))


def no_mask(graph: Graph, links: dict[str, list]) -> list:
    image_inputs = picture(graph)
    return out(
        edit(graph, links, "Inpaint", image=image_inputs["image"], mask=picture(graph, 64, 64, mask="empty")["mask"])
    )


def other_vae(graph: Graph, links: dict[str, list]) -> list:
    vae = out(graph.add("CheckpointLoaderSimple", ckpt_name="sd3.safetensors"), 2)
    return out(edit(graph, {**links, "vae": vae}, "Stroke", image=picture(graph)["image"]))


def other_latent(graph: Graph, links: dict[str, list]) -> list:
    parts = composed(graph, links, "Colorize", image=picture(graph)["image"])
    graph[parts["latent"][0]]["inputs"]["latent_image"] = links["latent"]
    return parts["latent"]


def other_latent_at_the_end(graph: Graph, links: dict[str, list]) -> list:
    parts = composed(graph, links, "Colorize", image=picture(graph)["image"])
    graph[parts["image"][0]]["inputs"]["samples"] = links["latent"]
    return parts["image"]


def cells_of_colours(graph: Graph, links: dict[str, list]) -> list:
    return composed(graph, links, "Colorize", image=picture(graph)["image"], projection="latent")["latent"]


def no_recipe(graph: Graph, links: dict[str, list]) -> list:
    parts = composed(graph, links, "Colorize", image=picture(graph)["image"])
    sampler = graph[parts["latent"][0]]["inputs"]["sampler"][0]
    del graph[sampler]["inputs"]["recipe"]
    return parts["latent"]


def no_sides(graph: Graph, links: dict[str, list]) -> list:
    return out(edit(graph, links, "Outpaint", image=picture(graph)["image"], left=0, right=0))


def two_latents(graph: Graph, links: dict[str, list]) -> list:
    two = out(graph.add("EmptyLatentImage", width=64, height=64, batch_size=2))
    return out(edit(graph, links, "Interpolate", latent_image=two, positive_b=links["negative"]))


@pytest.mark.parametrize(
    "make, message",
    [
        (wrong_size, "The mask is 32x24 and the picture 70x50: they must be of one size."),
        (no_mask, "The mask is an empty one of 64x64 for a picture of 70x50, as Load Image gives for a picture "),
        (other_vae, "The VAE's latents have 16 channels, the model's 4: use the VAE of the model's own family."),
        (other_latent, "The latent is of a picture of 64x64, and the edit works on 72x64: "),
        (other_latent_at_the_end, "The latent is of a picture of 64x64, and the edit works on 72x64: "),
        (cells_of_colours, "Colorize keeps sums of pixels, which no cell of a latent holds: "),
        (no_recipe, "PCM Edit Sampler has the mode 'from recipe' but no recipe: connect that of Load PCM LoRA"),
        (no_sides, "Outpainting adds pixels on at least one side; got "),
        (two_latents, "latent_image holds 2 latents; the frames are all made of one."),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_input_is_a_sentence(server, make, message):
    graph, links = loaded()
    assert failed(server, graph, make(graph, links)).startswith(message)
