"""One server per host for the whole session, on a temporary folder with the pack and tiny models in it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from host.server import Server, hosts

HERE = Path(__file__).parent
PACK = HERE.parents[1]
NO_HOST = "no ComfyUI found: set COMFYUI_PATH to its folder, or install it with comfy-cli into ~/comfy/ComfyUI"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if HERE in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.host)
        if not hosts():
            item.add_marker(pytest.mark.skip(reason=NO_HOST))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The small files, made once: their folder, and the LoRAs in them as tensors by module."""
    from host.tiny import make_checkpoint, make_controlnet, make_loras
    from host.tiny_sd3 import make_sd3
    from host.tiny_sdxl import make_sdxl

    folder = tmp_path_factory.mktemp("models")
    for kind in ("checkpoints", "controlnet", "loras"):
        (folder / kind).mkdir()
    unet = make_checkpoint(folder / "checkpoints" / "tiny.safetensors")
    make_controlnet(folder / "controlnet" / "tiny.safetensors", unet)
    places = folder / "checkpoints", folder / "loras"
    return SimpleNamespace(
        folder=folder,
        lora=make_loras(folder / "loras", unet),
        sdxl_lora=make_sdxl(*places),
        sd3_loras=make_sd3(*places),
    )


@pytest.fixture(scope="session", params=hosts() or [None], ids=lambda p: p.parent.name if p else "none")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: SimpleNamespace):
    """A running host with this pack; its log is in the failure report through `server.log`."""
    base = tmp_path_factory.mktemp("base")
    nodes = base / "custom_nodes"
    nodes.mkdir()
    (nodes / "phased-consistency").symlink_to(PACK, target_is_directory=True)
    shutil.copy(HERE / "helper_nodes.py", nodes)
    (base / "models").symlink_to(models.folder, target_is_directory=True)
    running = Server(request.param, base)
    yield running
    running.stop()
