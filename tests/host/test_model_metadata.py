"""What ComfyUI's server tells its model library of a LoRA: the header's metadata, of headers up to our limit."""

from __future__ import annotations

import json
import struct
from urllib.error import HTTPError
from urllib.parse import quote

import pytest
from PIL import Image

from phased_consistency.samplers.lora_file import header_text, read_header
from phased_consistency.samplers.writing import MOST_HEADER, copy_with_metadata
from phased_consistency.trainer.sharing.panels import COMFYUI_PREVIEWS
from phased_consistency.trainer.sharing.sidecars import sidecars
from phased_consistency.trainer.system.comfyui import DIRECT


@pytest.fixture
def lora(models):
    """A copy of a LoRA of ours, with all of its sidecars' names free."""
    source = models.folder / "loras" / "kohya.safetensors"
    copy_with_metadata(source, file := source.with_name("metadata ä.safetensors"), {"modelspec.title": "Näive"})
    yield file
    for path in file.parent.glob("metadata*"):
        path.unlink()


def test_the_library_is_told_our_metadata(server, lora):
    assert server.get(f"/view_metadata/loras?filename={quote(lora.name)}") == read_header(lora).metadata


def test_our_limit_is_the_hosts(server, lora):
    """A header of this many bytes is read, of eight more not."""
    tensors = lora.read_bytes()[8 + len(header_text(lora)) :]
    for size in (MOST_HEADER, MOST_HEADER + 8):
        header = json.loads(header_text(lora)) | {"__metadata__": {"size": str(size)}}
        lora.write_bytes(struct.pack("<Q", size) + json.dumps(header).encode().ljust(size) + tensors)
        address = f"/view_metadata/loras?filename={quote(lora.name)}"
        if size == MOST_HEADER:
            assert server.get(address) == {"size": str(size)}
        else:
            with pytest.raises(HTTPError, match="404"):
                server.get(address)


@pytest.mark.parametrize("suffix", COMFYUI_PREVIEWS)
def test_previews_have_names_that_the_host_finds(server, lora, suffix):
    address = f"{server.url}/experiment/models/preview/loras/0/{quote(lora.with_suffix('.webp').name)}"
    with pytest.raises(HTTPError, match="404"):
        DIRECT.open(address, timeout=30)
    Image.new("RGB", (8, 8), "red").save(lora.with_suffix(suffix))
    with DIRECT.open(address, timeout=30) as answer, Image.open(answer) as picture:
        assert picture.format == "WEBP" and picture.size == (8, 8)


def test_our_own_preview_is_found(server, lora, tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    sidecars(lora, tmp_path / "a.png")
    address = f"{server.url}/experiment/models/preview/loras/0/{quote(lora.with_suffix('.webp').name)}"
    with DIRECT.open(address, timeout=30) as answer:
        assert answer.headers.get_content_type() == "image/webp"
