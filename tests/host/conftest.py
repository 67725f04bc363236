"""Marks the tests that need a ComfyUI."""

from __future__ import annotations

from pathlib import Path

import pytest

from host.fixtures import beside as beside
from host.fixtures import crowded as crowded
from host.server import hosts

HERE = Path(__file__).parent
NO_HOST = "no ComfyUI found: set COMFYUI_PATH to its folder, or install it with comfy-cli into ~/comfy/ComfyUI"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if HERE in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.host)
        if not hosts():
            item.add_marker(pytest.mark.skip(reason=NO_HOST))
