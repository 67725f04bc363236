"""What nodes say stays on them: after a change of tab, a reload of the page, a run from the cache, in a subgraph."""

from __future__ import annotations

import json
from typing import Any

import pytest

from host.graphs import ksampler, loaded
from host.server import Graph, out
from host.symptoms import BARE_MODEL
from host.templates import WORKFLOWS
from web.frontend import Frontend

DEMO = next(path for path in WORKFLOWS if path.stem == "00_demo")
BURNS = "⚠ CFG 5 is above 2 and burns the image: set CFG to 1."
NOT_20 = "⚠ This LoRA was made for 4 steps, not 20: set steps to 4."
TWO = "⚠ This LoRA was made for 4 steps, not 2: set steps to 4."  # of which the tests' graphs are, to be quick
HEUN = "⚠ Sampler heun does not suit this LoRA: take euler, or PCM Sampler."
SETTINGS = "4 steps at CFG 5, deterministic."
RIGHT = "4 steps, CFG 1 (1 to 2), deterministic."


@pytest.fixture
def burnt(frontend) -> Frontend:
    """The page with the demo's template, whose Sample PCM has run with a CFG that burns."""
    frontend.open_template("00_demo")
    frontend.set("PCMSample", "cfg", 5)
    assert frontend.run().error is None
    assert frontend.said("PCMSample") == f"{BURNS}\n{SETTINGS}"
    return frontend


def by_ksampler(*names: str) -> tuple[Graph, list[str]]:
    """Equal loaders, each for a KSampler with the sampler of this name; returns the loaders' ids."""
    graph, links = loaded()
    loaders = [links["model"][0]]
    loaders += [graph.add("PCMLoadLora", **graph[loaders[0]]["inputs"]) for _ in names[1:]]
    for loader, name in zip(loaders, names, strict=True):
        sampled = ksampler(graph, links | {"model": out(loader)}, sampler_name=name, steps=2)
        graph.add("SaveLatent", samples=out(sampled), filename_prefix="test")
    return graph, loaders


def test_it_stands_on_another_tab_and_after_a_reload(burnt):
    tab = burnt.tab()
    burnt.load_prompt(by_ksampler("euler")[0])
    assert burnt.texts() == {}
    burnt.open_tab(tab)
    assert burnt.said("PCMSample") == f"{BURNS}\n{SETTINGS}" and burnt.said("PCMLoadLora").startswith(RIGHT)
    burnt.open()
    burnt.page.wait_for_function("tests.node('PCMSample')")
    burnt.errors[:] = [
        error for error in burnt.errors if "phased-consistency" in error
    ]  # 0.3.64 has one on loading again
    assert burnt.said("PCMSample") == f"{BURNS}\n{SETTINGS}" and burnt.said("PCMLoadLora").startswith(RIGHT)


def test_equal_loaders_speak_for_themselves(frontend):
    graph, (right, wrong) = by_ksampler("euler", "heun")
    frontend.load_prompt(graph)
    assert frontend.run().error is None
    texts = frontend.texts()
    assert texts[right].startswith(f"{TWO}\n{RIGHT}") and texts[wrong].startswith(f"{TWO}\n{HEUN}\n{RIGHT}")


def test_a_cached_run_repeats_the_last_warnings(newer, frontend):
    """In a page that has not seen them."""
    graph, loaders = by_ksampler("euler", "heun")
    is_said = "loaders => loaders.every((loader) => tests.texts()[loader])"  # where all is cached, after the run
    frontend.load_prompt(graph)
    assert frontend.run().error is None
    frontend.page.wait_for_function(is_said, arg=loaders)
    texts = frontend.texts()
    assert all(texts[loader].startswith(TWO) for loader in loaders)
    frontend.page.evaluate("() => sessionStorage.clear()")
    frontend.load_prompt(graph)
    assert frontend.texts() == {}
    assert frontend.run().error is None
    frontend.page.wait_for_function(is_said, arg=loaders)
    assert frontend.texts() == texts


def test_a_tab_that_is_not_open_hears_its_own_nodes(burnt):
    """A run that is queued in one tab, and ends while another one is open, whose nodes have the same ids."""
    tab = burnt.tab()
    burnt.load(json.loads(DEMO.read_text(encoding="utf-8")), "another")
    burnt.set("PCMSample", "steps", 20)
    burnt.run(then=lambda: burnt.open_tab(tab))
    assert burnt.said("PCMSample") == f"{BURNS}\n{SETTINGS}"
    burnt.open_tab("another")
    assert burnt.said("PCMSample").startswith(NOT_20)


START, SAYS, OTHERS, END = (
    ["execution_start", {"prompt_id": "mine"}],
    ["progress_text", {"nodeId": "2", "text": "said"}],
    ["progress_text", {"nodeId": "1", "text": "not ours"}],
    ["execution_success", {"prompt_id": "mine"}],
)
FOREIGN = ["progress_text", {"nodeId": "2", "text": "width: 64, of anybody's graph"}]


@pytest.fixture
def quiet(frontend, request) -> Frontend:
    """The page with a graph that other tabs have, too, whose loader is node 2, and nothing said yet; the tests take the
    host's part."""
    frontend.load(graph_of_loader(), request.node.originalname)
    assert frontend.texts() == {}
    return frontend


def graph_of_loader() -> dict[str, Any]:
    """The demo's graph, with its loader as node 2."""
    graph = json.loads(DEMO.read_text(encoding="utf-8"))
    assert next(node["id"] for node in graph["nodes"] if node["type"] == "PCMLoadLora") == 2
    return graph


def tell(page: Frontend, *news: list) -> None:
    page.page.evaluate("news => tests.tell(...news)", news)


def redrawn(page: Frontend) -> dict[str, str]:
    """What the open tab's nodes show after another one was open."""
    tab = page.tab()
    page.load_prompt(by_ksampler("euler")[0])
    page.open_tab(tab)
    return page.texts()


def test_what_others_say_is_not_kept(quiet):
    """A text that the host sends to every browser; nodes of other kinds; and the last run of another tab."""
    quiet.page.evaluate("tests.queue('mine')")
    tell(quiet, START, SAYS, OTHERS, END, FOREIGN)
    assert redrawn(quiet) == {"2": "said"}


def test_news_that_come_before_the_hosts_answer_are_kept(quiet):
    quiet.page.evaluate("news => tests.queue('mine', () => tests.tell(...news))", [START, SAYS, END])
    assert redrawn(quiet) == {"2": "said"}


def test_a_page_that_is_loaded_again_during_a_run_knows_whose_it_is(newer, quiet):
    quiet.page.evaluate("tests.queue('mine')")
    tell(quiet, START)
    tab = quiet.tab()
    quiet.load(graph_of_loader(), "beside")
    quiet.open()
    quiet.page.wait_for_function("tests.node('PCMLoadLora')")
    tell(quiet, ["progress_state", {"prompt_id": "mine", "nodes": {}}], SAYS)
    assert quiet.tab() == "beside" and quiet.texts() == {}
    quiet.open_tab(tab)
    assert quiet.texts() == {"2": "said"}


def test_a_tab_that_was_closed_takes_its_words_with_it(quiet):
    """The same graph, opened anew, has its name and its nodes."""
    quiet.page.evaluate("tests.queue('mine')")
    tell(quiet, START, SAYS, END)
    tab = quiet.tab()
    quiet.page.evaluate("() => { tests.tab = app.extensionManager.workflow.activeWorkflow; }")
    quiet.load_prompt(by_ksampler("euler")[0])
    quiet.page.evaluate("app.extensionManager.workflow.closeWorkflow(tests.tab)")
    quiet.load(graph_of_loader(), tab)
    assert quiet.tab() == tab and quiet.texts() == {}


def test_a_tab_that_is_saved_under_another_name_keeps_its_words(quiet):
    quiet.page.evaluate("tests.queue('mine')")
    tell(quiet, START)
    workflows = "app.extensionManager.workflow"
    quiet.page.evaluate(f"{workflows}.renameWorkflow({workflows}.activeWorkflow, 'workflows/renamed.json')")
    tell(quiet, SAYS, END)
    assert redrawn(quiet) == {"2": "said"} and quiet.tab() == "renamed"


def test_a_graph_that_a_script_has_made_has_no_words_yet(quiet):
    """Which takes the place of another such graph in its tab."""
    graph, _ = by_ksampler("euler")
    quiet.load_prompt(graph)
    quiet.page.evaluate("tests.queue('mine')")
    tell(quiet, START, SAYS, END)
    quiet.load_prompt(graph)
    tab = quiet.tab()
    quiet.load(graph_of_loader(), "elsewhere")
    quiet.open_tab(tab)
    assert quiet.texts() == {}


def test_a_graph_that_was_cleared_has_no_words(quiet):
    """Whose new nodes have the old ids."""
    quiet.page.evaluate("tests.queue('mine')")
    tell(quiet, START, SAYS)
    quiet.page.evaluate("() => { app.clean(); app.api.dispatchCustomEvent('graphCleared'); }")
    add = "(kinds) => kinds.forEach((kind) => app.graph.add(LiteGraph.createNode(kind)))"
    quiet.page.evaluate(add, ["PCMLoadLora", "PCMLoadLora"])
    tell(quiet, END)
    assert redrawn(quiet) == {}


def test_a_graph_that_is_loading_gets_the_words_of_its_own_tab(quiet):
    """While another pack's hook keeps it, the tab before it counts as open."""
    quiet.page.evaluate("tests.queue('mine')")
    tell(quiet, START, SAYS, END)
    tab = quiet.tab()
    other = graph_of_loader() | {"id": "11111111-2222-4333-8444-555555555555"}
    slow = "() => new Promise((resolve) => setTimeout(resolve, tests.slow))"
    quiet.page.evaluate(
        f"() => {{ tests.slow = 500; app.registerExtension({{ name: 'slow', afterConfigureGraph: {slow} }}); }}"
    )
    quiet.load(other, "slow")
    assert quiet.tab() == "slow" and quiet.texts() == {}
    quiet.open_tab(tab)
    quiet.page.wait_for_function("tests.texts()[2] === 'said'")
    quiet.page.evaluate("() => { tests.slow = 0; }")


def test_it_stands_in_a_subgraph(newer, frontend):
    frontend.load(json.loads(DEMO.read_text(encoding="utf-8")), "inside")
    frontend.set("PCMSample", "cfg", 5)
    frontend.page.evaluate("() => app.graph.convertToSubgraph(new Set([tests.node('PCMSample')]))")
    assert frontend.run().error is None
    assert not any(BURNS in text for text in frontend.texts().values())
    frontend.page.evaluate("() => app.canvas.setGraph([...app.rootGraph.subgraphs.values()][0])")
    assert list(frontend.texts().values()) == [f"{BURNS}\n{SETTINGS}"]
    frontend.page.evaluate("() => app.canvas.setGraph(app.rootGraph)")


def test_a_bypassed_loader_shows_the_picture_without_the_lora(frontend):
    """With a sentence of the node itself, where the page would say only that an input is missing."""
    frontend.load(json.loads(DEMO.read_text(encoding="utf-8")), "bypassed")
    frontend.page.evaluate("() => { tests.node('PCMLoadLora').mode = 4; }")
    assert frontend.run().error is None
    assert frontend.said("PCMSample") == f"⚠ {BARE_MODEL}\n25 steps at CFG 4, deterministic."


def test_a_graph_that_was_saved_when_the_recipe_stood_second_is_linked_as_it_was(frontend):
    frontend.load(older(json.loads(DEMO.read_text(encoding="utf-8"))), "older")
    assert frontend.complaints() == []
    ran = frontend.run()
    assert ran.error is None
    entry = next(entry for entry in ran.prompt.values() if entry["class_type"] == "PCMSample")
    links = {name: value for name, value in entry["inputs"].items() if isinstance(value, list)}
    assert links == {
        "model": ["2", 0],
        "recipe": ["2", 1],
        "positive": ["3", 0],
        "negative": ["4", 0],
        "latent_image": ["5", 0],
    }


def older(graph: dict[str, Any]) -> dict[str, Any]:
    """The same graph with Sample PCM's inputs in the order that they had when its recipe was required."""
    node = next(node for node in graph["nodes"] if node["type"] == "PCMSample")
    node["inputs"].sort(
        key=lambda entry: ("model", "recipe", "positive", "negative", "latent_image").index(entry["name"])
    )
    slots = {entry["link"]: slot for slot, entry in enumerate(node["inputs"])}
    for link in graph["links"]:
        link[4] = slots.get(link[0], link[4])
    return graph
