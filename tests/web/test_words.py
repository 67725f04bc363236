"""What nodes say, templates' notes and widgets' choices in the page's language, while the graph stays as it is.

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
LABEL = "() => tests.widget('PCMSampler', 'mode')._displayValue"


def template(name: str) -> dict[str, Any]:
    path = next(path for path in WORKFLOWS if path.stem == name)
    return json.loads(path.read_text(encoding="utf-8"))


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
    chinese.give("PCMSample", cfg=5)
    assert chinese.run().error is None
    assert f"{BURNS}\n{SETTINGS}" in chinese.texts().values()
    assert chinese.lines("PCMSample") == [book.line(BURNS), book.line(SETTINGS)]
    assert chinese.lines("PCMLoadLora")[0] == "4 步，CFG 1（1 到 2），确定性。"
    chinese.screenshot("words_zh_loader")
    chinese.look_at("MarkdownNote", "PCMLoadLora", "PCMSample", "SaveImage")
    chinese.screenshot("words_zh_run")


def test_a_note_that_somebody_has_written_in_is_theirs(chinese):
    chinese.load(template("00_demo_3_inpaint"), "written")
    chinese.page.evaluate("() => { tests.node('MarkdownNote').widgets[0].value += ' Mine.'; }")
    assert chinese.page.evaluate(SAVED) == chinese.page.evaluate(NOTE)


def test_choices_show_their_value_too_and_stay_what_they_are(newer, chinese):
    chinese.load({"nodes": [], "links": [], "version": 0.4}, "choices")
    chinese.node("PCMSampler")
    assert chinese.page.evaluate(LABEL) == "按配方 (from recipe)"
    assert chinese.page.evaluate("() => tests.widget('PCMSampler', 'mode').value") == "from recipe"
