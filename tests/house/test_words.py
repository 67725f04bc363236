"""What nodes say in four more languages: every sentence of the code is in the table, whole, and comes out right."""

from __future__ import annotations

import json
import re
import time
from itertools import product

import pytest

from host.locales import LANGUAGES
from host.workflows import ROOT
from phased_consistency.samplers.file_kinds import KINDS
from phased_consistency.samplers.lora_info import NOTED
from phased_consistency.samplers.recipe import SOURCES
from support import spoken
from support.examples import examples
from support.phrasebook import FIELD, Phrasebook, kind_of, rows, table

PATH = re.compile(r"[\w.-]+/[\w./-]+|\w+\.safetensors", re.ASCII)
ALONE = ["gamma", "lcm"]  # choices that are names in every language, besides methods, which begin with a capital


@pytest.fixture(scope="module", params=LANGUAGES)
def book(request) -> Phrasebook:
    return Phrasebook(request.param)


def test_every_sentence_of_the_code_is_in_the_table():
    """After a change to a sentence: its row in nodes/web/words.json, in each language."""
    templates = {*table()["sentences"], *(text for group in table()["phrases"].values() for text in group)}
    shapes = {spoken.shape(text) for text in templates}
    parts = [text for text in spoken.sentences() if text not in shapes]
    # what begins small is a part of sentences
    missing = [text for text in parts if not (text[0] == text[0].lower() and any(text in whole for whole in shapes))]
    assert missing == []


def test_every_sentence_of_the_table_is_in_the_code():
    literals = spoken.literals()
    assert [text for text in table()["sentences"] if spoken.shape(text) not in literals] == []


def test_every_phrase_that_a_sentence_names_is_in_the_table():
    groups = table()["phrases"]
    assert groups["source"].keys() == set(SOURCES.values())
    assert groups["noted"].keys() == set(NOTED.values())
    assert groups["kind"].keys() == {kind for _, kind, _ in KINDS}
    assert groups["remedy"].keys() == {remedy for _, _, remedy in KINDS}
    kinds = {kind_of(field) for text, _ in rows() for field in FIELD.findall(text)}
    assert groups.keys() <= kinds


def test_every_row_is_whole():
    """Four translations, in which the fields and the figures of the English are."""
    for english, row in rows():
        assert tuple(row) == LANGUAGES, english
        for translation in row.values():
            assert sorted(FIELD.findall(translation)) == sorted(FIELD.findall(english)), english
            assert set(re.findall(r"\d+(?:\.\d+)?", english)) <= set(re.findall(r"\d+(?:\.\d+)?", translation)), english
            assert translation or english in ("", "is", "are")


def test_what_nodes_say_comes_out_right(book):
    for english in examples():
        forms = book.matches(english)
        assert len(forms) == 1, (english, forms)
        for kept in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\w)|\S+\.safetensors|lora_unet\w+", english):
            assert kept in forms[0], (english, forms[0])
        prose = re.sub(r"'[^']*'|\[[^]]*\]|\S*[/_=.]\S*", "", forms[0])
        words = re.findall(r"(?<![\w-])(?:the|is|are|to|for|not|has|must|modules)(?![\w-])", prose)
        assert words == [], (english, forms[0])


def test_marks_errors_and_the_words_of_others_stay(book):
    told = "No file at /x. Check the name; only .safetensors files are read."
    whole = book.line(told)
    assert whole != told and "/x" in whole
    assert book.line(f"⚠ {told}") == f"⚠ {whole}"
    assert book.line(f"⚠ FileNotFoundError: {told}") == f"⚠ FileNotFoundError: {whole}"
    for others in ("", "⚠ ", "width: 64, height: 64", "RuntimeError: CUDA error: out of memory", "One, two, three."):
        assert book.line(others) == others


def test_a_part_that_is_not_known_stays_within_its_sentence(book):
    assert (
        book.line(
            "Cannot write /a/b: [Errno 28] No space left. Free space or choose another name; nothing that was "
            "there is lost."
        ).count("[Errno 28] No space left")
        == 1
    )
    assert "Title of mine, by me" in book.line("Author: Title of mine, by me.")


def test_a_long_line_takes_no_time(book):
    line = "a, b: (c); CFG 1 of 2 modules such as {} is 3, by ".format("'x'") * 10
    before = time.perf_counter()
    assert book.line(line) == line
    assert time.perf_counter() - before < 1


def test_every_note_of_a_template_is_in_the_table(book):
    notes = [note_of(graph) for graph in graphs()]
    for note in notes:
        assert (shown := book.note(note)) is not None, note
        assert len(shown.splitlines()) == len(note.splitlines())
        assert sorted(PATH.findall(note)) == sorted(PATH.findall(shown))
    lines = {line for note in notes for line in note.splitlines()}
    unused = [text for pattern, _, text in book.notes if not any(map(pattern.fullmatch, lines))]
    assert unused == []
    assert book.note(f"{notes[0]}\nand a line of mine") is None


def test_every_title_of_a_template_is_in_the_table(book):
    """Of nodes and of groups; a note that calls a node by its title does so by the translated one."""
    titles = {part["title"] for graph in graphs() for part in (*graph["nodes"], *graph["groups"]) if "title" in part}
    assert {title: book.title(title) for title in titles if book.title(title) is None} == {}
    assert [text for pattern, _, text in book.titles if not any(map(pattern.fullmatch, titles))] == []
    for note, title in product(map(note_of, graphs()), titles):
        if f"*{title}*" in note.replace("**", ""):
            assert f"*{book.title(title)}*" in book.note(note)


def graphs() -> list[dict]:
    """The templates."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "workflows").glob("*.json"))]


def note_of(graph: dict) -> str:
    return next(node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote")


def test_every_choice_of_a_widget_is_in_the_table():
    schemas = (ROOT / "tests" / "host" / "schemas.json").read_text(encoding="utf-8")
    lists = (json.loads(options) for options in re.findall(r'"options": (\[[^]]*\])', schemas))
    choices = {choice for options in lists for choice in options if not choice[0].isupper()}
    assert sorted(table()["choices"]) == sorted(choices - set(ALONE))
