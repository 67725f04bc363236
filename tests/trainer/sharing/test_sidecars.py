"""The files beside a LoRA: what A1111 and Lora-Manager document, filled in from the header."""

import json

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from phased_consistency.samplers import Recipe
from phased_consistency.samplers.lora_file import file_hash
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.trainer.sharing.sidecars import sidecars
from support.sharing_files import kohya_file


@pytest.fixture
def file(tiny_base, tmp_path):
    recipe = Recipe(family="sd15", strength=0.8)
    entries = {HEADER_KEY: recipe.to_header(), "modelspec.title": "Mine", "modelspec.tags": "PCM, few-step"}
    return kohya_file(tmp_path / "mine.safetensors", tiny_base, **entries)


def test_sidecars_say_what_the_header_says(pcm, file, tmp_path):
    Image.new("RGBA", (8, 8), "red").save(tmp_path / "grid.png")
    report = json.loads(pcm("sidecars", file, "--preview", tmp_path / "grid.png", "--json").out)
    names = ["mine.json", "mine.metadata.json", "mine.preview.png"]
    assert sorted(path.rsplit("/", 1)[1] for path in report["written"]) == names
    hint = Recipe(family="sd15", strength=0.8).usage_hint()
    assert json.loads((tmp_path / "mine.json").read_text()) == {
        "description": "",
        "sd version": "SD1",
        "activation text": "",
        "preferred weight": 0.8,
        "negative text": "",
        "notes": hint,
    }
    managed = json.loads((tmp_path / "mine.metadata.json").read_text())
    assert managed == {
        "file_name": "mine",
        "model_name": "Mine",
        "file_path": file.as_posix(),
        "size": file.stat().st_size,
        "modified": file.stat().st_mtime,
        "sha256": file_hash(file),
        "base_model": "SD 1.5",
        "preview_url": (tmp_path / "mine.preview.png").as_posix(),
        "usage_tips": '{"strength": 0.8}',
        "tags": ["PCM", "few-step"],
        "notes": hint,
        "modelDescription": "",
        "from_civitai": False,
    }
    with Image.open(tmp_path / "mine.preview.png") as picture:
        assert picture.format == "PNG" and picture.getpixel((0, 0)) == (255, 0, 0)


def test_sidecars_without_a_recipe_or_a_family(tiny_base, tmp_path):
    file = kohya_file(tmp_path / "plain.safetensors", tiny_base)
    save_file(load_file(file), file)
    assert sidecars(file)["preview"] is None
    fields = json.loads((tmp_path / "plain.json").read_text())
    assert (fields["sd version"], fields["preferred weight"], fields["notes"]) == ("Unknown", 1.0, "")
    fields = json.loads((tmp_path / "plain.metadata.json").read_text())
    assert (fields["base_model"], fields["model_name"], fields["preview_url"]) == ("Unknown", "plain", "")


def test_sidecars_replace_nothing_unasked(fails, pcm, file, tmp_path):
    (tmp_path / "mine.json").write_text("mine own")
    assert "mine.json exists already beside mine.safetensors. Add --overwrite" in fails(2, "sidecars", file)
    assert not (tmp_path / "mine.metadata.json").exists() and (tmp_path / "mine.json").read_text() == "mine own"
    (tmp_path / "no.png").write_text("no picture")
    options = ("--overwrite", "--preview")
    assert "no.png cannot be read as a picture" in fails(2, "sidecars", file, *options, tmp_path / "no.png")
    assert "No file at" in fails(2, "sidecars", file, *options, tmp_path / "none.png")
    assert (tmp_path / "mine.json").read_text() == "mine own"
    Image.new("RGB", (4, 4)).save(tmp_path / "mine.preview.png")
    assert pcm("sidecars", file, *options, tmp_path / "mine.preview.png").code == 0
