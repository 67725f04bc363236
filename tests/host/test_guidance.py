"""CFG as other nodes change it: what holds a high one down, and what wants the negative prompt at CFG 1 too."""

from __future__ import annotations

from typing import Any

import pytest

from host.graphs import loaded, sample
from host.server import out

TAMERS = ("RescaleCFG", "APG", "Mahiro", "CFGNorm", "CFGZeroStar", "TCFG")
BURNS = "CFG 7 is above 2 and burns the image: set CFG to 1."
UNUSED = "CFG 1 does not use the negative prompt: clear it, or take a LoRA made for CFG."


def usual(kind: dict[str, Any]) -> dict[str, Any]:
    """The default values of a node's widgets, as a host describes it."""
    widgets = kind["input"].get("required", {}) | kind["input"].get("optional", {})
    return {
        name: options["default"] for name, (_, *rest) in widgets.items() for options in rest if "default" in options
    }


@pytest.mark.parametrize("node", TAMERS)
def test_a_tamed_cfg_is_no_mistake(server, node):
    kinds = server.get("/object_info")
    if node not in kinds:
        pytest.skip(f"this host has no {node}")
    graph, links = loaded()
    tamed = out(graph.add(node, model=links["model"], **usual(kinds[node])))
    nodes = [sample(graph, links | {"model": model}, steps=4, cfg=7.0) for model in (links["model"], tamed)]
    run, _ = server.latents(graph, *nodes)
    assert [BURNS in run.text(each).splitlines() for each in nodes] == [True, False]


def test_a_negative_prompt_that_is_used_at_cfg_1_is_no_mistake(server):
    """As under NAG and SAG; PCM CFG schedule then counts what really runs."""
    graph, links = loaded()
    links["negative"] = out(graph.add("TestConditioning", seed=2, width=768, pooled=2048, text="blurry"))
    always = out(graph.add("TestOtherPack", model=links["model"], how="guided"))
    nodes = [sample(graph, links | {"model": model}, cfg=1.0) for model in (links["model"], always)]
    steps = {"recipe": links["recipe"], "cfg": 2.0, "steps": 4, "from_step": 1, "to_step": 1}
    schedules = [graph.add("PCMCFGSchedule", model=model, **steps) for model in (links["model"], always)]
    nodes += [sample(graph, links | {"model": out(node)}) for node in schedules]
    run, _ = server.latents(graph, *nodes)
    assert [UNUSED in run.text(node).splitlines() for node in nodes[:2]] == [True, False]
    assert run.text(schedules[0]).splitlines()[-1].endswith("5 evaluations; with CFG on all 8, with none 4.")
    assert (
        run.text(schedules[1])
        .splitlines()[-1]
        .endswith(": 8 evaluations, since another node wants the negative prompt at CFG 1 too.")
    )
