"""Copying a LoRA file with a recipe in its header: the tensors stay, byte for byte, and no half file is left."""

import errno
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from phased_consistency.samplers import Recipe, recipe_for_file, writing
from phased_consistency.samplers.lora_file import file_hash, read_header, tensor_hash
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.samplers.writing import copy_with_metadata, path_within, stamp_recipe

RECIPE = Recipe(family="sd15", phases=2, points=50, base_name="mine")
KEPT = {"ss_output_name": "style", "modelspec.usage_hint": "as you like", "title": "Näive"}


@pytest.fixture
def source(tmp_path):
    """A LoRA of SD1.5 without a recipe, of several dtypes and one odd number of bytes."""
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 768).half(),
        f"{name}.lora_up.weight": torch.randn(8, 4).bfloat16(),
        f"{name}.alpha": torch.tensor(2.0),
        "other": torch.arange(3, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "style.safetensors", KEPT)
    return tmp_path / "style.safetensors"


def test_the_copy_has_the_recipe_and_the_same_tensors(source):
    target = source.parent / "sub" / "folder" / "copy.safetensors"
    stamp_recipe(source, target, RECIPE)
    metadata = read_header(target).metadata
    assert recipe_for_file("copy", metadata).to_header() == RECIPE.to_header()
    assert metadata == KEPT | {HEADER_KEY: RECIPE.to_header(), "modelspec.usage_hint": RECIPE.usage_hint()}
    assert tensor_hash(target) == tensor_hash(source) and file_hash(target) != file_hash(source)
    assert read_header(source).metadata == KEPT
    ours, theirs = load_file(target), load_file(source)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    with safe_open(target, "pt") as file:
        assert file.metadata() == metadata


def test_tensors_stay_aligned(source, tmp_path):
    for letters in range(1, 9):
        copy_with_metadata(source, target := tmp_path / f"{letters}.safetensors", {"note": "x" * letters})
        assert struct.unpack("<Q", target.read_bytes()[:8])[0] % 8 == 0
        assert tensor_hash(target) == tensor_hash(source)


def test_a_file_without_metadata_gets_some(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    copy_with_metadata(tmp_path / "a.safetensors", tmp_path / "b.safetensors", {"key": "value"})
    assert read_header(tmp_path / "b.safetensors").metadata == {"key": "value"}


def test_a_copy_can_be_stamped_again(source, tmp_path):
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    stamp_recipe(source, once, RECIPE)
    stamp_recipe(once, twice, other := Recipe(family="sd15", phases=8))
    assert read_header(twice).metadata[HEADER_KEY] == other.to_header()
    stamp_recipe(source, twice, RECIPE, overwrite=True)
    assert twice.read_bytes() == once.read_bytes()


def test_another_family_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match=r"style\.safetensors is a LoRA for SD1\.5, but the recipe is for SDXL\. Take"):
        stamp_recipe(source, tmp_path / "copy.safetensors", Recipe(family="sdxl"))
    assert not (tmp_path / "copy.safetensors").exists()


def test_a_file_of_unknown_family_takes_any_recipe(tmp_path):
    save_file({"lora_unet_conv_in.lora_up.weight": torch.ones(4, 2)}, tmp_path / "a.safetensors")
    stamp_recipe(tmp_path / "a.safetensors", tmp_path / "b.safetensors", RECIPE)
    assert read_header(tmp_path / "b.safetensors").family == "sd15"


def test_a_checkpoint_is_refused(tmp_path):
    save_file({"model.diffusion_model.out.2.weight": torch.ones(4)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no LoRA"):
        stamp_recipe(tmp_path / "a.safetensors", tmp_path / "b.safetensors", RECIPE)


def test_nothing_is_written_over_unasked(source, tmp_path):
    target = tmp_path / "copy.safetensors"
    target.write_bytes(b"older")
    with pytest.raises(ValueError, match="copy.safetensors exists already: choose another name, or switch overwrite"):
        stamp_recipe(source, target, RECIPE)
    assert target.read_bytes() == b"older"
    stamp_recipe(source, target, RECIPE, overwrite=True)
    assert read_header(target).metadata[HEADER_KEY] == RECIPE.to_header()


def test_a_copy_that_is_there_already_is_left(source, tmp_path):
    target = tmp_path / "copy.safetensors"
    assert stamp_recipe(source, target, RECIPE)
    before = target.stat().st_mtime_ns
    assert not stamp_recipe(source, target, RECIPE) and not stamp_recipe(source, target, RECIPE, overwrite=True)
    assert target.stat().st_mtime_ns == before


@pytest.mark.parametrize("at", [-1, 100, None], ids=["a tensor", "the header", "its length"])
def test_a_file_that_differs_from_the_copy_is_not_it(source, tmp_path, at):
    target = tmp_path / "copy.safetensors"
    stamp_recipe(source, target, RECIPE)
    other = bytearray(whole := target.read_bytes())
    if at is None:
        other += b"x"
    else:
        other[at] ^= 1
    target.write_bytes(other)
    with pytest.raises(ValueError, match="copy.safetensors exists already"):
        stamp_recipe(source, target, RECIPE)
    assert stamp_recipe(source, target, RECIPE, overwrite=True) and target.read_bytes() == whole


@pytest.mark.parametrize("kind", ["itself", "symlink", "hard link"])
def test_the_source_is_never_written_over(source, tmp_path, kind):
    target, before = source if kind == "itself" else tmp_path / "alias.safetensors", source.read_bytes()
    if kind != "itself":
        (os.symlink if kind == "symlink" else os.link)(source, target)
    with pytest.raises(ValueError, match="is the file that is copied, which is never written over"):
        stamp_recipe(source, target, RECIPE, overwrite=True)
    assert source.read_bytes() == target.read_bytes() == before


def test_another_ending_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match=r"copy\.ckpt must end in \.safetensors"):
        stamp_recipe(source, tmp_path / "copy.ckpt", RECIPE)


def test_a_header_that_nobody_could_read_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MOST_HEADER", 1000)
    with pytest.raises(ValueError, match="would have .* read at most 1000 of it. .* entry is note, 1002 bytes"):
        copy_with_metadata(source, tmp_path / "copy.safetensors", {"note": "x" * 1000})


def test_a_truncated_source_is_refused(source, tmp_path):
    source.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        stamp_recipe(source, tmp_path / "copy.safetensors", RECIPE)


def half_then(error):
    def copy(old, new, length):
        new.write(old.read(10))
        new.flush()
        raise error

    return copy


@pytest.mark.parametrize("older", [None, b"older"])
@pytest.mark.parametrize(("where", "what"), [("copyfileobj", shutil), ("fsync", os), ("replace", os)])
def test_a_full_disk_leaves_no_half_file(source, tmp_path, monkeypatch, where, what, older):
    target = tmp_path / "copy.safetensors"
    if older:
        target.write_bytes(older)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(what, where, half_then(full) if what is shutil else lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match=r"Cannot write .*copy\.safetensors: .*No space left.* nothing that was there"):
        stamp_recipe(source, target, RECIPE, overwrite=True)
    assert not list(tmp_path.glob("*.part"))
    assert (target.read_bytes() if older else target.exists()) == (older or False)


def test_an_interruption_leaves_no_half_file(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "copyfileobj", half_then(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        stamp_recipe(source, tmp_path / "copy.safetensors", RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_the_weights_are_not_held_in_memory(source, tmp_path, monkeypatch):
    """What is copied passes through in blocks."""
    taken = []
    copy = shutil.copyfileobj
    monkeypatch.setattr(shutil, "copyfileobj", lambda old, new, length: (taken.append(length), copy(old, new, length)))
    monkeypatch.setattr(Path, "read_bytes", None)
    stamp_recipe(source, tmp_path / "copy.safetensors", RECIPE)
    assert taken == [writing.BLOCK]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("style", "style.safetensors"),
        ("style.SAFETENSORS", "style.SAFETENSORS"),
        ("style v1.5", "style v1.5.safetensors"),
        ("fast/4 steps/style.safetensors", "fast/4 steps/style.safetensors"),
        ("fast\\style", "fast/style.safetensors"),
    ],
)
def test_names_within_the_folder(tmp_path, name, path):
    assert path_within(tmp_path, name) == tmp_path / path


@pytest.mark.parametrize(
    "name",
    # fmt: off
    [
        "",
        " ",
        "/style",
        "\\style",
        "C:/style",
        "c:style",
        "../style",
        "fast/../../style",
        "..",
        "fast/..",
        "fast\\..\\..\\x",
        "fast/",
        "fast//style",
        "./style",
        ".hidden",
        "fast/.git/style",
        "a\0b",
        "a\nb",
        "a?",
        "//host/share/style",
    ],
    # fmt: on
)
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="expected a file's name, with subfolders if you like"):
        path_within(tmp_path / "loras", name)


def test_a_link_that_leads_elsewhere_is_refused(tmp_path):
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "away").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match="leads out of .* through a link"):
        path_within(tmp_path / "loras", "away/style")
