"""webdataset shards: read in order from disk and over HTTP, streamed, and what is said where something lacks."""

import io
import json
import shutil
import tarfile
import threading
import tracemalloc
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import pytest
import torch
from webdataset import TarWriter

from phased_consistency.trainer.data import cache
from phased_consistency.trainer.data.shards import list_shards, read_shard
from support.data_stubs import StubBase, drawn, small_files
from support.runs import sha256, small_config

PICTURES = {name: drawn(40, 40, name) for name in ("red", "green", "blue", "white", "black")}


def write_shard(path, names, **more):
    """A shard of pictures of these colours, written by webdataset; more: other files of every sample."""
    with TarWriter(str(path)) as tar:
        for name in names:
            tar.write({"__key__": name, "png": PICTURES[name], "txt": f"all {name}", **more})
    return path


@pytest.fixture
def shards(tmp_path):
    """Two shards, of three and of two pictures."""
    write_shard(tmp_path / "set-000.tar", ["red", "green", "blue"])
    write_shard(tmp_path / "set-001.tar", ["white", "black"])
    return str(tmp_path / "set-{000..001}.tar")


@pytest.fixture
def build(tmp_path):
    """Build the cache of shards, with settings changed."""

    def build(shards, progress=lambda *_: None, **changes):
        config = small_config(tmp_path / "run", **{"data__shards": shards, **changes})
        return cache.build_cache(config, StubBase(), progress)

    return build


@pytest.fixture
def serve(tmp_path):
    """Serve the folder on this machine; returns the address, and the list of requests."""
    if shutil.which("curl") is None:
        pytest.skip("webdataset reads addresses with curl, which is not installed")
    servers = []

    def serve(kind=SimpleHTTPRequestHandler):
        requests = []

        class Handler(kind):
            def log_message(self, *_):
                requests.append(f"{self.command} {self.path}")

        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", requests

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_samples_of_shards_are_those_of_a_folder(shards, build, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, (name, picture) in enumerate(PICTURES.items()):
        (folder / f"{number}.png").write_bytes(picture)
        (folder / f"{number}.txt").write_text(f"all {name}")
    ours, plain = build(shards), build(None, data__images=folder)
    assert list(ours.captions) == list(plain.captions) == [f"all {name}" for name in PICTURES]
    assert torch.equal(ours.latents(range(5), [None] * 5), plain.latents(range(5), [None] * 5))
    assert torch.equal(ours.sizes(range(5)), plain.sizes(range(5)))


def test_patterns_are_expanded_and_lists_kept(shards, tmp_path):
    two = [str(tmp_path / "set-000.tar"), str(tmp_path / "set-001.tar")]
    assert list_shards([shards]) == list_shards(two) == two
    with pytest.raises(ValueError, match="names .*set-000.tar more than once"):
        list_shards([shards, two[0]])


@pytest.mark.parametrize("shards", ["pipe:touch made", "{pipe,x}:touch made", "PIPE:touch made"])
def test_no_command_is_run(shards, tmp_path, monkeypatch, build):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="would run a command, and a configuration runs none"):
        build(shards)
    assert not (tmp_path / "made").exists()


def test_a_program_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "cannot be opened (gsutil: No such file" in next(read_shard("gs://bucket/set.tar")).problem


def test_an_address_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="s3: is not read; files and ais, .*https.* are"):
        list_shards(["s3://bucket/set.tar"])


def test_pictures_and_shards_exclude_each_other(shards, tmp_path):
    with pytest.raises(ValueError, match="data.images and data.shards are both set"):
        small_config(tmp_path, data__shards=shards, data__images=tmp_path)


def test_a_header_holds_neither_place_nor_key(tmp_path):
    config = small_config(tmp_path, data__shards='["/home/me/a.tar", "https://host/dir/b.tar?key=secret"]')
    assert config.what_decides_the_weights()["data"]["shards"] == ["a.tar", "b.tar"]


def test_captions_in_json_and_what_is_no_sample(tmp_path, build):
    with TarWriter(str(tmp_path / "odd.tar")) as tar:
        tar.write({"__key__": "a", "jpg": drawn(32, 32, kind="JPEG"), "json": json.dumps({"caption": "told"}).encode()})
        tar.write({"__key__": "b", "png": PICTURES["red"]})
        tar.write({"__key__": "c", "txt": "alone"})
        tar.write({"__key__": "d", "png": PICTURES["red"], "jpg": PICTURES["red"], "txt": "two"})
        tar.write({"__key__": "e", "png": b"broken", "txt": "broken"})
        tar.write({"__key__": "f", "png": PICTURES["red"], "txt": " \n"})
        tar.write({"__key__": "g", "png": PICTURES["red"], "json": b"[1]"})
        tar.write({"__key__": "h", "png": PICTURES["red"], "txt": "färg".encode("latin-1")})
    with pytest.raises(ValueError, match="7 of the samples of the 1 shards in data.shards cannot be used"):
        build(tmp_path / "odd.tar")
    data = build(tmp_path / "odd.tar", data__skip_bad="true")
    assert list(data.captions) == ["told"]
    assert data.skipped == [
        "odd.tar/d: several pictures (png, jpg)",
        "odd.tar/e: cannot be read (no picture of a known kind)",
        "odd.tar/f: empty caption",
        "odd.tar/h: not UTF-8: its caption",
        'odd.tar/b: no caption (.txt, or "caption" in .json)',
        "odd.tar/c: no picture",
        'odd.tar/g: no caption (.txt, or "caption" in .json)',
    ]


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return str(path)


def test_a_shard_that_is_sorted_by_kind_says_so(tmp_path, build):
    names = [f"{n}{kind}" for kind in (".png", ".txt") for n in range(5)]
    files = [(name, PICTURES["red"] if name.endswith("png") else b"red") for name in names]
    sentence = "set.tar: 5 pictures stand apart from their captions (0, 1, 2, ...): the files of a sample must stand"
    path = tar_of(tmp_path / "set.tar", [*files, ("x.txt", b"alone")])
    problems = [f"{sample.name}: {sample.problem}" for sample in read_shard(path)]
    assert problems[0].startswith(sentence) and problems[1:] == ["set.tar/x: no picture"]
    with pytest.raises(ValueError, match="tar --sort=name"):
        build(path)


def test_what_macos_packs_beside_is_no_sample(tmp_path, build):
    files = [("._a.png", b"x"), ("./a.png", PICTURES["red"]), ("__MACOSX/._a.txt", b"x"), ("./a.caption", b"red")]
    assert list(build(tar_of(tmp_path / "set.tar", files)).captions) == ["red"]


@pytest.mark.parametrize("entry", [{"caption": "red"}, {"text": ["red"]}, {"prompt": "red", "score": 1}])
def test_other_keys_of_captions_in_json(tmp_path, build, entry):
    files = [("a.png", PICTURES["red"]), ("a.json", json.dumps(entry).encode())]
    assert list(build(tar_of(tmp_path / "set.tar", files)).captions) == ["red"]


def test_no_picture_is_passed_over_for_its_name(tmp_path, build):
    """A second dot, which webdataset takes for the kind's beginning, and a file that is there twice."""
    names = ("a.png", "a.txt", "b.v2.png", "b.v2.txt", "c.png", "c.png", "c.txt", "d.png", "d.txt")
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for name in names:
            data = PICTURES["red"] if name.endswith("png") else name.encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    data = build(tmp_path / "odd.tar", data__skip_bad="true")
    assert list(data.captions) == ["a.txt", "c.txt", "d.txt"]
    assert data.skipped == [
        "odd.tar: a second dot in the name b.v2.png, which webdataset takes for the kind .v2.png: rename it",
        "odd.tar: c.png is in it twice: the first is taken",
    ]


def test_a_missing_shard_is_named_before_anything_is_cached(shards, build, tmp_path):
    both = f'["{shards}", "{tmp_path / "set-002.tar"}"]'
    with pytest.raises(ValueError, match="1 of the 3 shards in data.shards cannot be read:\n .*set-002.tar: no such"):
        build(both)
    assert not list(tmp_path.rglob("latents-*"))
    data = build(both, data__skip_bad="true")
    assert len(data) == 5 and data.skipped == [f"{tmp_path / 'set-002.tar'}: no such file"]
    with pytest.raises(ValueError, match="None of the 1 shards in data.shards can be read: .*set-002.tar"):
        build(tmp_path / "set-002.tar", data__skip_bad="true")


CUTS = {"unexpected end of data": lambda file: file.offset_data + 5, "no end of the archive": lambda file: file.offset}


@pytest.mark.parametrize(("why", "cut"), CUTS.items(), ids=CUTS)
def test_a_shard_that_ends_early_says_what_was_read(tmp_path, build, why, cut):
    path = write_shard(tmp_path / "set.tar", ["red", "green", "blue"])
    with tarfile.open(path) as tar:
        end = cut(next(file for file in tar if file.name == "blue.png"))
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(ValueError, match=rf"set.tar: ends early, after \d samples? \({why}\). Get the shard again; "):
        build(path)
    assert not list(tmp_path.rglob("latents-*")), "what is here is checked before anything is cached"
    data = build(path, data__skip_bad="true")
    assert data.skipped[0].startswith(f"set.tar: ends early, after {len(data)} sample")
    assert list(data.captions) == ["all red", "all green"][: len(data)] and len(data)


def test_a_compressed_shard_is_read_and_its_early_end_seen(tmp_path, build):
    noise = [drawn(64, 64, noise=seed) for seed in range(8)]
    with TarWriter(str(tmp_path / "set.tar.gz"), compress=True) as tar:
        for number, picture in enumerate(noise):
            tar.write({"__key__": str(number), "png": picture, "txt": "noise"})
    path = tmp_path / "set.tar.gz"
    assert len(build(path)) == 8
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data = build(path, data__skip_bad="true")
    assert 0 < len(data) < 8 and data.skipped[0].startswith(f"set.tar.gz: ends early, after {len(data)} samples")


def test_a_shard_of_no_pictures_and_one_that_is_no_tar(tmp_path):
    with TarWriter(str(tmp_path / "empty.tar")):
        pass
    (tmp_path / "text.tar").write_text("not a tar at all " * 100)
    assert [s.problem for s in read_shard(str(tmp_path / "empty.tar"))] == ["holds no pictures"]
    assert "ends early, after 0 samples" in next(read_shard(str(tmp_path / "text.tar"))).problem


def test_http_gives_what_the_file_gives(shards, build, serve, tmp_path):
    address, requests = serve()
    here, there = build(shards), build(f"{address}/set-{{000..001}}.tar")
    assert torch.equal(here.latents(range(5), [None] * 5), there.latents(range(5), [None] * 5))
    assert list(here.captions) == list(there.captions) and there.notes == []
    build(f"{address}/set-{{000..001}}.tar")
    assert sorted(requests) == sorted(f"{method} /set-00{n}.tar" for method in ("GET", "HEAD", "HEAD") for n in (0, 1))
    write_shard(tmp_path / "set-001.tar", ["white"], npy=bytes(20000))
    assert len(build(f"{address}/set-{{000..001}}.tar")) == 4, "the server tells of the change"


def test_an_address_that_is_signed_anew_is_the_same_shard(shards, build, serve):
    address, requests = serve()
    first = build(f"{address}/set-000.tar?signature=one").folder
    assert build(f"{address}/set-000.tar?signature=two").folder == first
    assert sum(line.startswith("GET") for line in requests) == 1, "nothing is fetched twice"


def test_a_server_that_tells_nothing_is_said(shards, build, serve):
    class Silent(SimpleHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(405)

    data = build(f"{serve(Silent)[0]}/set-000.tar")
    assert len(data) == 3 and "1 of the 1 shards are known by their addresses alone" in data.notes[0]


def test_a_shard_that_the_server_lacks_and_a_server_that_is_not_there(build, serve):
    address, _ = serve()
    with pytest.raises(ValueError, match="set-9.tar: the server answers 404"):
        build(f"{address}/set-9.tar")
    with pytest.raises(ValueError, match="set-9.tar: cannot be reached"):
        build("http://127.0.0.1:9/set-9.tar")


def test_a_transfer_that_breaks_off_keeps_what_was_read_and_is_said(shards, build, serve, tmp_path):
    class Truncating(SimpleHTTPRequestHandler):
        def copyfile(self, source, outputfile):
            whole = source.read()
            with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
                outputfile.write(whole[: tar.getmembers()[4].offset])

    address, _ = serve(Truncating)
    with pytest.raises(ValueError, match=r"set-000.tar: ends early, after 2 samples \(curl ended with 18\). Get the"):
        build(f"{address}/set-000.tar")
    data = build(f"{address}/set-000.tar", data__skip_bad="true")
    assert list(data.captions) == ["all red", "all green"] and len(data.skipped) == 1


def test_a_shard_that_was_kept_in_part_can_be_tried_again(shards, build, serve):
    """A cache that is made again may have other prompts, and then no encoding of the old ones is left."""

    class Truncating(SimpleHTTPRequestHandler):
        broken = True

        def copyfile(self, source, outputfile):
            whole = source.read()
            outputfile.write(whole[:2000] if Truncating.broken and "000" in self.path else whole)

    address = f"{serve(Truncating)[0]}/set-{{000..001}}.tar"
    data = build(address, data__skip_bad="true")
    assert len(data) < 5 and len(data.skipped) == 1
    Truncating.broken = False
    for file in data.folder.glob("latents-00000-*"):
        file.unlink()
    again = build(address, data__skip_bad="true")
    assert list(again.captions) == [f"all {name}" for name in PICTURES] and again.skipped == []
    assert again.encoding(again.captions)["hidden"].flatten().tolist() == [len(c) for c in again.captions]


def test_a_killed_caching_goes_on_in_the_middle_of_a_shard(tmp_path, build, monkeypatch):
    small_files(monkeypatch)
    shard = write_shard(tmp_path / "set.tar", PICTURES)
    whole = [sha256(f) for f in sorted(build(shard, data__cache=tmp_path / "whole").folder.glob("*"))]
    encoded = []

    class Killed(StubBase):
        def encode_images(self, pixels):
            encoded.append(len(pixels))
            if len(encoded) == 2:
                raise KeyboardInterrupt
            return super().encode_images(pixels)

    config = small_config(tmp_path / "run", data__shards=shard, data__batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        cache.build_cache(config, Killed(), lambda *_: None)
    data = cache.build_cache(config, Killed(), lambda *_: None)
    assert encoded == [2, 2, 2, 1], "the first two were there"
    assert [sha256(f) for f in sorted(data.folder.glob("*"))] == whole


@pytest.mark.parametrize("count", [2, 4])
def test_a_shard_that_fills_its_files_is_whole(tmp_path, build, monkeypatch, count):
    small_files(monkeypatch)
    data = build(write_shard(tmp_path / "set.tar", [*PICTURES][:count]))
    assert len(data) == count
    last = [f.name.endswith("-last.safetensors") for f in sorted(data.folder.glob("latents-*"))]
    assert last == [False] * (count // 2 - 1) + [True]


def test_a_shard_is_never_whole_in_memory(tmp_path):
    with TarWriter(str(tmp_path / "large.tar")) as tar:
        for number in range(64):
            tar.write({"__key__": f"{number:03d}", "png": bytes(1 << 19), "txt": "x", "npy": bytes(1 << 19)})
    tracemalloc.start()
    assert sum(1 for _ in islice(read_shard(str(tmp_path / "large.tar")), 64)) == 64
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20, "of 64 MiB"


def test_names_in_two_forms_and_with_dots_are_read(tmp_path, build):
    files = [("caf\u00e9.png", PICTURES["red"]), ("cafe\u0301.txt", b"coffee")]
    files += [("set/../b.png", PICTURES["red"]), ("set/../b.txt", b"beyond")]
    assert list(build(tar_of(tmp_path / "set.tar", files)).captions) == ["coffee", "beyond"]
