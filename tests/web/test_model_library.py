"""ComfyUI's own model library shows what our header says, as `pcm panels` says that it does.

    PCM_SCREENSHOTS=FOLDER python -m pytest tests/web/test_model_library.py

writes a picture of it, docs/web_model_library.png.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from phased_consistency.samplers import Recipe
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.trainer.sharing.panels import panels
from phased_consistency.trainer.sharing.sidecars import sidecars
from phased_consistency.trainer.sharing.tag import tag, thumbnail
from web.frontend import SIDEBAR

HINT = Recipe(family="sd15", phases=4)
FULL = {
    HEADER_KEY: HINT.to_header(),
    "modelspec.title": "Stars in 4 steps",
    "modelspec.author": "Näive & <b>co</b>",
    "modelspec.description": "Made from <i>tiny</i>.",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.tags": "PCM, few-step",
}
# no entry of ModelSpec: the page takes others whose names end alike
ODD = {"ss_output_name": "By the end of a name", "custom_author": "someone", "my.trigger_phrase": "a star"}


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    """Titles in the library -> the LoRAs, one with all that the library shows."""
    Image.radial_gradient("L").save(picture := tmp_path_factory.mktemp("picture") / "picture.png")
    source = models.folder / "loras" / "kohya.safetensors"
    full, odd = (source.with_name(f"library_{name}.safetensors") for name in ("full", "odd"))
    tag(source, FULL | thumbnail(picture), out=full)
    tag(source, ODD, [HEADER_KEY], out=odd)
    sidecars(odd, picture)
    yield {"Stars in 4 steps": full, "By the end of a name": odd}
    for file in source.parent.glob("library_*"):
        file.unlink()


@pytest.fixture
def library(frontend):
    """The model library, opened and closed as an artist does."""
    button = frontend.page.locator(SIDEBAR).get_by_role("button", name="Model Library")
    button.click()
    yield frontend.page.get_by_placeholder("Search Models")
    button.click()


def test_the_model_library_shows_what_we_say_that_it_does(frontend, library, files):
    library.fill("library_")
    for title, file in files.items():
        panel_of_host = next(panel for panel in panels(file) if panel.program == "ComfyUI")
        lines = {line.label: line.value for line in panel_of_host.lines}
        assert panel_of_host.title == title
        frontend.page.locator(".p-tree-node-content", has_text=title).hover()
        preview = frontend.page.locator(".model_preview")
        preview.locator(".model_preview_title", has_text=title).wait_for()
        assert preview.locator(".model_preview_filename").inner_text() == lines["File"] == file.name
        for label in ("Architecture", "Author", "Usage hint", "Trigger phrase", "Description"):
            text = preview.locator(f".model_preview_{label.lower().replace(' ', '_')}").all_inner_texts()
            assert [" ".join(each.split()) for each in text] == ([f"{label}: {lines[label]}"] if lines[label] else [])
        pictures = [image.get_attribute("src") for image in preview.locator("img").all()]
        assert pictures == ([panel_of_host.picture] if panel_of_host.picture else [])
        if title == FULL["modelspec.title"]:
            assert (lines["Usage hint"], len(pictures)) == (HINT.usage_hint(), 1)
            photograph(frontend.page)


def photograph(page) -> None:
    """With the mouse where it is: elsewhere, there is no panel."""
    if folder := os.environ.get("PCM_SCREENSHOTS"):
        clip = {"x": 0, "y": 40, "width": 860, "height": 400}
        page.screenshot(path=Path(folder, "model_library.png"), clip=clip)


def test_tags_are_found_by_search(frontend, library, files):
    library.fill("few-step")
    leaf = frontend.page.locator(".p-tree-node-content", has_text="Stars in 4 steps")
    leaf.wait_for()
    assert frontend.page.locator(".p-tree-node-content", has_text="By the end of a name").count() == 0
