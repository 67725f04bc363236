"""Reading a cache: exact, by any thread, in bounded memory and time, whatever its size."""

import threading
from pathlib import Path

import pytest
import torch

from phased_consistency.trainer.bench import cache as million
from phased_consistency.trainer.data import cache, store
from phased_consistency.trainer.data.store import LatentCache, OpenFiles
from support.data_stubs import StubBase, drawn, small_files
from support.runs import small_config

COUNT = 9


@pytest.fixture
def folder(tmp_path):
    """Nine pictures of different brightness; two have the same caption."""
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(COUNT):
        (root / f"{number}.png").write_bytes(drawn(32, 32, (20 * number,) * 3))
        (root / f"{number}.txt").write_text(f"façade {'x' * min(number, 7)}", encoding="utf-8")
    return root


def build(folder, **changes):
    config = small_config(folder.parent / "run", data__images=folder, **changes)
    return cache.build_cache(config, StubBase(), lambda *_: None)


def test_captions_and_encodings_are_found_by_number_and_by_text(folder, monkeypatch):
    small_files(monkeypatch)
    data = build(folder)
    captions = [f"façade {'x' * min(n, 7)}".strip() for n in range(COUNT)]
    assert list(data.captions) == captions and data.captions[-1] == captions[-1]
    assert list(data.prompts) == ["", *dict.fromkeys(captions)]
    assert [data.prompts.find(text) for text in data.prompts] == list(range(len(data.prompts)))
    assert data.prompts.find("never cached") is None
    with torch.autocast("cpu", torch.bfloat16):  # as previews read, and it takes no stack of fp16
        assert data.encoding(captions)["hidden"].flatten().tolist() == [len(c) for c in captions]
    with pytest.raises(IndexError):
        data.captions[COUNT]


def test_texts_whose_first_hash_is_the_same_are_told_apart(folder, monkeypatch):
    monkeypatch.setattr(store, "hashes_of", lambda text: (7, len(text)))
    monkeypatch.setattr("phased_consistency.trainer.data.index.hashes_of", lambda text: (7, len(text)))
    data = build(folder)
    assert [data.prompts.find(text) for text in data.prompts] == list(range(len(data.prompts)))


def test_each_samples_draw_is_its_own(folder):
    class Spread(StubBase):
        spread = 0.5

    config = small_config(folder.parent / "run", data__images=folder)
    data = cache.build_cache(config, Spread(), lambda *_: None)

    def draw(*numbers):
        return data.latents(numbers, [torch.Generator().manual_seed(n) for n in numbers])

    assert torch.equal(draw(3, 1, 8), torch.cat([draw(3), draw(1), draw(8)]))
    with pytest.raises(ValueError, match="zip"):
        data.latents([1, 2], [torch.Generator()])


def test_threads_read_what_one_reads(folder, monkeypatch):
    small_files(monkeypatch)
    monkeypatch.setattr(store, "OPEN", 1)
    data, wrong = build(folder), []
    data._open.most = 1
    right = data.latents(range(COUNT), [None] * COUNT)

    def read(start):
        for step in range(60):
            number = (start + step) % COUNT
            same = torch.equal(data.latents([number], [None])[0], right[number])
            if not same or data.encoding([data.captions[number]])["hidden"].item() != len(data.captions[number]):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_only_the_last_used_files_stay_open(folder, monkeypatch):
    small_files(monkeypatch)
    data = build(folder)
    files = OpenFiles(data.folder, most=2)
    names = sorted(f.name for f in data.folder.glob("latents-*"))
    first = files.get(names[0])
    files.get(names[1])
    assert files.get(names[0]) is first, "used again"
    files.get(names[2])
    assert files.get(names[0]) is first and len(files._files) == 2


def test_a_damaged_file_is_named_and_made_again_once_deleted(folder, monkeypatch):
    small_files(monkeypatch)
    data = build(folder)
    for name in (store.INDEX, store.TEXTS, store.prompts_name(0), sorted(data.folder.glob("latents-*"))[1].name):
        whole = (data.folder / name).read_bytes()
        (data.folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{name} is damaged .*Delete it: the same command makes it again"):
            LatentCache(data.folder).encoding([""])
            LatentCache(data.folder).latents(range(COUNT), [None] * COUNT)
        (data.folder / name).unlink()
        build(folder)
        assert (data.folder / name).read_bytes() == whole


def test_a_large_cache_opens_at_once_and_holds_no_memory(tmp_path):
    result = million.run(20_000, tmp_path / "cache", 60, 32)
    assert (result["samples"], result["files"]) == (20_000, 2 * 79 + 2)
    assert result["open_seconds"] < 5
    key = "anonymous_mib" if Path("/proc/self/status").is_file() else "resident_mib"
    early, late = (result["curve"][at][key] for at in (5, -1))
    assert late - early < 8, result["curve"]
    with pytest.raises(ValueError, match="is not empty: name a new folder"):
        million.run(1, tmp_path / "cache", 1, 1)
