"""Caching by many threads and processes: the same bytes as by one, no more read than must be, nothing left unsaid."""

import json
import os
import threading
import time
from copy import deepcopy
from dataclasses import replace

import pytest
from PIL import Image

from phased_consistency.trainer.data import cache, reading
from phased_consistency.trainer.data.folders import find_pictures
from phased_consistency.trainer.data.reading import AHEAD, ahead, content_hash, file_hashes
from support.data_stubs import StubBase, drawn, small_files
from support.runs import sha256, small_config

COUNT = 9


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Pictures in files of two."""
    small_files(monkeypatch)
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(COUNT):
        (root / f"{number}.png").write_bytes(drawn(32 + 8 * (number % 3), 32, noise=number))
        (root / f"{number}.txt").write_text(f"picture {number}")
    return root


def configured(folder, name="run", **changes):
    return small_config(folder.parent / name, data__images=folder, **changes)


def build(folder, base=None, **changes):
    return cache.build_cache(configured(folder, **changes), base or StubBase(), lambda *_: None)


def bytes_of(data):
    return {file.name: sha256(file) for file in data.folder.iterdir()}


def together(config, processes, base=StubBase):
    """The result of each of so many processes: its cache or its error. Here they are threads."""
    barrier, results = threading.Barrier(processes, timeout=60), [None] * processes

    def run(rank):
        try:
            results[rank] = cache.build_cache(config, base(), lambda *_: None, rank, processes, barrier.wait)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("buckets", ["false", "true"])
def test_any_number_of_threads_writes_the_same_bytes(folder, buckets):
    caches = [
        build(folder, name=f"run{workers}", data__workers=workers, data__buckets=buckets, data__batch_size=2)
        for workers in (0, 4)
    ]
    assert caches[0].folder.name == caches[1].folder.name and bytes_of(caches[0]) == bytes_of(caches[1])


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(folder, processes):
    encoded = []

    class Counting(StubBase):
        def encode_images(self, pixels):
            encoded.append((threading.get_ident(), len(pixels)))
            return super().encode_images(pixels)

    alone, shared = build(folder), together(configured(folder, "shared"), processes, Counting)
    assert bytes_of(shared[0]) == bytes_of(alone)
    assert sum(count for _, count in encoded) == COUNT and len({thread for thread, _ in encoded}) == processes
    assert all(list(one.captions) == list(alone.captions) for one in shared)


def test_the_teachers_latents_are_shared_out_too(tiny_base, tmp_path, monkeypatch):
    small_files(monkeypatch)
    alone = cache.build_cache(small_config(tmp_path / "alone"), tiny_base, lambda *_: None)
    # each process has tokenizers of its own, whose padding is a state that two threads would change under each other
    process = lambda: replace(tiny_base, tokenizers=deepcopy(tiny_base.tokenizers))  # noqa: E731
    shared = together(small_config(tmp_path / "shared"), 2, process)
    assert bytes_of(shared[1]) == bytes_of(alone)


def test_what_one_process_cannot_read_stops_every_process_with_a_sentence(folder):
    (folder / "2.png").write_text("not a picture")
    errors = together(configured(folder), 2)
    assert all(isinstance(error, ValueError) for error in errors)
    assert "another process found pictures that cannot be used" in str(errors[0])
    assert "1 of the 9 pictures in" in str(errors[1]) and "2.png: cannot be read" in str(errors[1])
    caches = together(configured(folder, data__skip_bad="true"), 2)
    assert [len(data) for data in caches] == [8, 8] and "2.png" in caches[0].skipped[0]


def test_a_picture_is_hashed_once(folder, monkeypatch):
    hashed = []

    def counted(path):
        hashed.append(path.name)
        return content_hash(path)

    monkeypatch.setattr(reading, "content_hash", counted)
    for file in folder.glob("*.png"):
        os.utime(file, ns=(10**18, 10**18))
    first = build(folder).folder
    assert len(hashed) == COUNT
    assert build(folder).folder == first and len(hashed) == COUNT
    (folder / "3.png").write_bytes(drawn(32, 32))
    assert build(folder).folder != first and hashed[COUNT:] == ["3.png"]


def test_a_change_within_the_clocks_tick_is_seen(tmp_path):
    """A file as long, written at the same time as far as its time says."""
    file, known = tmp_path / "file", tmp_path / "known.json"
    hashes, now = [], time.time_ns()
    for content in (b"one", b"two"):
        file.write_bytes(content)
        os.utime(file, ns=(now, now))
        hashes += file_hashes([file], known, 0)
    assert hashes[0] != hashes[1] == content_hash(file)


def test_remembered_hashes_that_are_damaged_are_taken_again(tmp_path):
    file, known = tmp_path / "file", tmp_path / "known.json"
    file.write_bytes(b"content")
    os.utime(file, ns=(10**18, 10**18))
    known.write_text("{")
    assert file_hashes([file], known, 2) == [content_hash(file)]
    assert json.loads(known.read_text())[str(file.resolve())][2] == content_hash(file)


@pytest.mark.parametrize("workers", [0, 3])
def test_results_come_in_order_and_little_is_read_ahead(workers):
    taken = []

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    for at, result in enumerate(ahead(lambda n: (time.sleep(0.001 * (n % 3)), n)[1], items(), workers)):
        assert result == at
        assert len(taken) <= at + 1 + AHEAD * workers + 1
    assert len(taken) == 50


def test_an_error_comes_in_its_items_place():
    results = ahead(lambda n: 1 // (3 - n), range(9), 2)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_captions_in_a_metadata_file(folder):
    for text in folder.glob("*.txt"):
        text.unlink()
    lines = [{"file_name": f"{number}.png", "text": f"told {number}"} for number in range(COUNT)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    assert list(build(folder).captions) == [f"told {number}" for number in range(COUNT)]
    (folder / "more").mkdir()
    (folder / "more" / "x.png").write_bytes(drawn(8, 8))
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "more/x.png", "text": "from above"}')
    assert {p.path.name: p.caption for p in find_pictures(str(folder), False)[0]}["x.png"] == "from above"


def test_what_is_wrong_in_a_metadata_file_is_named(folder):
    lines = [
        '{"file_name": "gone.png", "text": "a"}',
        '{"file_name": "1.png"}',
        "no json",
        '{"file_name": "2.png", "text": "beside its 2.txt"}',
        '{"file_name": "3.png", "text": " "}',
        '{"file_name": "3.png", "text": "again"}',
    ]
    (folder / "3.txt").unlink()
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    pictures, bad, _ = find_pictures(str(folder), skip_bad=True)
    assert len(pictures) == COUNT - 2 and bad == [
        "metadata.jsonl line 1: no picture gone.png",
        'metadata.jsonl line 2: not {"file_name": "...", "text": "..."}',
        'metadata.jsonl line 3: not {"file_name": "...", "text": "..."}',
        "metadata.jsonl line 6: another caption of 3.png",
        "2.png: captions in both 2.txt and metadata.jsonl",
        "3.png: metadata.jsonl line 5: empty caption",
    ]
    with pytest.raises(
        ValueError, match="2 of the 9 pictures in .* lack a good caption, 4 lines of metadata are wrong:"
    ):
        find_pictures(str(folder), skip_bad=False)


def test_profiles_that_count_for_nothing_are_counted(folder):
    for number in (0, 3, 4):
        picture = Image.open(folder / f"{number}.png")
        picture.save(folder / f"{number}.png", icc_profile=b"broken")
    sentence = (
        "3 of the 9 pictures have a colour profile that is damaged or of other colours than the picture: they are"
    )
    assert build(folder).notes == [f"{sentence} taken as sRGB"]
    assert build(folder).notes == [f"{sentence} taken as sRGB"], "from the cache, too"
