"""What nodes say, beside the text itself: how warnings stand in it, who hears it, and what the history keeps."""

from __future__ import annotations

import urllib.error
import uuid
from contextlib import closing, suppress

import pytest
from websocket import WebSocketTimeoutException, create_connection

from host.graphs import ksampler, loaded, sample
from host.server import RUN_SECONDS, Graph, Watched, out

NOT_20 = "This LoRA was made for 4 steps, not 20: set steps to 4."
BURNS = "CFG 7 is above 2 and burns the image: set CFG to 1."


def by_ksampler(**settings) -> tuple[Graph, str, str]:
    """A graph that samples by core's KSampler, its loader, and the sampler."""
    graph, links = loaded()
    sampler = ksampler(graph, links, **settings)
    graph.add("SaveLatent", samples=out(sampler), filename_prefix="test")
    return graph, links["model"][0], sampler


def queued(server, graph: Graph) -> str:
    """The id of a graph that has run."""
    prompt = server.queue(graph)
    assert server.wait(prompt).error is None
    return prompt


def test_warnings_are_marked_and_come_first(server):
    graph, links = loaded("partly.safetensors")
    nodes = links["model"][0], sample(graph, links, cfg=7.0, steps=4)
    graph.add("SaveLatent", samples=out(nodes[1]), filename_prefix="test")
    outputs = server.history(queued(server, graph))
    for node, warning in zip(nodes, ("18 of 73 modules have no place in this model", BURNS), strict=True):
        first, second, *_ = outputs[node]["text"][0].splitlines()
        assert first.startswith(f"⚠ {warning}") and not second.startswith("⚠")


def test_what_samplers_brought_to_light_is_in_the_history(server):
    """Each graph's own, though the loader ran in the first of them alone."""
    graph, loader, sampler = by_ksampler(steps=20, seed=9001)
    wrong = queued(server, graph)
    graph[sampler]["inputs"]["cfg"] = 7.0
    worse = queued(server, graph)
    graph[sampler]["inputs"] |= {"steps": 4, "cfg": 1.0}
    right = queued(server, graph)
    said = [dict(server.history(prompt)[loader]["warnings"][0]).get(prompt, []) for prompt in (wrong, worse, right)]
    assert said == [[NOT_20], [NOT_20, BURNS], []]


def test_where_all_is_cached_the_last_warnings_stand(server):
    graph, loader, _ = by_ksampler(steps=20, seed=9002)
    wrong, again = queued(server, graph), queued(server, graph)
    assert server.history(again)[loader]["warnings"][0][-1] == [wrong, [NOT_20]]


def test_what_nodes_say_is_no_file_that_a_prompt_has_made(server):
    graph, _, sampler = by_ksampler(steps=20, seed=9004)
    decoded = graph.add("VAEDecode", samples=out(sampler), vae=["1", 2])
    graph.add("SaveImage", images=out(decoded), filename_prefix="test")
    prompt = queued(server, graph)
    try:
        job = server.get(f"/api/jobs/{prompt}")
    except urllib.error.HTTPError:
        pytest.skip("this ComfyUI has no list of jobs: newer ones do")
    files = [
        kept for node in server.history(prompt).values() for kept in (*node.get("images", ()), *node.get("latents", ()))
    ]
    assert job["outputs_count"] == len(files) == 2


def test_only_the_browser_that_has_queued_a_graph_is_told(server):
    """In another one, a node of this id may be any."""
    graph, loader, _ = by_ksampler(steps=20, seed=9003)
    client, other = uuid.uuid4().hex, uuid.uuid4().hex
    address = f"ws://127.0.0.1:{server.port}/ws?clientId="
    seen, bystander = Watched(), Watched()
    with (
        closing(create_connection(address + client, timeout=RUN_SECONDS)) as socket,
        closing(create_connection(address + other, timeout=1)) as quiet,
    ):
        server.queue(graph, client)
        while not seen.finished:
            seen.note(socket.recv())
        with suppress(WebSocketTimeoutException):
            while True:
                bystander.note(quiet.recv())
    assert seen.warnings[loader] == [NOT_20] and bystander.texts == {}
