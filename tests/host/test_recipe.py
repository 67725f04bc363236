"""PCM Recipe, and nodes that sample without a recipe of their own: for models that are made for few steps already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from host.graphs import edit, ksampler, loaded, picture, sample, scheduler
from host.server import Graph, out
from host.symptoms import BARE_MODEL, NO_RECIPE
from phased_consistency.samplers import Recipe
from phased_consistency.samplers.recipe import HEADER_KEY

BY_NAME = {  # of a checkpoint -> how it is sampled
    "DreamShaper_7_LCM": "4 steps, CFG 1 (1 to 2), stochastic.",
    "photo-Hyper-SD-8steps-merge": "8 steps, CFG 1 (1 to 2), deterministic.",
    "Hyper-SD15-8steps-CFG": "8 steps, CFG 5 (5 to 8), deterministic.",
}
MERGED = Recipe(family="sd15", phases=2, guidance=1.5)
WIDGETS = {"recipe": "auto", "phases": 4, "mode": "deterministic", "cfg": 1.0}


@pytest.fixture(scope="module", autouse=True)
def checkpoints(models) -> None:
    """Checkpoints that tell how they are sampled, by their name or their header."""
    folder = models.folder / "checkpoints"
    for name in BY_NAME:
        (folder / f"{name}.safetensors").symlink_to("tiny.safetensors")
    save_file(load_file(folder / "tiny.safetensors"), folder / "merged.safetensors", {HEADER_KEY: MERGED.to_header()})


def with_recipe(checkpoint: str = "tiny", lora: str = "", **widgets: Any) -> tuple[Graph, dict[str, list]]:
    """What `loaded` has, with PCM Recipe in place of Load PCM LoRA, behind core's own loader of this LoRA, if any."""
    graph, links = loaded(checkpoint=f"{checkpoint}.safetensors")
    model = links["base"]
    if lora:
        model = out(graph.add("LoraLoaderModelOnly", model=model, lora_name=f"{lora}.safetensors", strength_model=1.0))
    del graph[links["model"][0]]
    graph["2"] = {"class_type": "PCMRecipe", "inputs": WIDGETS | {"model": model} | widgets}
    return graph, links | {"model": out("2"), "recipe": out("2", 1)}


@pytest.mark.parametrize("name", BY_NAME)
def test_a_checkpoints_name_tells_its_recipe(server, name):
    graph, links = with_recipe(name)
    run, _ = server.latents(graph, sample(graph, links))
    lines = run.text("2").splitlines()
    assert lines[0] == BY_NAME[name] and lines[1].startswith(f"{name}.safetensors: ")
    assert run.warnings("2") == []


def test_a_checkpoints_header_tells_its_recipe(server):
    graph, links = with_recipe("merged")
    run, _ = server.latents(graph, sample(graph, links))
    assert run.text("2").splitlines() == [
        "2 steps, CFG 1.5 (1 to 2), deterministic.",
        "merged.safetensors: PCM, by the file's header.",
    ]


def test_a_lora_that_the_host_has_loaded_is_sampled_as_by_our_loader(server):
    """Seen in the graph, or chosen; the picture is that of Load PCM LoRA, bit for bit, its recipe connected or not."""
    graph, links = loaded()
    latents = server.latents(graph, sample(graph, links))[1]
    for widgets in ({}, {"recipe": "PCM"}, {"recipe": "widgets"}):
        graph, links = with_recipe(lora="kohya", **widgets)
        nodes = [sample(graph, links), sample(graph, links)]
        del graph[nodes[1]]["inputs"]["recipe"]
        run, more = server.latents(graph, *nodes)
        latents += more
        assert [run.warnings(node) for node in ("2", *nodes)] == [[], [], []]
    assert all(torch.equal(latent, latents[0]) for latent in latents)


def test_the_watch_is_kept_for_a_recipe_too(server):
    graph, links = with_recipe("DreamShaper_7_LCM")
    graph.add("SaveLatent", samples=out(ksampler(graph, links, sampler_name="euler")), filename_prefix="test")
    assert server.watch(graph).warnings["2"] == ["Sampler euler does not suit this LoRA: take lcm, or PCM Sampler."]


def test_a_model_of_which_nothing_is_known_is_said(server):
    graph, links = with_recipe()
    run, _ = server.latents(graph, sample(graph, links))
    assert run.warnings("2") == [
        "Nothing is known of this model: choose its method in recipe, or widgets for your own."
    ]


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        (
            {"recipe": "Lightning"},
            "Lightning is not known for SD1.5; known: PCM, PCM with CFG, PCM stochastic, LCM, TCD, ",
        ),
        (
            {"recipe": "Hyper-SD", "phases": 3},
            "Hyper-SD for SD1.5 is known in 1, 2, 4, 8 steps, not 3: take one of these",
        ),
    ],
)
def test_a_method_that_there_is_not(server, widgets, message):
    graph, links = with_recipe(**widgets)
    graph.add("SaveLatent", samples=out(sample(graph, links)), filename_prefix="test")
    error = server.run(graph).error
    assert error["node_id"] == "2" and error["exception_message"].startswith(message)


def test_what_speeds_the_model_up_twice_is_told(server):
    graph, links = with_recipe("DreamShaper_7_LCM", lora="kohya")
    run, _ = server.latents(graph, sample(graph, links))
    warning = "{} is a few-step model by its name: take a plain one, or no LoRA."
    assert run.warnings("2") == [warning.format("DreamShaper_7_LCM.safetensors")], "not the one that the recipe is of"
    assert run.text("2").splitlines()[2] == "kohya.safetensors: PCM, by the file's header."


def test_two_recipes_on_one_model(server):
    """Load PCM LoRA has its own; and a few-step LoRA on a model that PCM Recipe has spoken for is told."""
    graph, links = loaded()
    after = graph.add("PCMRecipe", **WIDGETS | {"model": links["model"], "recipe": "LCM"})
    nodes = [sample(graph, links | {"model": out(after), "recipe": out(after, 1)})]
    other, others = with_recipe("DreamShaper_7_LCM")
    loader = other.add("PCMLoadLora", model=others["model"], lora="kohya.safetensors", strength=1.0, **WIDGETS)
    sampled = sample(other, others | {"model": out(loader), "recipe": out(loader, 1)})
    assert server.latents(graph, *nodes)[0].warnings(after) == [
        "kohya.safetensors is on this model and has a recipe of its own: remove this node."
    ]
    assert server.latents(other, sampled)[0].warnings(loader) == [
        "DreamShaper_7_LCM.safetensors is loaded too, and both speed the model up: remove one."
    ]


@pytest.mark.parametrize(
    ("recipe", "warnings"),
    [
        ("auto", []),  # nothing is known of the model, least of all that it is fast
        ("LCM", ["PCM Recipe says that this model is made for few steps: remove that node, or this one."]),
    ],
)
def test_a_lora_on_a_model_whose_recipe_is_of_no_file(server, recipe, warnings):
    graph, links = with_recipe(recipe=recipe)
    loader = graph.add("PCMLoadLora", model=links["model"], lora="kohya.safetensors", strength=1.0, **WIDGETS)
    nodes = [sample(graph, links), sample(graph, links | {"model": out(loader), "recipe": out(loader, 1)})]
    run, _ = server.latents(graph, *nodes)
    assert run.warnings(loader) == warnings
    assert [run.warnings(node) for node in nodes] == [[], []], "the loader and PCM Recipe have said it"


def test_two_recipes_of_no_file(server):
    graph, links = with_recipe(recipe="LCM")
    second = graph.add("PCMRecipe", **WIDGETS | {"model": links["model"], "recipe": "LCM"})
    run, _ = server.latents(graph, sample(graph, links | {"model": out(second), "recipe": out(second, 1)}))
    assert run.warnings(second) == ["PCM Recipe is on this model and has a recipe of its own: remove this node."]


@pytest.mark.parametrize("name", [*BY_NAME, "merged"])
def test_a_few_step_checkpoint_with_its_recipe_beside_it_is_no_bare_model(server, name):
    """PCM Recipe's second output goes to Sample PCM, and the model straight from the checkpoint."""
    graph, links = with_recipe(name)
    sampled = sample(graph, links | {"model": links["base"]})
    run, _ = server.latents(graph, sampled)
    assert run.warnings(sampled) == []


def bypassed(make: Callable[..., str], *lora: str, **settings: Any) -> tuple[Graph, dict[str, list], str]:
    """A graph with a node whose loader is bypassed, as the frontend queues it: the model comes from the checkpoint, and
    no recipe at all."""
    graph, links = loaded(*lora, **settings)
    node = make(graph, links)
    del graph[node]["inputs"]["recipe"]
    graph[node]["inputs"] |= {"model": links["base"]} if "model" in graph[node]["inputs"] else {}
    return graph, links, node


def test_a_bypassed_loader_shows_the_picture_without_the_lora(server):
    """As the bare model is drawn by core, whatever node samples it; and in the steps that are set."""
    graph, links, ours = bypassed(sample)
    bare = links | {"model": links["base"]}
    core = ksampler(graph, bare, steps=25, cfg=7.0)
    few = sample(graph, bare, steps=4, cfg=1.0)
    del graph[few]["inputs"]["recipe"]
    run, (drawn, theirs, _) = server.latents(graph, ours, core, few)
    assert (drawn - theirs).abs().max() < 1e-3 * theirs.abs().max()
    assert run.text(ours).splitlines() == [BARE_MODEL, "25 steps at CFG 7, deterministic."]
    assert run.text(few).splitlines() == [BARE_MODEL, "4 steps at CFG 1, deterministic."]

    graph, _, edited = bypassed(lambda graph, links: edit(graph, links, "Inpaint", **picture(graph)))
    graph.add("SaveImage", images=out(edited), filename_prefix="test")
    assert BARE_MODEL in server.run(graph).warnings(edited)


@pytest.mark.parametrize(
    ("make", "socket", "shown", "settings"),
    [
        (scheduler, "sigmas", "TestSigmas", {}),
        (sample, "samples", "SaveLatent", {"checkpoint": "tiny_LCM.safetensors"}),
    ],
    ids=["no model", "a checkpoint that is fast already"],
)
def test_a_bypassed_loader_gets_a_sentence_where_no_recipe_is_known(server, make, socket, shown, settings):
    graph, _, node = bypassed(make, **settings)
    widgets = {"filename_prefix": "test"} if shown == "SaveLatent" else {}
    graph.add(shown, **widgets, **{socket: out(node)})
    error = server.run(graph).error
    assert (error["node_id"], error["exception_message"].strip()) == (node, NO_RECIPE)
