"""The workflows as they are shipped: widget values in the order the nodes have them now, and they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

WORKFLOWS = sorted((Path(__file__).parents[2] / "workflows").glob("*.json"))
NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def to_api(workflow: dict[str, Any], server) -> dict[str, Any]:
    """The graph as the frontend would queue it, with the nodes' own schemas deciding which value is which."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        kind = server.get(f"/object_info/{node['type']}")[node["type"]]
        linked = {i["name"]: sources[i["link"]] for i in node["inputs"] if i["link"] is not None}
        specs = {**kind["input"]["required"], **kind["input"].get("optional", {})}
        values = widget_values(specs, node["widgets_values"])
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": {**values, **linked}}
    return graph


def widget_values(specs: dict[str, list], values: list[Any]) -> dict[str, Any]:
    """Widgets by name; a seed is followed by its control-after-generate choice."""
    rest, named = list(values), {}
    for name, (kind, *options) in specs.items():
        if kind in WIDGETS or isinstance(kind, list):
            named[name] = rest.pop(0)
            if options and options[0].get("control_after_generate"):
                assert rest.pop(0) == "fixed"
    assert rest == []
    return named


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_shipped_workflow_runs(server, path):
    graph = to_api(json.loads(path.read_text(encoding="utf-8")), server)
    for node in graph.values():
        inputs = node["inputs"]
        if node["class_type"] == "CheckpointLoaderSimple":
            inputs["ckpt_name"] = "tiny.safetensors"
        if node["class_type"] == "PCMLoadLora":
            inputs["lora"] = "kohya.safetensors"
        if node["class_type"] == "EmptyLatentImage":
            inputs |= {"width": 64, "height": 64}
        if node["class_type"] == "CLIPTextEncode":  # the tiny checkpoint has no text encoder
            node |= {"class_type": "TestConditioning", "inputs": {"seed": 1, "width": 768, "pooled": 2048}}
    run = server.run(graph)
    assert run.error is None
    saved = [node for node, entry in graph.items() if entry["class_type"] == "SaveImage"]
    assert run.outputs[saved[0]]["images"][0]["filename"].startswith("pcm")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_shipped_workflow_has_a_picture_and_is_offered(server, path):
    assert path.with_suffix(".jpg").read_bytes()[:2] == b"\xff\xd8"
    assert path.stem in server.get("/workflow_templates")["phased-consistency"]
