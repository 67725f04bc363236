"""One server per host for the whole session, on a temporary folder with the pack and tiny models in it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from host.server import hosts, start


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The small files, made once: their folder, and the LoRAs in them as tensors by module."""
    from host.dits import write_dit_loras
    from host.lora_kinds import write_kinds
    from host.stand_ins import add_stand_ins
    from host.tiny import make_checkpoint, make_controlnet, make_loras
    from host.tiny_sd3 import make_sd3
    from host.tiny_sdxl import make_sdxl

    folder = tmp_path_factory.mktemp("models")
    for kind in ("checkpoints", "controlnet", "diffusion_models", "loras"):
        (folder / kind).mkdir()
    unet = make_checkpoint(folder / "checkpoints" / "tiny.safetensors")
    (folder / "checkpoints" / "tiny_LCM.safetensors").symlink_to("tiny.safetensors")
    (folder / "diffusion_models" / "tiny.safetensors").symlink_to(folder / "checkpoints" / "tiny.safetensors")
    make_controlnet(folder / "controlnet" / "tiny.safetensors", unet)
    places = folder / "checkpoints", folder / "loras"
    models = SimpleNamespace(
        folder=folder,
        lora=make_loras(folder / "loras", unet),
        sdxl_lora=make_sdxl(*places),
        sd3_loras=make_sd3(*places),
    )
    write_kinds(folder / "loras", unet)
    write_dit_loras(folder / "loras")
    add_stand_ins(folder)
    return models


@pytest.fixture(scope="session", params=hosts() or [None], ids=lambda p: p.parent.name if p else "none")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: SimpleNamespace):
    """A running host with this pack; its log is in the failure report through `server.log`."""
    running = start(request.param, tmp_path_factory.mktemp("base"), models.folder)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def picture(server) -> None:
    """A picture of the name that ComfyUI ships one by, with a mask painted as its mask editor does: transparent."""
    pixels = np.random.default_rng(3).integers(0, 256, (64, 64, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[16:40, 24:48, 3] = 0
    (server.base / "input").mkdir(exist_ok=True)
    Image.fromarray(pixels).save(server.base / "input" / "example.png")


@pytest.fixture(scope="session")
def crowded(server, tmp_path_factory: pytest.TempPathFactory, models: SimpleNamespace):
    """A host with the well-known packs beside ours; not that of the other tests, since these packs patch the host."""
    from host.packs import PACKS, add_files

    add_files(models.folder)
    running = start(server.folder, tmp_path_factory.mktemp("crowded"), models.folder, PACKS)
    yield running
    running.stop()


@pytest.fixture
def beside(request: pytest.FixtureRequest, server):
    """A function of a pack's folder: the crowded host, started for the first test whose pack is there."""
    from host.packs import need_folder, need_nodes

    def crowded_with(pack: str):
        need_folder(server.folder, pack)
        running = request.getfixturevalue("crowded")
        need_nodes(running, pack)
        return running

    return crowded_with
