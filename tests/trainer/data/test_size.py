"""What a dry run says that a cache will take, against the bytes of the cache that is then made."""

from __future__ import annotations

import math
import shutil
from types import SimpleNamespace

import pytest
from PIL import Image

from phased_consistency.samplers.lora_file import read_header
from phased_consistency.trainer.data import size
from phased_consistency.trainer.data.cache import build_cache
from phased_consistency.trainer.data.folders import find_pictures
from phased_consistency.trainer.data.size import cache_bytes, count_captions
from phased_consistency.trainer.families import load_base, look_at_base
from phased_consistency.trainer.training.plan import plan
from support.runs import small_config, speck
from support.sd3_base import make_sd3_folder

CAPTIONS = ("a, b, c, d, e", "a, b, c, d, e", "f, g, h, i\nno tags at all", "j, k, l")
DIFFERENT = 3 + 3 + 1 + 2  # of three variants each; of two tags that move there are but two orders


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, caption in enumerate(CAPTIONS):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


def stored(folder, pattern, prefixes=("",)):
    """Bytes of the tensors in fp16 whose names begin so, in the cache's files of this pattern."""
    tensors = [item for path in folder.rglob(pattern) for item in read_header(path).tensors.items()]
    return sum(2 * math.prod(t.shape) for name, t in tensors if t.dtype == "F16" and name.startswith(prefixes))


def check(config):
    """The dry run's facts, once they are seen to be those of the cache that is made."""
    facts = plan(config)
    base = load_base(config.base.path)
    cache = build_cache(config, base, lambda *_: None)
    assert base.facts.tokens == look_at_base(config.base.path).tokens
    expected = cache_bytes(config, base.facts, len(cache), facts["captions"])
    assert expected["encodings"] == stored(cache.folder, "prompts-*.safetensors") > 0
    assert expected["latents"] == stored(cache.folder, "latents-*.safetensors", ("mean", "std"))
    assert len(cache.prompts) == facts["captions"] + 1
    assert facts["cache_gib"] == {what: round(total / 2**30, 3) for what, total in expected.items()}
    return facts


def test_prompts(tmp_path):
    assert "5 encoded captions, on disk" in check(small_config(tmp_path, data__count=5))["text"]


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_pictures_with_variants_of_several_captions(family, pictures, tmp_path):
    settings = {"data__captions": "drawn", "data__tag_variants": 3, "data__images": pictures}
    points = {"objective__points": 100} if family == "sd3" else {}
    facts = check(small_config(tmp_path, base__path=speck(family).name, **settings, **points))
    assert facts["captions"] == DIFFERENT


def test_a_base_with_t5(tiny_base, tmp_path):
    make_sd3_folder(tmp_path / "base", tiny_base.tokenizers[0])
    check(small_config(tmp_path, base__path=tmp_path / "base", objective__points=100, data__count=3))


def test_of_many_pictures_some_are_counted(pictures, tmp_path, monkeypatch):
    config = small_config(tmp_path, data__tag_variants=3, data__images=pictures)
    folder = find_pictures(str(pictures), False)
    assert count_captions(folder, config) == 3 + 3 + 2
    monkeypatch.setattr(size, "COUNTED", 2)
    assert count_captions(folder, config) == 2 * (3 + 3)


def test_a_disk_with_too_little_room_is_told_before_anything_is_cached(tmp_path, monkeypatch):
    config = small_config(tmp_path / "run")
    assert not any("cache" in note for note in plan(config)["notes"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    (note,) = (note for note in plan(config)["notes"] if "cache" in note)
    assert note.startswith("The cache will take about ") and "set data.cache to a folder on another disk" in note
