"""What nodes say, templates' notes and titles, and widgets' choices in the page's language; the graph stays as it is.

    PCM_SCREENSHOTS=FOLDER python -m pytest tests/web/test_words.py

writes pictures of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from host.locales import LANGUAGES
from host.templates import WORKFLOWS
from support.examples import examples
from support.phrasebook import Phrasebook
from web.frontend import Frontend

BURNS = "⚠ CFG 5 is above 2 and burns the image: set CFG to 1."
SETTINGS = "4 steps at CFG 5, deterministic."
NOTE = "() => tests.node('MarkdownNote').widgets[0].value"
SAVED = "() => app.graph.serialize().nodes.find((node) => node.type === 'MarkdownNote').widgets_values[0]"
TITLES = "() => [...app.graph.nodes, ...app.graph.groups].map(({ title }) => title)"
LABEL = "() => tests.widget('PCMSampler', 'mode')._displayValue"


def template(name: str) -> dict[str, Any]:
    path = next(path for path in WORKFLOWS if path.stem == name)
    return json.loads(path.read_text(encoding="utf-8"))


def titles(page: Frontend) -> set[str]:
    """What the nodes and groups of the open graph are called on the page."""
    return set(page.page.evaluate(TITLES))


def saved_titles(page: Frontend) -> list[dict[int, str]]:
    """The titles that nodes and groups are saved with, by their ids; None for a kind's own."""
    graph = page.page.evaluate("() => app.graph.serialize()")
    return [by_id(graph["nodes"]), by_id(graph["groups"])]


def by_id(parts: list[dict[str, Any]]) -> dict[int, str | None]:
    return {part["id"]: part.get("title") for part in parts}


def test_the_language_may_change_while_the_page_is_open(newer, frontend):
    frontend.open_template("00_demo")
    frontend.set("PCMSample", "cfg", 5)
    assert frontend.run().error is None
    english = frontend.page.evaluate(NOTE)
    shown = "word => tests.widget('PCMSample', '$$node-text-preview').element.textContent.includes(word)"
    try:
        for language, word in (("ko", "이미지가 탑니다"), ("en", "burns the image")):
            frontend.use("Comfy.Locale", language)
            frontend.page.wait_for_function(shown, arg=word)
            assert (frontend.page.evaluate(NOTE) == english) == (language == "en")
    finally:
        frontend.use("Comfy.Locale", "en")


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_translates_as_the_tests_do(frontend, language):
    book = Phrasebook(language)
    lines = [*examples(), "", "⚠ FileNotFoundError: No file at /x. Check the name; only .safetensors files are read."]
    assert frontend.page.evaluate("([language, lines]) => tests.translated(language, lines)", [language, lines]) == [
        book.line(line) for line in lines
    ]


@pytest.fixture(scope="module")
def in_chinese(opened) -> Iterator[None]:
    """From now on the page is in simplified Chinese, for which it is loaded again: once, so these tests stand last."""
    opened.use("Comfy.Locale", "zh")
    opened.open()
    yield
    opened.use("Comfy.Locale", "en")
    opened.open()


@pytest.fixture
def chinese(in_chinese, frontend) -> Frontend:
    """The page in simplified Chinese."""
    return frontend


def test_the_demo_speaks_chinese(chinese):
    book = Phrasebook("zh")
    chinese.load(template("00_demo"), "chinese")
    english = chinese.page.evaluate(SAVED)
    assert english.startswith("# Try it, without a checkpoint")
    assert chinese.page.evaluate(NOTE) == book.note(english)
    assert {book.title("Read me"), book.title("Positive prompt"), book.title("Result")} <= titles(chinese)
    assert saved_titles(chinese) == [by_id(template("00_demo")[parts]) for parts in ("nodes", "groups")]
    chinese.give("PCMSample", cfg=5)
    assert chinese.run().error is None
    assert f"{BURNS}\n{SETTINGS}" in chinese.texts().values()
    assert chinese.lines("PCMSample") == [book.line(BURNS), book.line(SETTINGS)]
    assert chinese.lines("PCMLoadLora")[0] == "4 步，CFG 1（1 到 2），确定性。"
    chinese.screenshot("words_zh_loader")
    chinese.look_at("MarkdownNote", "PCMLoadLora", "PCMSample", "SaveImage")
    chinese.screenshot("words_zh_run")


def test_a_note_that_somebody_has_written_in_and_a_title_that_they_gave_are_theirs(chinese):
    chinese.load(template("00_demo_3_inpaint"), "written")
    chinese.page.evaluate("() => { tests.node('MarkdownNote').widgets[0].value += ' Mine.'; }")
    assert chinese.page.evaluate(SAVED) == chinese.page.evaluate(NOTE)
    chinese.page.evaluate("() => { app.graph.groups[0].title = tests.node('MarkdownNote').title = 'Mine'; }")
    nodes, groups = saved_titles(chinese)
    assert "Mine" in nodes.values() and "Positive prompt" in nodes.values()
    assert list(groups.values()) == ["Mine", "Picture", "Prompt", "Edit", "Result"]


def test_titles_of_a_graph_without_our_nodes_are_its_own(chinese):
    graph = template("00_demo")
    graph["nodes"] = [node for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    chinese.load(graph | {"links": []}, "others")
    assert {"Read me", "Result"} <= titles(chinese)


def test_choices_show_their_value_too_and_stay_what_they_are(newer, chinese):
    chinese.load({"nodes": [], "links": [], "version": 0.4}, "choices")
    chinese.node("PCMSampler")
    assert chinese.page.evaluate(LABEL) == "按配方 (from recipe)"
    assert chinese.page.evaluate("() => tests.widget('PCMSampler', 'mode').value") == "from recipe"
