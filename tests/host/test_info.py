"""PCM LoRA Info and PCM Stamp Recipe: what a file tells, and a copy that tells it."""

from __future__ import annotations

import pytest
import torch

from host.graphs import loaded, sample
from host.server import Graph, out
from host.tiny import RECIPE
from phased_consistency.samplers.lora_file import read_header, tensor_hash
from phased_consistency.samplers.recipe import HEADER_KEY


def info_text(server, lora: str, checkpoint: str | None = None) -> str:
    """What PCM LoRA Info writes on itself."""
    graph, model = Graph(), {}
    if checkpoint:
        model = {"model": out(graph.add("CheckpointLoaderSimple", ckpt_name=checkpoint))}
    info = graph.add("PCMLoraInfo", lora=lora, **model)
    run = server.run(graph)
    assert run.error is None, run.error["exception_message"]
    return run.text(info)


def test_info_tells_the_recipe_and_the_file(server, models):
    size = (models.folder / "loras" / "kohya.safetensors").stat().st_size
    assert info_text(server, "kohya.safetensors").splitlines() == [
        f"SD1.5 PCM LoRA, {len(models.lora)} modules, {size / 1e6:.1f} MB.",
        RECIPE.usage_hint(),
        "Recipe from the file's header.",
        "Rank 8; alpha 4; stored as F32.",
    ]


def test_info_of_a_file_without_a_recipe(server):
    assert "No recipe in the header, and not a known file" in info_text(server, "unnamed.safetensors")


def test_info_can_be_read_by_text_nodes(server):
    graph = Graph()
    info = graph.add("PCMLoraInfo", lora="peft.safetensors")
    texts = [graph.add("PreviewAny", source=out(info, slot)) for slot in (0, 1)]
    run = server.run(graph)
    assert run.text(texts[0]) == run.text(info)
    lines = run.text(texts[1]).splitlines()
    assert lines[0].startswith("lora_adapter_metadata: {") and lines[1] == f"{HEADER_KEY}: {RECIPE.to_header()}"


def test_info_counts_what_fits_a_model(server, models):
    lost = sum("mid_block" in name for name in models.lora)
    lines = info_text(server, "partly.safetensors", "tiny.safetensors").splitlines()
    assert lines[1] == f"{len(models.lora) - lost} of {len(models.lora)} modules match this SD1.5 model."
    assert lines[2] == f"{lost} of {len(models.lora)} modules have no place in this model: take a LoRA made for it."


def test_info_says_what_the_loader_refuses(server):
    text = info_text(server, "sdxl.safetensors", "tiny.safetensors")
    assert "sdxl.safetensors is a LoRA for SDXL, but the model is SD1.5." in text


def stamp(server, lora: str = "unnamed.safetensors", name: str = "", overwrite: bool = False, **widgets):
    """Stamp a file with the recipe of its own widgets; returns the run and the node."""
    graph, links = loaded(widgets.pop("loader", lora), **{"recipe": "widgets", "phases": 2, "cfg": 3.0} | widgets)
    node = graph.add("PCMStampRecipe", lora=lora, recipe=links["recipe"], name=name, overwrite=overwrite)
    return server.run(graph), node


def test_a_stamped_file_is_read_by_our_loader_and_the_hosts(server, models):
    folder = models.folder / "loras"
    name = f"stamped {server.port}/two steps"
    run, node = stamp(server, name=name)
    assert run.error is None, run.error["exception_message"]
    lines, target = run.text(node).splitlines(), folder / f"{name}.safetensors"
    assert lines[0] == f"Written: {name}.safetensors." and lines[1].startswith("2 steps, CFG 3 (1 to 4)")
    assert lines[-1].endswith(f"models/loras/{name}.safetensors")
    assert tensor_hash(target) == tensor_hash(folder / "unnamed.safetensors")
    assert read_header(target).metadata["modelspec.usage_hint"] == lines[1]

    graph, links = loaded(f"{name}.safetensors")
    ours = sample(graph, links)
    core = {"lora_name": f"{name}.safetensors", "strength_model": 1.0}
    patched = graph.add("LoraLoaderModelOnly", model=links["base"], **core)
    theirs = sample(graph, {**links, "model": out(patched)})
    run, latents = server.latents(graph, ours, theirs)
    assert torch.equal(*latents)
    text = run.text(links["model"][0])
    assert text.startswith("2 steps, CFG 3 (1 to 4), deterministic.") and "Recipe from the file's header." in text


def test_a_copy_is_written_again_when_it_is_gone_and_only_then(server, models):
    """Queued again and again without a change: the second finds its copy, the third is the host's cached one."""
    name = f"again {server.port}"
    target, said = models.folder / "loras" / f"{name}.safetensors", []
    for i in range(5):
        if i == 3:
            target.unlink()
        run, node = stamp(server, name=name)
        assert run.error is None, run.error["exception_message"]
        said.append(run.outputs[node]["text"][0].split(":")[0] if node in run.outputs else "")
        assert tensor_hash(target) == tensor_hash(models.folder / "loras" / "unnamed.safetensors")
    assert [said[0], said[1], said[3], said[4]] == ["Written", "There already"] * 2
    assert said[2] != "Written"


def test_a_name_may_come_from_another_node(server, models):
    name = f"linked {server.port}"
    graph, links = loaded("kohya.safetensors")
    words = out(graph.add("PrimitiveString", value=name))
    node = graph.add("PCMStampRecipe", lora="kohya.safetensors", recipe=links["recipe"], name=words, overwrite=False)
    assert server.run(graph).text(node).startswith(f"Written: {name}.safetensors.")
    assert server.run(graph).text(node).startswith(f"There already: {name}.safetensors.")
    assert "fingerprint_inputs() missing" not in server.log
    assert (models.folder / "loras" / f"{name}.safetensors").exists()


def test_without_a_name_the_copy_is_beside_and_an_old_recipe_is_told_of(server, models):
    target = models.folder / "loras" / "kohya_recipe.safetensors"
    try:
        run, node = stamp(server, "kohya.safetensors")
        assert "Written: kohya_recipe.safetensors." in run.text(node)
        assert "It takes the place of the recipe that the file had." in run.text(node)
        assert read_header(target).metadata[HEADER_KEY] != RECIPE.to_header()
    finally:
        target.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "../outside"}, "The name is '../outside'; expected a file's name, with subfolders"),
        ({"name": "style"}, "style.safetensors exists already: choose another name, or switch overwrite on."),
        ({"name": "unnamed", "overwrite": True}, "unnamed.safetensors is the file that is copied"),
        (
            {"lora": "sdxl.safetensors", "name": "new", "loader": "unnamed.safetensors"},
            "sdxl.safetensors is a LoRA for SDXL, but the recipe is for SD1.5.",
        ),
    ],
)
def test_what_must_not_be_written_is_refused(server, models, settings, message):
    before = sorted(p for p in models.folder.parent.rglob("*") if p.suffix in (".safetensors", ".part"))
    run, _ = stamp(server, **settings)
    assert run.error["node_type"] == "PCMStampRecipe" and message in run.error["exception_message"]
    assert sorted(p for p in models.folder.parent.rglob("*") if p.suffix in (".safetensors", ".part")) == before
