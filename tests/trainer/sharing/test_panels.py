"""Other programs' panels of our file: each line from the field that the program documents, each lack named."""

import html
import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from phased_consistency.samplers import Recipe
from phased_consistency.samplers.lora_file import file_hash, read_header, tensor_hash
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.trainer.lora.hashes import EMPTY_HASH
from phased_consistency.trainer.sharing.panels import (
    LORA_MANAGER_PREVIEWS,
    LORA_MANAGER_REQUIRED,
    find,
    panels,
    write_page,
)
from phased_consistency.trainer.sharing.sidecars import sidecars
from phased_consistency.trainer.sharing.tag import tag, thumbnail
from support.sharing_files import kohya_file

SIDECARS = {
    ".json": ("description", "sd version", "activation text", "preferred weight", "negative text", "notes"),
    ".metadata.json": (*LORA_MANAGER_REQUIRED, "usage_tips", "trainedWords", "tags", "notes", "modelDescription"),
}
A1111, MANAGER, COMFYUI, MODELSPEC = range(4)


@pytest.fixture
def mine(lora, tmp_path):
    """A trained LoRA with all that belongs to it."""
    Image.new("RGB", (300, 200), "red").save(picture := tmp_path / "grid.png")
    file = tmp_path / "mine.safetensors"
    tag(lora, {"modelspec.author": "me", "ss_output_name": "alias"} | thumbnail(picture), out=file)
    sidecars(file, picture)
    return file


@pytest.fixture
def plain(tiny_base, tmp_path):
    """Any LoRA, with nothing beside it."""
    return kohya_file(tmp_path / "plain.safetensors", tiny_base)


def with_metadata(file, **metadata):
    """The file with this metadata alone."""
    save_file(load_file(file), file, metadata or None)
    return file


def lines(panel):
    return {line.label: line.value for line in panel.lines}


def problems(file, which):
    return "\n".join(panels(file)[which].problems)


def test_nothing_is_missing_from_what_we_write(mine):
    actual = panels(mine)
    assert [panel.problems for panel in actual] == [[], [], [], []]
    assert all(panel.picture.startswith("data:image/jpeg;base64,") for panel in actual)
    header, recipe = read_header(mine).metadata, Recipe.from_header(read_header(mine).metadata[HEADER_KEY])
    a1111, manager, comfyui, modelspec = map(lines, actual)
    assert (a1111["Name"], a1111["Version"], a1111["Notes"]) == ("alias", "SD1", recipe.usage_hint())
    assert a1111["Put into the prompt"] == "<lora:alias:1.0>" and a1111["Tags of the training"] == ""
    assert a1111["In the infotext"] == f'Lora hashes: "alias: {tensor_hash(mine)[:12]}"'
    assert (manager["Base model"], manager["Usage tip: strength"]) == ("SD 1.5", "1.0")
    assert (manager["SHA256"], manager["AutoV2"]) == (file_hash(mine), file_hash(mine)[:10])
    assert manager["AutoV3"] == tensor_hash(mine)[:12] and manager["Preview"] == "mine.preview.png"
    assert comfyui["Title"] == header["modelspec.title"] and comfyui["Usage hint"] == recipe.usage_hint()
    assert modelspec["Hash sha256"] == f"0x{tensor_hash(mine)}" and modelspec["Trigger phrase"] == ""


@pytest.mark.parametrize(
    ("metadata", "own", "version"),
    [
        ({}, None, "Unknown"),
        ({"any": "thing"}, None, "SD1"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, None, "SDXL"),
        ({"ss_base_model_version": "sd_v2", "ss_v2": "True"}, None, "SD2"),
        ({"ss_base_model_version": "sd3_medium", "ss_v2": "False"}, None, "SD1"),
        ({"ss_base_model_version": "sd3_medium"}, "SD3", "SD3"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "Pony", "SDXL"),
    ],
)  # fmt: skip
def test_a1111_takes_the_version_of_the_sidecar_else_of_the_header(plain, metadata, own, version):
    with_metadata(plain, **metadata)
    if own:
        plain.with_suffix(".json").write_text(json.dumps({"sd version": own}))
    actual = panels(plain)[A1111]
    assert (actual.badge, lines(actual)["Version"]) == (version, version)
    wrong = metadata.get("ss_base_model_version") == "sd3_medium" and not own
    assert wrong == ("takes it for SD1, but it is a LoRA for SD3: it is hidden" in "\n".join(actual.problems))


def test_a1111_reads_the_sidecar(plain):
    frequency = {"1_a": {"cat ": 3, "dog": 1}, "2_b": {"cat": 4}}
    with_metadata(plain, ss_tag_frequency=json.dumps(frequency))
    entries = {"preferred weight": 0.7, "activation text": "a star", "negative text": "blur", "description": "Fast."}
    plain.with_suffix(".json").write_text(json.dumps(entries))
    actual = lines(panels(plain)[A1111])
    assert (
        actual["Put into the prompt"] == "<lora:plain:0.7> a star" and actual["Tags of the training"] == "cat 7, dog 1"
    )
    assert (actual["Negative text"], actual["Description"], actual["In the infotext"]) == ("blur", "Fast.", "")


@pytest.mark.parametrize(
    ("version", "label"),
    [("sd_1.5", "SD 1.5"), ("sdxl_base_v1-0", "SDXL 1.0"), ("pony_v6", "Pony"), ("sd_v1", "sd_v1"), ("", "Unknown")],
)
def test_lora_manager_finds_the_base_model_in_the_header(plain, version, label):
    with_metadata(plain, ss_base_model_version=version)
    assert panels(plain)[MANAGER].badge == label


def test_lora_manager_takes_the_first_preview_of_its_order(plain):
    for suffix in reversed(LORA_MANAGER_PREVIEWS):
        Image.new("RGB", (4, 4)).save(plain.with_suffix(suffix))
        assert lines(panels(plain)[MANAGER])["Preview"] == f"plain{suffix}"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"usage_tips": {"strength": 1.0}}, "usage_tips is no JSON object in a string"),
        ({"usage_tips": "[1]"}, "usage_tips is no JSON object in a string"),
        ({"sha256": "0" * 64}, "has another file's sha256: the LoRA was changed after"),
        ({"preview_url": "/nowhere/a.png"}, "names a preview that is not there, /nowhere/a.png"),
        ({"modified": None}, "lacks modified, which Lora-Manager requires"),
    ],
)  # fmt: skip
def test_wrong_fields_of_lora_manager_are_named(mine, fields, problem):
    path = mine.with_suffix(".metadata.json")
    fields_on_disk = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in fields_on_disk.items() if v is not None}))
    assert problem in problems(mine, MANAGER)


def test_sidecars_with_other_things_than_texts_do_no_harm(plain):
    for value in (1, [1, "a"], {"a": 1}, True, None, "\ud800"):
        for suffix, keys in SIDECARS.items():
            plain.with_suffix(suffix).write_text(json.dumps(dict.fromkeys(keys, value)))
        assert len(write_page(plain, plain.with_suffix(".html"), overwrite=True)["panels"]) == 4


@pytest.mark.parametrize("text", ["{", "[]", '"text"', "[" * 100_000])
def test_sidecars_that_cannot_be_read_are_named(plain, text):
    for suffix, which in ((".json", A1111), (".metadata.json", MANAGER)):
        plain.with_suffix(suffix).write_text(text)
        assert f"plain{suffix} cannot be read" in problems(plain, which)


def test_a_preview_that_is_none_is_named(plain):
    plain.with_suffix(".preview.png").write_text("no picture")
    for which in (A1111, MANAGER):
        assert "plain.preview.png cannot be read as a picture" in problems(plain, which)


def test_hashes_that_are_not_the_tensors_are_named(plain):
    with_metadata(plain, sshs_model_hash="1" * 64, **{"modelspec.hash_sha256": f"0x{EMPTY_HASH}"})
    for which in (A1111, MANAGER):
        assert "sshs_model_hash is not the hash of the file's tensors" in problems(plain, which)
    assert "modelspec.hash_sha256 is the hash of an empty file" in problems(plain, MODELSPEC)
    with_metadata(plain, sshs_model_hash=EMPTY_HASH)
    assert lines(panels(plain)[MANAGER])["AutoV3"] == "" and "empty file" in problems(plain, MANAGER)
    with_metadata(plain)
    assert "No sshs_model_hash in the header" in problems(plain, MANAGER)


def test_the_model_library_is_told_as_it_reads(plain):
    """Its rule is the front end's own: tests/web/test_model_library.py compares the two."""
    entries = {"ss_sd_model_name": "base", "my_title": "Mine", "modelspec.author": ""}
    assert find(entries, "modelspec.title", "title", "name") == ("my_title", "Mine")
    assert find(entries, "modelspec.author", "author") == ("modelspec.author", "")
    assert find(entries, "modelspec.tags", "tags") == (None, "")
    with_metadata(plain, ss_sd_model_name="base")
    assert panels(plain)[COMFYUI].title == "base"
    assert "No modelspec.title: ComfyUI takes ss_sd_model_name for it" in problems(plain, COMFYUI)
    with_metadata(plain, **{"modelspec.title": "plain", "modelspec.tags": "a"})
    assert not panels(plain)[COMFYUI].shown, "a panel that says no more than the file's name does not open"
    with_metadata(plain, **{"modelspec.thumbnail": "http://example.org/a.png"})
    actual = panels(plain)[COMFYUI]
    assert actual.picture == "" and "modelspec.thumbnail is no picture as a data URL" in actual.problems[0]


def test_a_large_header_leaves_the_library_the_files_name_alone(plain):
    with_metadata(plain, **{"modelspec.title": "Mine", "note": "x" * (1 << 20)})
    actual = panels(plain)[COMFYUI]
    assert actual.title == "plain" and not actual.shown
    assert re.search(r"The header has \d{7} bytes, and ComfyUI reads at most 1048576", actual.problems[0])


def test_modelspecs_demands(plain):
    with_metadata(plain, **{"modelspec.architecture": "stable-diffusion-3-medium/lora"})
    result = problems(plain, MODELSPEC)
    missing = ", ".join(f"modelspec.{key}" for key in ("sai_model_spec", "implementation", "title", "resolution"))
    assert f"ModelSpec demands {missing}: pcm tag" in result
    assert "'stable-diffusion-3-medium/lora', which other programs do not know" in result


def test_the_page_holds_all_and_nothing_in_it_is_code(pcm, fails, mine, tmp_path):
    tag(mine, {"modelspec.author": "<script>alert(1)</script>", "modelspec.description": '"><img src=x>'})
    report = json.loads(pcm("panels", mine, "--out", tmp_path / "page.html", "--json").out)
    page = (tmp_path / "page.html").read_text()
    text = html.unescape(page)
    assert report["problems"] == 1, "the sidecar is older than the tag"
    assert "<script" not in page and "<img src=x" not in page and "&lt;script&gt;alert(1)" in page
    assert set(re.findall(r'(?:src|href)="(\w+:)', page)) == {"data:"} and "url(" not in page
    for panel in report["panels"]:
        assert all(line["label"] in text and line["source"] in text for line in panel["lines"])
    assert "exists already" in fails(2, "panels", mine, "--out", tmp_path / "page.html")
    assert "must end in .html" in fails(2, "panels", mine, "--out", tmp_path / "page.png")
    text = pcm("panels", mine, "--out", tmp_path / "page.html", "--overwrite").out
    assert "4 panels, 1 thing missing or wrong" in text and "another file's sha256" in text


def test_a_file_that_is_no_lora_is_refused(fails, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert "holds no LoRA" in fails(2, "panels", tmp_path / "a.safetensors", "--out", tmp_path / "a.html")
