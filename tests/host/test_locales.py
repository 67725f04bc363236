"""The nodes in other languages: written from the table of translations, whole, and served."""

from __future__ import annotations

import json
import re

import pytest

from host import locales
from host.schemas import ours
from host.workflows import specs_of


@pytest.fixture(scope="module")
def kinds(server):
    return ours(server.get("/object_info"))


def test_the_locales_are_those_of_the_table(kinds):
    """Run `python -m host.locales` after a change (see there); an English text that changed wants a new translation."""
    written = locales.files(kinds)
    assert {path: path.read_text(encoding="utf-8") for path in written} == written


def test_a_text_without_a_translation_is_named(kinds, monkeypatch):
    table = locales.translations()
    monkeypatch.setattr(locales, "translations", lambda: {**table, "What to show.": {"zh": ""}, "Old.": {}})
    with pytest.raises(ValueError, match=r"'Old\.' is on no node any more\n'What to show\.' has no zh-TW, ja, ko$"):
        locales.files(kinds)


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_the_host_serves_ours(server, language):
    shipped = json.loads(locales.path_of(language).read_text(encoding="utf-8"))
    served = server.get("/i18n")[language]["nodeDefs"]
    assert {node: served[node] for node in shipped} == shipped


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_choices_are_named_as_the_widget_shows_them(kinds, language):
    """The frontend does not translate the choices of a widget, so its tooltip must not either."""
    shipped = json.loads(locales.path_of(language).read_text(encoding="utf-8"))
    for node, kind in kinds.items():
        for name, (_, options) in specs_of(kind).items():
            translation = shipped[node]["inputs"][name]["tooltip"]
            named = [c for c in options.get("options", ()) if re.search(rf"\b{re.escape(c)}\b", options["tooltip"])]
            assert [choice for choice in named if choice not in translation] == [], f"{node}.{name}"
