"""One page for each host, in a headless Chromium, on the host tests' server and models."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from host.conftest import NO_HOST
from host.server import hosts
from host.stand_ins import make_small
from phased_consistency.trainer.tiny.comfy import write_files

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Playwright

# As root, as in a container, Chromium cannot have its sandbox; it sees our own server alone.
OPTIONS = ("no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking", "disable-sync")
COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HERE = Path(__file__).parent
NO_PLAYWRIGHT = (
    "no Playwright found: pip install 'playwright>=1.48', or the extra `test` (it needs no browser of its own)"
)
NO_CHROMIUM = "no Chromium found: apt-get install chromium, or set CHROMIUM to a Chromium's or Chrome's command"


def find_browser() -> str | None:
    """Chromium's command: $CHROMIUM, else the first of its usual names on the path; None where there is none."""
    named = os.environ.get("CHROMIUM")
    return next(filter(None, map(shutil.which, [named] if named else COMMANDS)), None)


def chromium(playwright: Playwright) -> Browser:
    """A headless Chromium with an empty profile."""
    options = [f"--{option}" for option in OPTIONS]
    return playwright.chromium.launch(executable_path=find_browser(), args=options)


def missing() -> str | None:
    """What these tests need and this machine lacks, as a sentence."""
    if not hosts():
        return NO_HOST
    if not importlib.util.find_spec("playwright"):
        return NO_PLAYWRIGHT
    return None if find_browser() else NO_CHROMIUM


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.web)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium with an empty profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = chromium(playwright)
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def opened(server, browser):
    """The page of a host, at its first start, with the demo's files and ComfyUI's own example picture."""
    from web.frontend import SETTINGS, Frontend

    write_files(server.base)
    shutil.copytree(server.folder / "input", server.base / "input", dirs_exist_ok=True)
    server.post("/settings", **SETTINGS)
    return Frontend(browser, f"{server.url}/", stand_in)


def stand_in(prompt: dict[str, Any]) -> None:
    """Make what the frontend has queued small, and give it prompts where there is no text encoder; the demo has all."""
    if not any(node["class_type"] == "PCMDemoPrompt" for node in prompt.values()):
        make_small(prompt)


@pytest.fixture
def frontend(opened) -> Iterator:
    """The page, which must not have had an error of ours when the test ends."""
    opened.errors.clear()
    yield opened
    assert opened.errors == []


def is_newer(server) -> bool:
    """Whether this ComfyUI is newer than 0.3.64, where Nodes 2.0 are an experiment."""
    return "has_intermediate_output" in server.get("/object_info/PCMSample")["PCMSample"]


@pytest.fixture
def newer(server) -> None:
    """Skips on a ComfyUI as old as 0.3.64."""
    if not is_newer(server):
        pytest.skip(
            "this ComfyUI does not send again what cached nodes said, nor show it in Nodes 2.0, nor open unsaved tabs "
            "again: newer ones do"
        )
