"""Load PCM LoRA: every key style whole, other files refused, recipes from where they are."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from host.graphs import loaded, sample
from host.server import Run, out
from phased_consistency.samplers import Recipe
from phased_consistency.samplers.recipe import HEADER_KEY


def report(server, lora: str, **widgets) -> str:
    """What the loader writes on itself."""
    graph, links = loaded(lora, **widgets)
    loader = links["model"][0]
    run, _ = server.latents(graph, sample(graph, links))
    return run.text(loader)


def refusal(server, lora: str, **widgets) -> Run:
    graph, links = loaded(lora, **widgets)
    graph.add("SaveLatent", samples=[sample(graph, links), 0], filename_prefix="test")
    run = server.run(graph)
    assert run.error is not None
    assert run.error["node_type"] == "PCMLoadLora"
    return run.error["exception_message"].splitlines()[0]


@pytest.mark.parametrize("style", ["peft.safetensors", "raw.safetensors"])
def test_key_styles_give_the_same_picture(server, style):
    latents = []
    for name in ("kohya.safetensors", style):
        graph, links = loaded(name)
        latents += server.latents(graph, sample(graph, links))[1]
    assert torch.equal(*latents)


def test_the_host_alone_drops_half_of_a_peft_file(server):
    """Why this loader exists; when it fails, the host has learned the names and the loader may become simpler."""
    graph, links = loaded()
    core = graph.add("LoraLoaderModelOnly", model=links["base"], lora_name="peft.safetensors", strength_model=1.0)
    ours, other = sample(graph, links), sample(graph, {**links, "model": [core, 0]})
    latents = server.latents(graph, ours, other)[1]
    assert (latents[0] - latents[1]).abs().max() > 0.1


def test_the_report_counts_modules_and_names_the_source(server, models):
    text = report(server, "kohya.safetensors")
    assert text == (
        "4 steps, CFG 1 (1 to 2), deterministic.\n"
        f"SD1.5 PCM, {len(models.lora)} of {len(models.lora)} modules matched.\n"
        "Recipe from the file's header."
    )


def test_a_second_few_step_lora_is_told(server):
    graph, links = loaded()
    widgets = {"recipe": "auto", "phases": 4, "mode": "deterministic", "cfg": 1.0, "lora": "stochastic.safetensors"}
    seconds = [graph.add("PCMLoadLora", model=links["model"], strength=s, **widgets) for s in (1.0, 0.0)]
    style = graph.add(
        "LoraLoaderModelOnly", model=links["model"], lora_name="style.safetensors", strength_model=1.0
    )  # between them, and forgets nothing
    third = graph.add("PCMLoadLora", model=out(style), strength=1.0, **widgets)
    run, _ = server.latents(graph, *(sample(graph, {**links, "model": out(n)}, steps=1) for n in (*seconds, third)))
    warning = "kohya.safetensors is loaded too, and both speed the model up: remove one."
    assert [run.text(node).splitlines()[0] == warning for node in (*seconds, third)] == [True, False, True]
    assert "is loaded too" not in run.text(links["model"][0])


POWER = {"on": True, "lora": "kohya.safetensors", "strength": 1.0}
MANAGED = {"name": "kohya", "strength": 1.0, "active": True}
STACKED = {"lora_count": 1, "lora_name_1": "kohya.safetensors", "lora_wt_1": 1.0, "model_str_1": 1.0}


@pytest.mark.parametrize(
    ("inputs", "is_seen"),
    [
        ({"lora_1": POWER}, True),
        ({"lora_1": POWER | {"on": False}}, False),
        ({"lora_1": POWER | {"strength": 0}}, False),
        ({"loras": {"__value__": [MANAGED]}}, True),
        ({"loras": {"__value__": [MANAGED | {"active": False}]}}, False),
        (STACKED, True),
        (STACKED | {"lora_count": 0}, False),
        (STACKED | {"lora_wt_1": 0.0, "model_str_1": 0.0}, False),
        (STACKED | {"input_mode": "simple", "lora_wt_1": 0.0}, False),
        (STACKED | {"input_mode": "advanced", "lora_wt_1": 0.0}, True),
        ({"lora_name": "kohya.safetensors", "lora_model_strength": 1.0}, True),
        ({"lora_name": "None", "lora_model_strength": 1.0}, False),
        ({"text": "a fox <lora:kohya:0.8>"}, True),
        ({"text": "a fox <lora:kohya>"}, True),
        ({"text": "a fox <lora:kohya:0>, <lora:style:1>"}, False),
    ],
)
@pytest.mark.parametrize("by_stacker", [False, True])
def test_a_few_step_lora_of_another_packs_loader_is_told(server, inputs, is_seen, by_stacker):
    """By inputs as rgthree's, the Efficiency nodes', Lora-Manager's and prompts that name LoRAs have them."""
    graph, links = loaded()
    other = graph.add("TestOtherPack", model=links["base"], how="lora", **({} if by_stacker else inputs))
    if by_stacker:
        graph[other]["inputs"]["lora_stack"] = out(
            graph.add("TestOtherPack", model=links["base"], how="lora", **inputs)
        )
    loader = graph[links["model"][0]]["inputs"]
    loader |= {"model": out(other), "lora": "stochastic.safetensors"}
    run, _ = server.latents(graph, sample(graph, links, steps=1))
    warning = "is loaded too, and both speed the model up: remove one."
    assert (warning in run.text(links["model"][0]).splitlines()[0]) == is_seen


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("DreamShaper_8_LCM", "name"),
        ("epicV5HyperVAE", "name"),
        ("mine", "header"),
        ("lightningMix_sd15", None),  # which there is not for SD1.5
        ("hyperrealism_v3", None),
        ("tiny", None),
    ],
)
def test_a_few_step_checkpoint_is_told(server, models, name, by):
    folder = models.folder / "checkpoints"
    path = folder / f"{name}.safetensors"
    if name == "mine":
        save_file(load_file(folder / "tiny.safetensors"), path, {HEADER_KEY: Recipe(family="sd15").to_header()})
    elif not path.exists():
        path.symlink_to(folder / "tiny.safetensors")
    graph, links = loaded(checkpoint=path.name)
    run, _ = server.latents(graph, sample(graph, links, steps=1))
    warning = f"{path.name} is a few-step model by its {by}: take a plain one, or no LoRA."
    assert run.warnings(links["model"][0]) == ([warning] if by else [])


def test_a_known_file_needs_no_header(server):
    text = report(server, "pcm_sd15_smallcfg_8step_converted.safetensors")
    assert "8 steps" in text and "Recipe from the table of known files" in text


def test_an_unknown_file_takes_the_widgets(server):
    text = report(server, "unnamed.safetensors", phases=2, cfg=3.0)
    assert "2 steps, CFG 3 (1 to 4), deterministic" in text and "Recipe from the widgets" in text
    assert "SD1.5 LoRA, " in text, "no method is claimed"


def test_the_widgets_can_override_a_header(server):
    assert "Recipe from the widgets" in report(server, "kohya.safetensors", recipe="widgets", mode="stochastic")


def test_partial_matches_are_reported(server, models):
    lost = sum("mid_block" in name for name in models.lora)
    text = report(server, "partly.safetensors")
    assert f"{len(models.lora) - lost} of {len(models.lora)} modules matched" in text
    lines = text.splitlines()
    assert lines[0] == f"{lost} of {len(models.lora)} modules have no place in this model: take a LoRA made for it."
    assert re.match(r"Not taken: lora_unet_far_block\w+ and others\.", lines[-1])


def test_another_family_is_refused_by_both_names(server):
    assert re.match(
        r"sdxl\.safetensors is a LoRA for SDXL, but the model is SD1\.5\. ", refusal(server, "sdxl.safetensors")
    )


def test_a_file_that_fits_nothing_is_refused(server):
    message = refusal(server, "nowhere.safetensors")
    assert re.search(r"does nothing to this SD1\.5 model: (\d+) of \1 modules have no place in this model: ", message)


def test_a_truncated_file_is_refused(server):
    assert re.match(
        r"truncated\.safetensors is cut short: \d+ bytes of the \d+ ", refusal(server, "truncated.safetensors")
    )


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_strength_scales_the_patch(server, strength):
    graph, links = loaded(strength=strength)
    core = graph.add("LoraLoaderModelOnly", model=links["base"], lora_name="kohya.safetensors", strength_model=strength)
    latents = server.latents(graph, sample(graph, links), sample(graph, {**links, "model": [core, 0]}))[1]
    assert torch.equal(*latents)
