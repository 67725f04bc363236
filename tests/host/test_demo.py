"""The quick way in: the demo's files and node in a real host draw, in 4 steps, what the trainer draws."""

from __future__ import annotations

import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from host.graphs import edit, ksampler, picture, sample
from host.server import Graph, out
from host.templates import WORKFLOWS
from host.workflows import to_api
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.families.generate import generate
from phased_consistency.trainer.lora.install import install_whole
from phased_consistency.trainer.tiny.comfy import CHECKPOINT, LORA, write_files
from phased_consistency.trainer.tiny.single_file import LATENT_SCALE, LATENT_SHIFT

PROMPT = "A fox left of a moon on a striped blue background"


@pytest.fixture(scope="module")
def demo(models, tmp_path_factory) -> SimpleNamespace:
    """The command's files in the host's folders; the same base and LoRA in the trainer."""
    write_files(folder := tmp_path_factory.mktemp("demo"))
    for path in (folder / "models").rglob("*.safetensors"):
        place = models.folder / path.parent.name / path.name
        place.unlink(missing_ok=True)
        shutil.copy(path, place)
    base = load_base("tiny-emoji")
    return SimpleNamespace(base=base, recipe=install_whole(LORA, base))


def graph_of(text: str = PROMPT, negative: str = "") -> tuple[Graph, dict[str, list]]:
    graph = Graph()
    base = graph.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    widgets = {"strength": 1.0, "recipe": "auto", "phases": 4, "mode": "deterministic", "cfg": 1.0}
    loader = graph.add("PCMLoadLora", model=out(base), lora=LORA.name, **widgets)
    return graph, {
        "model": out(loader),
        "recipe": out(loader, 1),
        "vae": out(base, 2),
        "positive": out(graph.add("PCMDemoPrompt", text=text)),
        "negative": out(graph.add("PCMDemoPrompt", text=negative)),
        "latent": out(graph.add("EmptySD3LatentImage", width=128, height=128, batch_size=1)),
    }


def by_trainer(demo: SimpleNamespace, guidance: float) -> torch.Tensor:
    noise = torch.randn(1, *demo.base.latent_shape(128), generator=torch.Generator().manual_seed(7))
    prompt, negative = (demo.base.encode_prompts([text]) for text in (PROMPT, ""))
    return generate(demo.base, prompt, negative, noise, demo.recipe.grid().plan(4).ticks, guidance, demo.recipe.gamma)


@pytest.mark.parametrize("guidance", [1.0, 1.7])
def test_the_host_draws_what_the_trainer_draws(server, demo, guidance):
    """Prompts by the demo's node; at CFG 1.7 the empty one is heard too."""
    graph, links = graph_of()
    run, (latent,) = server.latents(graph, sample(graph, links, cfg=guidance))
    theirs, ours = (latent - LATENT_SHIFT) * LATENT_SCALE, by_trainer(demo, guidance)
    difference = (ours - theirs).norm() / ours.norm()
    assert difference < 1e-4, difference
    assert "46 of 46 modules matched" in run.text(links["model"][0])
    assert run.text(links["positive"][0]) == "Only for the checkpoint pcm_demo_emoji."


def test_the_vae_decodes_what_the_trainers_does(server, demo):
    graph, links = graph_of()
    drawn = sample(graph, links)
    picture = out(graph.add("VAEDecode", samples=out(drawn), vae=links["vae"]))
    _, (latent, theirs) = server.tensors(graph, out(drawn), picture)
    ours = demo.base.decode((latent - LATENT_SHIFT) * LATENT_SCALE)
    assert (theirs.movedim(-1, 1) - ours).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a red cat, on a blue background", r"does not draw 'red cat'\. Nearest are: red car, "),
        ("a (fox:1.2)", r"does not draw 'fox 1 2'\. Nearest are: fox"),
        ("a fox on a red background", r"has no ground 'red'\. It has white, black, blue"),
    ],
)
def test_words_it_has_not_learnt_are_named(server, demo, text, sentence):
    graph, links = graph_of(text)
    sample(graph, links)
    graph.add("SaveLatent", samples=out(str(len(graph))), filename_prefix="test")
    with pytest.raises(AssertionError, match=sentence):
        server.latents(graph)


@pytest.mark.parametrize(("width", "height"), [(256, 256), (512, 128), (128, 264)])
def test_a_picture_beyond_the_bases_edge_is_told(server, demo, width, height):
    """By every node that samples; where core's does, on the loader."""
    graph, links = graph_of()
    links["latent"] = out(graph.add("EmptySD3LatentImage", width=width, height=height, batch_size=1))
    nodes = {"ours": sample(graph, links), "core's": ksampler(graph, links)}
    seen = {name: server.watch(upstream(graph, node)) for name, node in nodes.items()}
    fault = (
        f"{width} x {height} pixels are too many: this SD3 model draws at most 256 on an edge. Set width and height to "
        "256 or less, or make the picture smaller before."
    )
    if max(width, height) <= 256:
        assert not any(each.error for each in seen.values())
        assert fault not in seen["core's"].warnings[links["model"][0]]
        return
    assert seen["ours"].error["exception_message"].strip() == fault
    assert seen["core's"].warnings[links["model"][0]][0] == fault


@pytest.mark.parametrize(("make", "most"), [(sample, 0.02), (ksampler, 0.1)], ids=["ours", "core's"])
def test_previews_are_in_the_bases_own_colours(server, demo, make, most):
    """The last one, which is of the finished latent: by its decoder, and in core's sampler a colour for each cell."""
    graph, links = graph_of()
    drawn = make(graph, links, seed=11)
    seen = server.watch(upstream(graph, drawn))
    with Image.open(io.BytesIO(seen.last_preview)) as preview:
        shown = torch.from_numpy(np.array(preview.convert("RGB").resize((16, 16), Image.BOX))) / 255
    assert seen.previews == 4
    picture = out(graph.add("VAEDecode", samples=out(drawn), vae=links["vae"]))
    _, (pixels,) = server.tensors(graph, picture)
    cells = pixels[0].unflatten(0, (16, 8)).unflatten(2, (16, 8)).mean((1, 3))
    assert (shown - cells).abs().mean() < most


@pytest.mark.parametrize(
    ("width", "height", "channels"), [(1, 1, 3), (70, 50, 4), (48, 256, 3), (257, 16, 3), (900, 700, 1)]
)
@pytest.mark.parametrize("kind", ["Inpaint", "Outpaint", "Colorize", "SuperResolution", "Stroke", "Denoise"])
def test_a_picture_of_any_size_is_edited_or_told_why_not(server, demo, kind, width, height, channels):
    """Before it is encoded."""
    graph, links = graph_of()
    links |= picture(graph, width, height, channels=channels)
    sockets = {"image": links["image"]} | ({"mask": links["mask"]} if kind == "Inpaint" else {})
    node = edit(graph, links, kind, **sockets)
    graph.add("SaveImage", images=out(node), filename_prefix="test")
    error = server.run(graph).error
    edges = {"Outpaint": (width + 24, height), "SuperResolution": (2 * width, 2 * height)}.get(kind, (width, height))
    if max(edges) <= 256:
        assert error is None, error["exception_message"]
    else:
        assert "pixels are too many: this SD3 model draws at most 256 on an edge." in error["exception_message"]


@pytest.mark.parametrize("size", [(1, 1), (8000, 20)])
def test_the_template_of_image_to_image_takes_a_picture_of_any_size(server, demo, size):
    """Where ComfyUI's own VAE Encode fails on it with a bare RuntimeError."""
    template = next(path for path in WORKFLOWS if path.stem == "00_demo_2_image_to_image")
    graph = to_api(json.loads(template.read_text(encoding="utf-8")), server.get("/object_info"))
    (server.base / "input").mkdir(exist_ok=True)
    Image.new("RGB", size, "orange").save(server.base / "input" / "any_size.png")
    next(node for node in graph.values() if node["class_type"] == "LoadImage")["inputs"]["image"] = "any_size.png"
    run = server.run(graph)
    assert run.error is None, run.error["exception_message"]
    (saved,) = (output["images"][0] for output in run.outputs.values() if "images" in output)
    with Image.open(server.base / "output" / saved["filename"]) as image:
        assert image.size == (512, 512)


def upstream(graph: Graph, node: str) -> Graph:
    """The graph that leads to this LATENT, which is saved."""
    alone = Graph(graph)
    alone.add("SaveLatent", samples=out(node), filename_prefix="test")
    return alone


def test_more_steps_than_there_are_levels_are_a_sentence(server, demo):
    """The widget goes to 100; this LoRA's grid has 20 levels."""
    graph, links = graph_of()
    nodes = {steps: sample(graph, links, steps=steps) for steps in (20, 30, 100)}
    run, latents = server.latents(graph, *nodes.values())
    assert all(torch.equal(latents[0], latent) for latent in latents[1:])
    for steps, node in nodes.items():
        assert run.text(node).splitlines() == [
            f"This LoRA was made for 4 steps, not {steps}: set steps to 4.",
            *([f"20 steps of {steps}: there are no more levels."] if steps > 20 else []),
            "20 steps at CFG 1, deterministic.",
        ]


def test_an_empty_prompt_is_a_negative_and_says_so(server, demo):
    graph, links = graph_of(negative="  ")
    drawn = sample(graph, links, cfg=1.7)
    run, _ = server.latents(graph, drawn)
    assert run.text(links["negative"][0]).startswith("Empty: no prompt, as for a negative.")
