"""Every shipped template, opened from the template browser and queued as it is."""

from __future__ import annotations

import copy
import json

import pytest
from PIL import Image

from host.stand_ins import skip_without_small
from host.templates import WORKFLOWS
from host.workflows import to_api


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_template_opens_whole_and_runs(frontend, server, picture, path):
    graph = to_api(json.loads(path.read_text(encoding="utf-8")), server.get("/object_info"))
    skip_without_small(server, graph)
    with Image.open(path.with_suffix(".jpg")) as thumbnail:
        assert frontend.open_template(path.stem) == thumbnail.width
    assert frontend.unknown_nodes() == []
    assert frontend.complaints() == []
    ran = frontend.run()
    assert ran.error is None
    assert queued(ran.prompt) == graph


def queued(prompt: dict) -> dict:
    """A prompt as the frontend queues it, without the titles that it adds."""
    return {i: {key: value for key, value in node.items() if key != "_meta"} for i, node in prompt.items()}


@pytest.mark.parametrize("wrong", ["PCMNoSuchNode", "no_such_file.safetensors"])
def test_a_template_that_lacks_something_is_noticed(frontend, wrong):
    """The checks above can fail."""
    graph = json.loads(WORKFLOWS[0].read_text(encoding="utf-8"))
    loader = next(node for node in graph["nodes"] if node["type"] == "PCMLoadLora")
    if wrong == "PCMNoSuchNode":
        loader["type"] = wrong
    else:
        loader["widgets_values"][0] = wrong
    frontend.load(copy.deepcopy(graph))
    assert frontend.unknown_nodes() == ([wrong] if wrong == "PCMNoSuchNode" else [])
    assert frontend.complaints() or frontend.run().error
    frontend.page.keyboard.press("Escape")
