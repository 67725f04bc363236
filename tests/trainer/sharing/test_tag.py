"""Tagging a LoRA: what its header says changes, its tensors' bytes do not, and nothing that lies goes in."""

import base64
import errno
import hashlib
import io
import json
import os

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from phased_consistency.samplers import Recipe
from phased_consistency.samplers.lora_file import file_hash, header_text, read_header, tensor_hash
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.trainer.sharing import tag as tagging
from phased_consistency.trainer.sharing.tag import tag
from support.sharing_files import RECIPE, kohya_file


@pytest.fixture
def file(tiny_base, tmp_path):
    return kohya_file(tmp_path / "mine.safetensors", tiny_base, lora_adapter_metadata="{}", ss_seed="3")


def body(path):
    return path.read_bytes()[8 + len(header_text(path)) :]


def test_the_header_changes_and_no_byte_of_the_tensors(file):
    before, tensors, whole = read_header(file).metadata, body(file), file_hash(file)
    result = tag(file, {"modelspec.author": "Näive = me", "ss_steps": "8"}, remove=["ss_seed"])
    metadata = read_header(file).metadata
    del before["ss_seed"]
    assert metadata == before | {"modelspec.author": "Näive = me", "ss_steps": "8"}
    assert body(file) == tensors and file_hash(file) != whole
    assert result["tensor_hash"] == tensor_hash(file) and result["removed"] == ["ss_seed"]
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == metadata and len(list(opened.keys())) == 18


def test_a_copy_leaves_the_file(file, tmp_path):
    whole, out = file.read_bytes(), tmp_path / "copy.safetensors"
    tag(file, {"a": "b"}, out=out)
    assert file.read_bytes() == whole and read_header(out).metadata["a"] == "b" and body(out) == body(file)
    with pytest.raises(ValueError, match="copy.safetensors exists already"):
        tag(file, {"a": "c"}, out=out)


def test_a_recipe_brings_its_sentence(file):
    other = Recipe(family="sd15", phases=8)
    tag(file, {HEADER_KEY: other.to_header()})
    assert read_header(file).metadata["modelspec.usage_hint"] == other.usage_hint()
    tag(file, {HEADER_KEY: RECIPE.to_header(), "modelspec.usage_hint": "as you like"})
    assert read_header(file).metadata["modelspec.usage_hint"] == "as you like"


@pytest.mark.parametrize(
    ("changes", "remove", "message"),
    [
        ({}, (), r"Nothing to change\. Give key=value, or --remove key"),
        ({"sshs_model_hash": "0" * 64}, (), "sshs_model_hash is what the tensors say"),
        ({"modelspec.hash_sha256": "0x"}, (), "modelspec.hash_sha256 is what the tensors say"),
        ({"ss_network_dim": "128"}, (), "ss_network_dim is what the tensors say"),
        ({"a": "b"}, ["a"], "a is to be both set and removed"),
        ({}, ["author"], r"has no entry 'author' to remove; available: .*pcm\.recipe.*ss_seed"),
        ({}, ["lora_adapter_metadata"], "holds the LoRA's alpha"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, (), "tells of SDXL, but mine.safetensors"),
        ({HEADER_KEY: Recipe(family="sdxl").to_header()}, (), "pcm.recipe tells of SDXL, but mine"),
        ({HEADER_KEY: "{"}, (), "pcm.recipe header cannot be read"),
        ({"note": "x" * (1 << 20)}, (), r"would have 10\d{5} bytes, .* 1048576 .* largest entry is note"),
    ],
)  # fmt: skip
def test_what_would_lie_or_not_be_read_is_refused(file, changes, remove, message):
    whole = file.read_bytes()
    with pytest.raises(ValueError, match=message):
        tag(file, changes, remove)
    assert file.read_bytes() == whole and [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_disk_that_fails_leaves_the_file(file, monkeypatch):
    whole = file.read_bytes()

    def full(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tagging, "TemporaryDirectory", full)
    with pytest.raises(OSError, match=r"Cannot write .*mine\.safetensors: .*Read-only.* the file is as it was"):
        tag(file, {"a": "b"})
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"Cannot write .*mine\.safetensors: .*Read-only"):
        tag(file, {"a": "b"})
    assert file.read_bytes() == whole and [p.name for p in file.parent.iterdir()] == [file.name]


def kohyas_legacy_hash(path):
    """Of 64 KiB at 1 MiB of the file as it would be with its ss_* entries alone."""
    metadata = {k: v for k, v in read_header(path).metadata.items() if k.startswith("ss_")}
    return hashlib.sha256(save(load_file(path), metadata)[0x100000:0x110000]).hexdigest()[:8]


def test_the_legacy_hash_follows_the_entries_that_it_is_of(tmp_path):
    tensors = {
        "lora_unet_a.lora_down.weight": torch.randn(4, 50_000),
        "lora_unet_a.lora_up.weight": torch.randn(50_000, 4),
    }
    save_file(tensors, path := tmp_path / "large.safetensors", {"sshs_legacy_hash": "0" * 8, "ss_seed": "1"})
    tag(path, {"modelspec.author": "me"})
    assert read_header(path).metadata["sshs_legacy_hash"] == "0" * 8
    for changes, remove in (({"ss_training_comment": "x" * 99}, ()), ({}, ["ss_seed"])):
        before = read_header(path).metadata["sshs_legacy_hash"]
        result = tag(path, changes, remove)
        assert read_header(path).metadata["sshs_legacy_hash"] == kohyas_legacy_hash(path) != before
        assert (result["set"], result["removed"]) == (list(changes), list(remove))
    tag(path, {}, ["modelspec.author"])


def test_a_thumbnail_is_modelspecs(pcm, fails, file, tmp_path):
    Image.linear_gradient("L").resize((900, 600)).save(tmp_path / "grid.png")
    report = json.loads(pcm("tag", file, "--thumbnail", tmp_path / "grid.png", "--json").out)
    kind, data = read_header(file).metadata["modelspec.thumbnail"].split(",")
    assert kind == "data:image/jpeg;base64" and report["set"] == ["modelspec.thumbnail"]
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == (256, 256) and picture.getpixel((128, 250))[0] > 200 > 50 > picture.getpixel((128, 5))[0]
    (tmp_path / "no.png").write_text("no picture")
    assert "no.png cannot be read as a picture" in fails(2, "tag", file, "--thumbnail", tmp_path / "no.png")


def test_the_verb(pcm, fails, file):
    report = json.loads(pcm("tag", file, "modelspec.author=a=b", "--remove", "ss_seed", "--json").out)
    assert report["set"] == ["modelspec.author"] and read_header(file).metadata["modelspec.author"] == "a=b"
    assert "'author' is no entry; write key=value" in fails(2, "tag", file, "author")
    assert "No file at" in fails(2, "tag", file.with_name("none.safetensors"), "a=b")
