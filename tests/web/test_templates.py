"""Every shipped template, opened from the template browser on a page of 1440 x 900, queued as it is, and seen larger.

    PCM_SCREENSHOTS=FOLDER python -m pytest tests/web/test_templates.py

writes pictures of them, before and after the run, and in Nodes 2.0.
"""

from __future__ import annotations

import copy
import json
from itertools import combinations

import pytest
from PIL import Image

from host.stand_ins import skip_without_small
from host.templates import WORKFLOWS
from host.workflows import overlap, to_api
from web.conftest import is_newer
from web.frontend import Frontend

LARGE = 1920, 1080  # a page of another size
READ = 8 / 14  # the zoom below which ComfyUI leaves texts of 14 pixels out, as it is set at first


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_template_opens_whole_and_runs(frontend, server, picture, path):
    graph = to_api(json.loads(path.read_text(encoding="utf-8")), server.get("/object_info"))
    skip_without_small(server, graph)
    with Image.open(path.with_suffix(".jpg")) as thumbnail:
        assert frontend.open_template(path.stem) == thumbnail.width
    assert frontend.unknown_nodes() == []
    assert frontend.complaints() == []
    assert frontend.zoom() >= READ
    assert frontend.unread() <= 0
    assert on_one_another(frontend) == []
    assert frontend.cut() == []
    ran = frontend.run()
    assert ran.error is None
    assert queued(ran.prompt) == graph
    is_in_order(frontend, path.stem)
    if is_newer(server):
        with frontend.nodes_2():
            is_in_order(frontend, f"{path.stem}_nodes_2")


def is_in_order(frontend: Frontend, name: str) -> None:
    """Nothing is hidden, cut or sticks out after a run, and all can be read on a larger page too."""
    assert on_one_another(frontend) == []
    assert beyond_frames(frontend) == []
    assert frontend.cut() == []
    frontend.screenshot(name)
    assert frontend.zoom_on(*LARGE) >= READ
    frontend.screenshot(f"{name}_large", large=LARGE)


def on_one_another(frontend: Frontend) -> list[tuple[str, str]]:
    """Pairs of nodes of which one hides a part of the other."""
    places = frontend.places().items()
    return [(a, b) for (a, at), (b, other) in combinations(places, 2) if overlap(at, other)]


def beyond_frames(frontend: Frontend) -> list[tuple[str, str]]:
    """Nodes, notes among them, that lie across the frame of a group, and its title."""
    frames, places = frontend.frames(), frontend.places().items()
    return [(a, title) for a, at in places for title, frame in frames if overlap(at, frame) and not within(at, frame)]


def within(box: tuple[float, ...], frame: tuple[float, ...]) -> bool:
    return frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]


def queued(prompt: dict) -> dict:
    """A prompt as the frontend queues it, without the titles that it adds."""
    return {i: {key: value for key, value in node.items() if key != "_meta"} for i, node in prompt.items()}


def test_the_zoom_on_a_larger_page_is_the_one_worked_out(frontend):
    frontend.load(json.loads(WORKFLOWS[0].read_text(encoding="utf-8")), "large")
    expected = frontend.zoom_on(*LARGE)
    with frontend.sized(*LARGE):
        assert frontend.zoom() == pytest.approx(expected)


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
    frontend.dismiss()


def test_a_name_or_title_that_is_cut_is_noticed(frontend, server):
    """The file's name in a narrow node, in both views, and a title that is wider than its frame."""
    graph = json.loads(WORKFLOWS[0].read_text(encoding="utf-8"))
    loader = next(node for node in graph["nodes"] if node["type"] == "PCMLoadLora")
    loader["size"][0] = 240
    frontend.load(graph, "cut")
    assert len(frontend.cut()) == 1
    if is_newer(server):
        with frontend.nodes_2():
            assert loader["widgets_values"][0] in frontend.cut()
    frontend.page.evaluate("() => { app.graph.groups[0].title = 'A title of many words '.repeat(4); }")
    assert len(frontend.cut()) == 2
