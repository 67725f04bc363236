"""The workflows as they are shipped: written from their descriptions, whole, and they run and say what they did."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from host import templates
from host.workflows import has_control, is_widget, specs_of

WORKFLOWS = sorted(templates.FOLDER.glob("*.json"))
NOTES = ("Note", "MarkdownNote")
STANDING_IN = {  # for what the tests do not have; the tiny checkpoint has no text encoder
    "CheckpointLoaderSimple": {"ckpt_name": "tiny.safetensors"},
    "PCMLoadLora": {"lora": "kohya.safetensors"},
    "ControlNetLoader": {"control_net_name": "tiny.safetensors"},
    "CLIPTextEncode": {"seed": 1, "width": 768, "pooled": 2048},
    # small, so that they take seconds
    "EmptyLatentImage": {"width": 64, "height": 64},
    "PCMOutpaint": {"left": 16, "right": 16},
    "PCMInterpolate": {"frames": 2},
}
WHOLE = "4 steps at CFG 1, deterministic."
SAID = {  # all that the node says which samples, and PCM Scheduler where a core one does: a warning would be more
    "01_text_to_image_4_steps": WHOLE,
    "02_inpaint": WHOLE,
    "03_outpaint": WHOLE,
    "04_colorize": WHOLE,
    "05_super_resolution": "3 steps at CFG 1, deterministic.",
    "06_stroke_to_image": "3 steps at CFG 1, deterministic.\nThe strength is 0.75.",
    "07_denoise": r"The noise was estimated: [\d.]+ levels of 255.\n\d steps? at CFG 1, deterministic.",
    "08_interpolate": f"{WHOLE}\n2 frames, each of them sampled by itself.",
    "09_inpaint_with_controlnet": "4 steps, sigmas 14.61, 4.082, 1.613, 0.6932, 0.",
}
SIZES = {"03_outpaint": (96, 64)}  # of what comes out, where it is not that of what goes in


@pytest.fixture(scope="module")
def picture(server) -> None:
    """A picture of the name that ComfyUI ships one by, with a mask painted as its mask editor does: transparent."""
    pixels = np.random.default_rng(3).integers(0, 256, (64, 64, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[16:40, 24:48, 3] = 0
    (server.base / "input").mkdir(exist_ok=True)
    Image.fromarray(pixels).save(server.base / "input" / "example.png")


@pytest.fixture(params=WORKFLOWS, ids=lambda p: p.stem)
def shipped(request: pytest.FixtureRequest, server, picture) -> SimpleNamespace:
    """A workflow by name: its graph, and what its nodes' kinds are like on this host."""
    graph = json.loads(request.param.read_text(encoding="utf-8"))
    types = {node["type"] for node in graph["nodes"]} - set(NOTES)
    kinds = {kind: server.get(f"/object_info/{kind}")[kind] for kind in types}
    return SimpleNamespace(path=request.param, graph=graph, kinds=kinds)


def to_api(workflow: dict[str, Any], kinds: dict[str, dict]) -> dict[str, Any]:
    """The graph as the frontend would queue it, with the nodes' own schemas deciding which value is which."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] not in NOTES:
            linked = {i["name"]: sources[i["link"]] for i in node["inputs"] if i["link"] is not None}
            values = widget_values(specs_of(kinds[node["type"]]), node["widgets_values"])
            graph[str(node["id"])] = {"class_type": node["type"], "inputs": {**values, **linked}}
    return graph


def widget_values(specs: dict[str, list], values: list[Any]) -> dict[str, Any]:
    """Widgets by name; a seed is followed by its control-after-generate choice."""
    rest, named = list(values), {}
    for name, spec in specs.items():
        if is_widget(spec):
            named[name] = rest.pop(0)
            if has_control(spec):
                assert rest.pop(0) == "fixed"
    assert rest == []
    return named


def test_a_shipped_workflow_is_whole(shipped):
    """Every link ends at both its nodes, in slots of its type that the nodes have, and no input lacks one."""
    nodes = {node["id"]: node for node in shipped.graph["nodes"]}
    links = {link[0]: link for link in shipped.graph["links"]}
    for i, source, output, target, slot, kind in links.values():
        names, types = (shipped.kinds[nodes[source]["type"]][part] for part in ("output_name", "output"))
        start, end = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert i in start["links"] and i == end["link"]
        assert (start["name"], start["type"]) == (names[output], types[output])
        assert kind == start["type"] == end["type"] == specs_of(shipped.kinds[nodes[target]["type"]])[end["name"]][0]
    for node in nodes.values():
        if node["type"] not in NOTES:
            required = shipped.kinds[node["type"]]["input"]["required"]
            linked = {socket["name"] for socket in node["inputs"] if socket["link"] in links}
            assert [name for name, spec in required.items() if not is_widget(spec) and name not in linked] == []


def test_a_shipped_workflow_runs_and_says_what_it_did(server, shipped):
    graph, name = to_api(shipped.graph, shipped.kinds), shipped.path.stem
    for node in graph.values():
        kind = node["class_type"]
        if kind == "CLIPTextEncode":
            node |= {"class_type": "TestConditioning", "inputs": {}}
        node["inputs"] |= STANDING_IN.get(kind, {})
    run = server.run(graph)
    assert run.error is None, run.error
    ids = {entry["class_type"]: node for node, entry in graph.items()}
    said = [node for kind, node in ids.items() if kind.startswith("PCM") and node in run.outputs]
    texts = {graph[node]["class_type"]: run.text(node) for node in said}
    assert texts.pop("PCMLoadLora").startswith("4 steps, CFG 1 (1 to 2), deterministic.")
    assert re.fullmatch(SAID[name], "\n".join(filter(None, texts.values()))), texts
    saved = run.outputs[next(node for kind, node in ids.items() if kind.startswith("Save"))]["images"][0]
    assert saved["filename"].startswith("pcm")
    with Image.open(server.base / "output" / saved["filename"]) as image:
        assert image.size == SIZES.get(name, (64, 64))
        assert getattr(image, "n_frames", 1) == (2 if name == "08_interpolate" else 1)


def test_a_shipped_workflow_has_a_picture_and_is_offered(server, shipped):
    assert shipped.path.with_suffix(".jpg").read_bytes()[:2] == b"\xff\xd8"
    assert shipped.path.stem in server.get("/workflow_templates")["phased-consistency"]


def test_the_shipped_workflows_are_those_described(server):
    """Run `python -m host.templates` after a change (see there)."""
    described = templates.files(server.get("/object_info"))
    assert {path: path.read_text(encoding="utf-8") for path in WORKFLOWS} == described
