"""What nodes say is to be seen: whole, line by line, warnings first and marked, and of the last run alone.

    PCM_SCREENSHOTS=FOLDER python -m pytest tests/web/test_sentences.py

writes pictures of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from phased_consistency.samplers.lora_file import read_header
from phased_consistency.samplers.lora_info import facts, noted, sentences
from phased_consistency.trainer.tiny.comfy import LORA
from web.frontend import Frontend

BURNS = "⚠ CFG 5 is above 2 and burns the image: set CFG to 1."
NOT_30 = "⚠ This LoRA was made for 4 steps, not 30: set steps to 4."
EMPTY = {"nodes": [], "links": [], "version": 0.4}


@pytest.fixture(params=["classic", "nodes_2"])
def view(request) -> Iterator[str]:
    """Each way in which the page draws nodes, of which an older one has the first alone."""
    if request.param == "nodes_2":
        request.getfixturevalue("newer")
    frontend = request.getfixturevalue("frontend")
    frontend.use("Comfy.VueNodes.Enabled", request.param == "nodes_2")
    yield request.param
    frontend.use("Comfy.VueNodes.Enabled", False)


@pytest.fixture
def demo(frontend) -> Frontend:
    frontend.open_template("00_demo")
    return frontend


def test_every_line_is_to_be_seen_and_warnings_are_marked(view, demo):
    demo.give("PCMSample", cfg=5, steps=30)
    assert demo.run().error is None
    assert demo.lines("PCMSample") == [
        NOT_30,
        BURNS,
        "20 steps of 30: there are no more levels.",
        "20 steps at CFG 5, deterministic.",
    ]
    assert len(demo.lines("PCMLoadLora")) == 3
    demo.look_at("PCMLoadLora", "PCMDemoPrompt", "PCMSample")
    demo.screenshot(f"sentences_{view}")


def test_a_new_node_has_room_for_its_text_and_grows_with_it(demo):
    """And is as it was once there is less to say."""
    demo.node("PCMCompare")
    actual, needed = demo.heights("PCMCompare")
    assert actual >= needed
    demo.write("PCMLoadLora", ["Short."])
    height, _ = demo.heights("PCMLoadLora")
    lines = [f"⚠ A warning, number {i}, with some more words, so that it takes two lines." for i in range(9)]
    demo.write("PCMLoadLora", lines)
    assert demo.lines("PCMLoadLora") == lines
    assert demo.heights("PCMLoadLora")[0] > height + 9 * 30
    demo.write("PCMLoadLora", ["Short."])
    assert demo.heights("PCMLoadLora")[0] == height


def test_lora_info_shows_all_its_lines_and_none_twice(view, frontend):
    frontend.load(EMPTY, "info")
    frontend.node("PCMLoraInfo", lora=LORA.name)
    assert frontend.run().error is None
    values = facts(read_header(LORA))
    shown = frontend.lines("PCMLoraInfo")
    assert shown == [*sentences(values), *noted(values["metadata"], values["usage"])]
    assert sum(values["usage"].rstrip(".") in line for line in shown) == 1
    frontend.screenshot(f"info_{view}")


def test_a_node_that_fails_says_why_in_place_of_what_it_said_before(view, demo):
    assert demo.run().error is None
    demo.give("EmptySD3LatentImage", width=512)
    demo.give("PCMDemoPrompt", text="a purple dinosaur on a red background")
    assert demo.run().error
    prompt = demo.lines("PCMDemoPrompt")
    assert prompt[0].startswith("⚠ The base does not draw 'purple dinosaur'. Nearest are: ")
    assert prompt[1].startswith("⚠ The base has no ground 'red'. It has white, black, ") and len(prompt) == 2
    demo.screenshot(f"words_{view}")
    demo.dismiss()

    demo.give("PCMDemoPrompt", text="a fox")
    assert demo.run().error
    assert demo.lines("PCMDemoPrompt") == ["Only for the checkpoint pcm_demo_emoji."]
    (edge,) = demo.lines("PCMSample")
    assert edge.startswith("⚠ 512 x 128 pixels are too many: this SD3 model draws at most 256 on an edge.")
    demo.dismiss()

    demo.give("EmptySD3LatentImage", width=128)
    assert demo.run().error is None
    assert demo.lines("PCMSample") == ["4 steps at CFG 1, deterministic."]


def test_a_node_without_words_says_why_it_failed_until_the_next_run(frontend):
    frontend.load_prompt({"1": {"class_type": "PCMSampler", "inputs": {"mode": "from recipe", "gamma": 0.3}}})
    frontend.node("PreviewAny")
    frontend.page.evaluate("() => tests.node('PCMSampler').connect(0, tests.node('PreviewAny'), 0)")
    assert frontend.run().error
    assert frontend.lines("PCMSampler") == [
        "⚠ PCM Sampler has the mode 'from recipe' but no recipe: connect that of Load PCM LoRA, or choose another mode."
    ]
    frontend.dismiss()
    frontend.give("PCMSampler", mode="stochastic")
    assert frontend.run().error is None
    assert frontend.texts() == {}


def test_a_node_that_the_host_refuses_drops_its_sentence(demo):
    assert demo.run().error is None
    demo.give("PCMSample", steps=101)
    assert demo.run().error
    assert demo.lines("PCMSample")[0].startswith("⚠ Value 101 bigger than max of 100")
    demo.dismiss()


def test_warnings_are_seen_in_app_mode(newer, demo):
    """Where the demo shows its prompt, seed, steps and CFG."""
    demo.give("PCMSample", cfg=5)
    demo.page.evaluate("() => { app.extensionManager.workflow.activeWorkflow.activeMode = 'app'; }")
    try:
        for name in ("text", "seed", "steps", "cfg"):
            demo.page.get_by_text(name, exact=True).last.wait_for()
        demo.page.keyboard.press("Escape")  # the page's welcome to apps
        demo.page.evaluate("app.queuePrompt(0)")
        toast = demo.page.get_by_role("alert").filter(has_text=BURNS.removeprefix("⚠ "))
        toast.first.wait_for()
        demo.page.wait_for_function("tests.ended()")
        demo.page.wait_for_timeout(500)
        assert toast.count() == 1
        demo.screenshot("app_mode")
    finally:
        demo.page.evaluate("() => { app.extensionManager.workflow.activeWorkflow.activeMode = 'graph'; }")
