"""Defects that the fuzz run found in reading pictures, captions, archives, caches and configurations."""

import gzip
import time
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from safetensors.torch import load_file, save_file

from phased_consistency.samplers.lora_file import read_header
from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.data import shards
from phased_consistency.trainer.data.decoding import load_picture
from phased_consistency.trainer.data.folders import find_pictures
from phased_consistency.trainer.data.index import latents_name
from phased_consistency.trainer.data.reading import content_hash, file_hashes
from phased_consistency.trainer.data.shards import read_shard
from phased_consistency.trainer.data.store import INDEX, TEXTS, LatentCache, prompts_name
from support.fuzz.pictures import tar_field, tar_of
from support.fuzz.targets import make_cache
from support.fuzz.tensors import DEEP

# Pictures and captions


def test_a_picture_that_only_a_program_can_draw_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("a program was run"))
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png", "EPS")
    with pytest.raises(ValueError, match="cannot be read"):
        load_picture(tmp_path / "a.png", 8)


def test_a_grey_picture_of_16_bits_keeps_its_greys(tmp_path):
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    pixels, _ = load_picture(tmp_path / "a.png", 64)
    assert torch.equal(pixels, torch.from_numpy(grey >> 8).float().div(127.5).sub(1).expand(3, -1, -1))


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_line_of_pixels_is_enlarged_where_it_is_seen_alone(tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    pixels, sizes = load_picture(tmp_path / "a.png", 512)
    assert pixels.shape == (3, 512, 512) and torch.equal(pixels[:, 0, 0], torch.tensor([1.0, -1, -1]))
    assert max(sizes.tolist()) == (512 * 60_000 - 512) // 2


@pytest.mark.parametrize("content", ["a star".encode("utf-16-le"), b"\xff\xfea", b"\0"])
def test_captions_in_other_encodings(tmp_path, content):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match="a.png: not UTF-8: a.txt"):
        find_pictures(str(tmp_path), skip_bad=False)


LINES = ('{"file_name": "a.png", "text": "\\ud800"}', "[" * DEEP, '{"file_name": "a\\u0000.png", "text": ""}')


@pytest.mark.parametrize("line", LINES)
def test_lines_of_metadata_that_are_no_captions(tmp_path, line):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match="metadata.jsonl line 1: not |not .* in metadata.jsonl line 1"):
        find_pictures(str(tmp_path), skip_bad=False)


def drawn() -> bytes:
    content = BytesIO()
    Image.new("RGB", (9, 9)).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", b'{"caption": "\\ud800"}', "not UTF-8: its caption"),
        ("a.json", b"[" * DEEP, "not UTF-8 or not JSON"),
        ("a.txt", b"a\0", "not UTF-8: its caption"),
    ],
)
def test_captions_in_archives(tmp_path, name, content, told):
    (tmp_path / "set.tar").write_bytes(tar_of([("a.png", drawn()), (name, content)]))
    assert told in next(read_shard(str(tmp_path / "set.tar"))).problem


def test_an_archive_that_claims_no_end_is_given_up(tmp_path):
    data = tar_of([("a.png", drawn()), ("a.txt", b"a")])
    (tmp_path / "set.tar").write_bytes(tar_field(data, 124, b"\x80" + b"\xff" * 11))
    start = time.monotonic()
    assert any("unexpected end of data" in sample.problem for sample in read_shard(str(tmp_path / "set.tar")))
    assert time.monotonic() - start < 10


def test_a_file_too_large_for_a_picture_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST", 1000)
    entries = [("a.png", bytes(5000)), ("a.txt", b"a"), ("b.png", drawn()), ("b.txt", b"b")]
    (tmp_path / "set.tar.gz").write_bytes(gzip.compress(tar_of(entries)))
    found = list(read_shard(str(tmp_path / "set.tar.gz")))
    assert [sample.caption for sample in found if not sample.problem] == ["b"]
    assert any("a.png has 5000 bytes: at most 1000 are read" in sample.problem for sample in found)


@pytest.mark.parametrize("known", ["[]", "5", '{"x": 5}', "[" * DEEP, '{"x": [1, 2]}'])
def test_remembered_hashes_of_another_form_are_taken_again(tmp_path, known):
    (tmp_path / "known.json").write_text(known)
    (tmp_path / "a").write_bytes(b"a")
    assert file_hashes([tmp_path / "a"], tmp_path / "known.json", 0) == [content_hash(tmp_path / "a")]


# Caches


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path)


def read_cache(folder):
    found = LatentCache(folder)
    return found.latents(range(6), [None] * 6), found.sizes(range(6)), found.encoding(found.captions)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (INDEX, {"shape": torch.full((6,), 1, dtype=torch.int16)}),
        (INDEX, {"prompt": torch.full((6,), -1, dtype=torch.int32)}),
        (INDEX, {"row": torch.zeros(5, dtype=torch.int16)}),
        (INDEX, {"first": torch.tensor([0, 99])}),
        (INDEX, {"row": torch.zeros(6)}),
        (INDEX, {"files": '["../a.safetensors", "b"]'}),
        (INDEX, {"skipped": "[" * DEEP}),
        (INDEX, {"shapes": None}),
        (TEXTS, {"number": torch.full((4,), 4, dtype=torch.int32)}),
        (TEXTS, {"text": torch.full((3,), 255, dtype=torch.uint8)}),
        (latents_name(0, 1, True), {"mean.2x2": torch.randn(3, 3, 2, 3)}),
        (latents_name(0, 0, False), {"mean.2x2": torch.randn(1, 3, 2, 2)}),
        (latents_name(0, 0, False), {"sizes": None}),
        (prompts_name(0), {"hidden": torch.randn(2, 2, 3)}),
    ],
)
def test_files_of_a_cache_with_other_contents_are_named(cache, name, change):
    read_cache(cache)
    tensors, told = load_file(cache / name), read_header(cache / name).metadata
    tensors |= {key: value for key, value in change.items() if key in tensors}
    told |= {key: value for key, value in change.items() if key in told}
    tensors, told = ({k: v for k, v in table.items() if v is not None} for table in (tensors, told))
    save_file(tensors, cache / name, told)
    with pytest.raises(ValueError, match=f"{name} is damaged .*Delete it: the same command makes it again"):
        read_cache(cache)


# Configurations


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"a = {'9' * 5000}", "run.toml is not valid TOML: Exceeds the limit"),
        (f"a = {'[' * DEEP}", "run.toml is not valid TOML: .*recursion"),
        (f"a = {'[' * 20}{']' * 20}", "run.toml nests more than 6 levels"),
        (f"{'.'.join('a' * 500)} = 1", "run.toml nests more than 6 levels"),
        ("\n".join(f"k{i} = 1" for i in range(3000)), r"has 3001 problems:\n(.*\n){50}  and 2951 more.$"),
        (f'[base]\npath = "x"\nfamily = "{"x" * 10_000}"', r"base.family = 'x{199}\.\.\.: "),
    ],
)
def test_configurations_of_any_size_are_refused_in_few_lines(tmp_path, text, told):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ValueError, match=told) as error:
        load_config(str(tmp_path / "run.toml"))
    assert len(str(error.value)) < 10_000


@pytest.mark.parametrize("override", [f"train.steps={'9' * 5000}", f"{'a.' * 3000}a=1", f"train.steps={'[' * 3000}"])
def test_overrides_of_any_size_are_refused_in_few_lines(override):
    with pytest.raises(ValueError, match="The override .* nests more than|The configuration has") as error:
        load_config(overrides=["base.path=x", override])
    assert len(str(error.value)) < 10_000
