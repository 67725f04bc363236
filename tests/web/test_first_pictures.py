"""What a newcomer does first: opens the demo, makes pictures, makes a mistake and reads about it, reads the help page.

    PCM_SCREENSHOTS=FOLDER python -m pytest tests/web/test_first_pictures.py

writes pictures of it; docs/web_warning.png is one of them.
"""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image

from host.templates import WORKFLOWS

LOADED = "4 steps, CFG 1 (1 to 2), deterministic."
NODES = ("PCMLoadLora", "PCMDemoPrompt", "PCMSample", "SaveImage")


@pytest.fixture
def demo(frontend):
    """The page with the demo's template, opened as an artist opens it."""
    frontend.open_template("00_demo")
    assert frontend.complaints() == []
    return frontend


def test_the_demo_draws_pictures_that_can_be_watched(demo, server):
    assert demo.run().error is None
    assert demo.said("PCMLoadLora").startswith(LOADED)
    assert demo.said("PCMSample") == "4 steps at CFG 1, deterministic."
    demo.look_at(*NODES)
    demo.screenshot("demo")
    demo.set("PCMSample", "steps", 2)
    ran = demo.run()
    assert ran.error is None
    assert sorted(set(ran.progress["PCMSample"])) == [0.5, 1]
    assert ran.previews == {"PCMSample"}
    assert demo.picture("PCMSample")[0].startswith("blob:")  # the last preview stays
    assert demo.said("PCMSample").splitlines()[-1] == "2 steps at CFG 1, deterministic."
    address, width = demo.picture("SaveImage")
    saved = parse_qs(urlsplit(address).query)["filename"][0]
    with Image.open(server.base / "output" / saved) as image:
        assert image.width == width and len(image.getcolors(1 << 20)) > 100


def test_a_wrong_setting_is_a_sentence_on_the_node(demo):
    demo.set("PCMSample", "cfg", 5)
    assert demo.run().error is None
    burns = "⚠ CFG 5 is above 2 and burns the image: set CFG to 1."
    assert demo.said("PCMSample") == f"{burns}\n4 steps at CFG 5, deterministic."
    demo.look_at("PCMSample", "SaveImage")
    demo.screenshot("warning", crop=("PCMSample", "SaveImage"))
    demo.set("PCMSample", "steps", 9)
    assert demo.run().error is None
    assert demo.said("PCMSample").splitlines()[:2] == [
        "⚠ This LoRA was made for 4 steps, not 9: set steps to 4.",
        burns,
    ]


def test_the_help_page_is_ours(demo):
    page = demo.help("PCMSample")
    assert page.locator("h1").inner_text() == "Sample PCM"
    assert {"steps", "cfg", "denoise"} <= set(page.locator("code").all_inner_texts())
    demo.screenshot("help")


def test_the_template_browser_shows_our_templates(frontend):
    cards = frontend.panel().locator("[data-testid^=template-workflow-]")
    cards.first.wait_for()
    visible = [card.get_attribute("data-testid") for card in cards.all()]
    # older frontends add more on scrolling
    assert visible == [f"template-workflow-{path.stem}" for path in WORKFLOWS][: len(visible)]
    frontend.screenshot("templates")
    frontend.dismiss()


def test_a_node_that_is_cached_says_what_it_did(newer, demo):
    """The same graph again, in a page that has not seen it run."""
    first = demo.run()
    demo.open()
    demo.open_template("00_demo")
    again = demo.run()
    assert again.prompt == first.prompt and again.progress == {}
    demo.look_at(*NODES)  # the page may show the graph where it was looked at before
    assert demo.said("PCMSample") == "4 steps at CFG 1, deterministic."
    assert demo.said("PCMLoadLora").startswith(LOADED)


def test_what_nodes_say_can_be_read_in_nodes_2(newer, demo):
    demo.use("Comfy.VueNodes.Enabled", True)
    try:
        assert demo.run().error is None
        assert demo.said("PCMSample") == "4 steps at CFG 1, deterministic."
        assert demo.said("PCMLoadLora").startswith(LOADED)
        demo.look_at(*NODES)
        demo.screenshot("nodes_2")
    finally:
        demo.use("Comfy.VueNodes.Enabled", False)
