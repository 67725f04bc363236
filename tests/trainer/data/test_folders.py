"""Folders as they are on people's disks: what is data in them, what is not, and what is said of the rest."""

import json
import os
import unicodedata
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from PIL import Image

from phased_consistency.trainer.data import cache
from phased_consistency.trainer.data.folders import find_pictures
from phased_consistency.trainer.data.sources import pictures_of
from support.data_stubs import StubBase, drawn
from support.runs import small_config

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def write(folder, name, caption="a caption", suffix=".txt"):
    """A picture in a folder, with a caption beside it unless that is None."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(drawn(16, 16))
    if caption is not None:
        file.with_suffix(suffix).write_text(caption, encoding="utf-8")
    return file


def captions(folder, **options) -> dict[str, str]:
    """Name below the folder -> caption, of all that is data without any fault."""
    return {
        p.path.relative_to(folder).as_posix(): p.caption for p in find_pictures(str(folder), False, **options).pictures
    }


@pytest.fixture
def folder(tmp_path):
    """Two good pictures."""
    for name in ("g0.png", "g1.png"):
        write(tmp_path / "data", name)
    return tmp_path / "data"


GOOD = {"g0.png": "a caption", "g1.png": "a caption"}
SYSTEM = ("._g0.png", ".DS_Store.png", ".ipynb_checkpoints/g0.png", "__MACOSX/g0.png", "sub/__MACOSX/._g0.png")
SYSTEM += ("@eaDir/g0.png/SYNOFILE_THUMB_M.png", ".thumbnails/x/y.png", "$RECYCLE.BIN/g0.png")


@pytest.mark.parametrize("name", SYSTEM)
def test_what_systems_leave_behind_is_no_data(folder, name):
    write(folder, name, None)
    (folder / name).parent.joinpath("metadata.jsonl").write_text("not read") if "/" in name else None
    assert captions(folder) == GOOD


def test_a_folder_in_a_hidden_place_is_read(tmp_path):
    write(tmp_path / ".cache" / "set", "a.png")
    assert captions(tmp_path / ".cache" / "set") == {"a.png": "a caption"}


def test_a_folder_of_hidden_pictures_alone_says_so(tmp_path):
    write(tmp_path, ".a.png")
    with pytest.raises(ValueError, match="holds no pictures .*; 1 are hidden or the system's, which are never data"):
        find_pictures(str(tmp_path), False)


@pytest.mark.parametrize("output", ["runs/mine", "."])
def test_a_run_never_learns_its_own_pictures(folder, output):
    """Beneath the data, and with the data's folder as the run's own."""
    config = small_config(folder / output, data__images=folder)
    for place in (config.previews / "step-0000001.png", *config.places_of_results[3:], config.cache_folder / "x.png"):
        write(place.parent, place.name, None)
    assert [picture.name for picture in pictures_of(config).pictures] == ["g0.png", "g1.png"]


def test_a_cache_elsewhere_in_the_data_is_none(folder, tmp_path):
    write(folder / "latents", "x.png", None)
    config = small_config(tmp_path / "run", data__images=folder, data__cache=folder / "latents")
    assert len(pictures_of(config).pictures) == 2


def test_data_in_the_runs_folder_are_read(tmp_path):
    write(tmp_path / "run" / "pictures", "a.png")
    assert len(pictures_of(small_config(tmp_path / "run", data__images=tmp_path / "run" / "pictures")).pictures) == 1


def test_links_are_followed(folder, tmp_path):
    write(tmp_path / "elsewhere", "far.png", "far away")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "one.png").symlink_to(tmp_path / "elsewhere" / "far.png")
    (folder / "one.txt").write_text("linked")
    assert captions(folder) == {**GOOD, "more/far.png": "far away", "one.png": "linked"}
    (tmp_path / "link").symlink_to(folder)
    assert captions(tmp_path / "link").keys() == captions(folder).keys()


def test_links_that_lead_back_end(folder):
    (folder / "sub").mkdir()
    write(folder / "sub", "a.png")
    (folder / "loop").symlink_to(folder)
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "itself").symlink_to(folder / "itself")
    assert captions(folder) == {**GOOD, "sub/a.png": "a caption"}


BAD: dict[str, tuple[str, Callable]] = {
    "folder": ("x.png: a folder that is called like a picture: rename it", lambda path: path.mkdir()),
    "dangling": ("x.png: a link that leads nowhere", lambda path: path.symlink_to(path.parent / "gone")),
    "loop": ("x.png: a link that leads nowhere", lambda path: path.symlink_to(path)),
    "pipe": ("x.png: no file", lambda path: os.mkfifo(path)),
}


@pytest.mark.parametrize(("line", "make"), BAD.values(), ids=BAD)
def test_what_is_only_called_like_a_picture_is_a_bad_item(folder, line, make):
    make(folder / "x.png")
    (folder / "x.txt").write_text("caption")
    with pytest.raises(
        ValueError, match=r"(?s)1 of the 3 pictures in .* cannot be used:\n  x.png: .*data.skip_bad=true"
    ):
        find_pictures(str(folder), False)
    pictures, skipped, _ = find_pictures(str(folder), True)
    assert [picture.name for picture in pictures] == [*GOOD] and skipped == [line]


def test_a_picture_that_may_not_be_read_is_a_bad_item(folder, tmp_path, monkeypatch):
    """Permission, a disk that fails: whatever opening it says."""
    config = small_config(tmp_path / "run", data__images=folder, data__skip_bad="true", data__resolution=32)
    (folder / "g0.png").rename(folder / "kept")
    source_of = cache.open_source

    def vanished(*args, **options):
        (folder / "kept").rename(folder / "g0.png")
        source = source_of(*args, **options)
        (folder / "g0.png").unlink()
        return source

    monkeypatch.setattr(cache, "open_source", vanished)
    data = cache.build_cache(config, StubBase(), lambda *_: None)
    assert len(data) == 1 and data.skipped == ["g0.png: cannot be read (No such file or directory)"]


def test_a_folder_that_cannot_be_opened_is_named(folder, monkeypatch):
    (folder / "closed").mkdir()
    scan = os.scandir

    def scandir(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"closed: cannot be opened \(Permission denied\)"):
        find_pictures(str(folder), False)


def test_other_files_are_counted_by_kind(folder):
    for name in ("a.psd", "b.psd", "c.mp4", "a.txt", "README"):
        (folder / name).write_text("x")
    assert find_pictures(str(folder), False).notes == [
        "5 files of other kinds are not used: 2 .psd, 1 .mp4, 1 .txt, 1 without a suffix"
    ]


def test_a_kind_that_needs_a_package_names_it(folder, monkeypatch):
    from phased_consistency.trainer.data import listing

    monkeypatch.setattr(listing, "readable_kinds", lambda: ("PNG",))
    for name in ("a.heic", "b.HEIC", "c.avif"):
        (folder / name).write_bytes(b"x")
    (note,) = find_pictures(str(folder), False).notes
    assert note.startswith("3 files of other kinds are not used: 2 .heic, 1 .avif; ")
    assert ".heic is read after pip install pillow-heif" in note and ".avif is read after pip install" in note


def test_a_folder_of_other_kinds_names_them(tmp_path):
    (tmp_path / "a.psd").write_bytes(b"x")
    with pytest.raises(ValueError, match="holds no pictures .*; 1 file of another kind is not used: 1 .psd"):
        find_pictures(str(tmp_path), False)
    with pytest.raises(ValueError, match="is a file, and data.images is a folder .* data.shards"):
        find_pictures(str(tmp_path / "a.psd"), False)


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "a.cap", "a.png.txt", "a.png.caption", "a.PNG.Txt"])
def test_names_of_captions(tmp_path, name):
    write(tmp_path, "a.PNG" if "PNG" in name else "a.png", None)
    (tmp_path / name).write_text("told")
    assert [*captions(tmp_path).values()] == ["told"] and not find_pictures(str(tmp_path), False).notes


def test_two_captions_of_a_picture_are_named(tmp_path):
    write(tmp_path, "a.png")
    (tmp_path / "a.caption").write_text("another")
    with pytest.raises(ValueError, match="a.png: captions in both a.caption and a.txt"):
        find_pictures(str(tmp_path), False)


@pytest.mark.parametrize(("picture", "text"), [(NFC, NFD), (NFD, NFC)], ids=["composed", "decomposed"])
def test_names_are_compared_in_one_form(tmp_path, picture, text):
    for place in ("beside", "table", "csv"):
        write(tmp_path / place / picture, f"{picture}.png", None)
    (tmp_path / "beside" / picture / f"{text}.txt").write_text("a cup")
    line = json.dumps({"file_name": f"{text}/{text}.png", "text": "a cup"})
    (tmp_path / "table" / "metadata.jsonl").write_text(line)
    (tmp_path / "csv" / "metadata.csv").write_text(f"file_name,text\n{text}/{text}.png,a cup\n", encoding="utf-8")
    assert [*captions(tmp_path).values()] == ["a cup"] * 3


def test_the_order_is_that_of_one_form(tmp_path):
    """So the same pictures are the same data after a way through macOS."""
    for form, name in (("a", NFC), ("b", NFD)):
        for stem in ("caff", name, "cafg"):
            write(tmp_path / form, f"{stem}.png")
    orders = [
        [unicodedata.normalize("NFC", p.name) for p in find_pictures(str(tmp_path / f), False).pictures] for f in "ab"
    ]
    assert orders[0] == orders[1]


def row(folder, name, content) -> dict[str, str]:
    (folder / name).write_text(content, encoding="utf-8")
    return captions(folder)


@pytest.fixture
def bare(tmp_path):
    """Three pictures without captions, one of them further down."""
    for name in ("g0.png", "g1.png", "sub/g2.png"):
        write(tmp_path / "data", name, None)
    return tmp_path / "data"


CSV = {
    "commas": "file_name,text\ng0.png,a\ng1.png,b\nsub/g2.png,c\n",
    "other columns": 'id,Caption,Image\n1,a,g0.png\n2,b,g1.png\n3,"c",sub/g2.png\n',
    "semicolons of a spreadsheet": "\ufefffile_name;caption\r\ng0.png;a\r\ng1.png;b\r\nsub/g2.png;c\r\n",
    "tabs": "path\tprompt\ng0.png\ta\ng1.png\tb\nsub/g2.png\tc\n",
    "backslashes": "file_name,text\ng0.png,a\ng1.png,b\nsub\\g2.png,c\n",
}


@pytest.mark.parametrize("content", CSV.values(), ids=CSV)
def test_a_csv_is_a_table(bare, content):
    assert row(bare, "metadata.csv", content) == {"g0.png": "a", "g1.png": "b", "sub/g2.png": "c"}


def test_a_comma_in_a_caption_is_quoted(bare):
    content = 'file_name,text\ng0.png,"a, b ""c"""\ng1.png,b\nsub/g2.png,c\n'
    assert row(bare, "metadata.csv", content)["g0.png"] == 'a, b "c"'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"name,label\ng0.png,a\n",
            "metadata.csv: its first line must name the columns, such as file_name,text; it is 'name",
        ),
        ("file_name,text\ng0.png,fär\n".encode("cp1252"), "metadata.csv: not UTF-8: save it as CSV in UTF-8"),
        (b"", "metadata.csv: its first line must name the columns"),
        (b'file_name,text\ng0.png,"a\n', r"metadata.csv after line 1: not CSV \(unexpected end of data\)"),
        (b"file_name,text\ng0.png,\n", "g0.png: metadata.csv line 2: empty caption"),
        (b"file_name,text\ng0.png\n", 'g0.png: metadata.csv line 2: not {"file_name": "...", "text": "..."}'),
        (b"file_name,text\ngone.png,a\n", "metadata.csv line 2: no picture gone.png"),
    ],
)
def test_what_is_wrong_in_a_csv_is_named(bare, content, said):
    (bare / "metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=said.replace("{", r"\{").replace("...", r"\.\.\.")):
        find_pictures(str(bare), False)


def test_other_keys_in_a_table(bare):
    lines = [{"file_name": "g0.png", "text": ["a", "b"]}, {"image": "g1.png", "caption": "b"}]
    lines += [{"filename": "sub/g2.png", "prompt": "c", "score": 1}]
    assert row(bare, "metadata.jsonl", "\n".join(map(json.dumps, lines))) == {
        "g0.png": "a\nb",
        "g1.png": "b",
        "sub/g2.png": "c",
    }


def test_faults_in_a_table_are_counted_once(bare):
    lines = [
        '{"file_name": "g0.png", "label": 3}',
        '{"file_name": "g1.png", "text": 5}',
        '{"file_name": "no.png", "text": "a"}',
    ]
    (bare / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        ValueError, match="^3 of the 3 pictures in .* lack a good caption, 1 line of metadata is wrong:\n"
    ) as e:
        find_pictures(str(bare), False)
    assert str(e.value).split("\n")[1:5] == [
        "  metadata.jsonl line 3: no picture no.png",
        '  g0.png: metadata.jsonl line 1: not {"file_name": "...", "text": "..."}, but label',
        '  g1.png: metadata.jsonl line 2: not {"file_name": "...", "text": "..."}',
        "  sub/g2.png: no caption g2.txt",
    ]


def test_places_of_pictures_in_a_table(bare, tmp_path):
    """Backslashes, a whole path, and one that goes up are read where they lead to a picture of the folder."""
    names = [r"..\data\g0.png", str(bare / "g1.png"), "./sub/../sub/g2.png"]
    (bare / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": n[-5]}) for n in names))
    assert captions(bare) == {"g0.png": "0", "g1.png": "1", "sub/g2.png": "2"}
    (tmp_path / "link").symlink_to(bare)
    assert len(captions(tmp_path / "link")) == 3, "the whole path is that without the link"


@pytest.mark.parametrize("name", ["../outside.png", "C:\\data\\g0.png", "/nowhere/g0.png", "sub"])
def test_places_outside_of_the_folder_are_named(folder, name):
    write(folder.parent, "outside.png", None)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}))
    with pytest.raises(ValueError, match="^1 line of metadata in .* is wrong:") as error:
        find_pictures(str(folder), False)
    assert f"metadata.jsonl line 1: no picture {name}" in str(error.value)


def test_a_table_with_characters_that_end_lines_elsewhere(bare):
    """U+2028 and the like stand in texts from the web, and a line of a table ends at a line feed alone."""
    lines = [
        json.dumps({"file_name": n, "text": f"a{c}b"}, ensure_ascii=False)
        for n, c in zip(("g0.png", "g1.png"), "\u2028\x85", strict=True)
    ]
    (bare / "sub" / "g2.txt").write_text("a\x0bb", encoding="utf-8")
    assert row(bare, "metadata.jsonl", "\n".join(lines)) == {
        "g0.png": "a\u2028b",
        "g1.png": "a\x85b",
        "sub/g2.png": "a\x0bb",
    }


def test_a_table_in_another_encoding_is_named(bare):
    (bare / "metadata.jsonl").write_bytes(
        json.dumps({"file_name": "g0.png", "text": "ä"}, ensure_ascii=False).encode("cp1252")
    )
    with pytest.raises(ValueError, match="metadata.jsonl line 1: not UTF-8"):
        find_pictures(str(bare), False)


def build(folder, run, **changes):
    return cache.build_cache(small_config(run, data__images=folder, **changes), StubBase(), lambda *_: None)


def test_what_was_passed_over_is_said_at_every_start(folder, tmp_path):
    (folder / "a.psd").write_bytes(b"x")
    for _ in range(2):
        assert build(folder, tmp_path / "run").notes == ["1 file of another kind is not used: 1 .psd"]


def test_captions_that_are_cut_are_counted(folder, tmp_path):
    (folder / "g0.txt").write_text("word " * 76)
    for _ in range(2):
        (note,) = build(folder, tmp_path / "run").notes
        assert note.startswith(
            "1 of the 2 different captions are longer than the text encoder reads, which is 77 tokens"
        )


def test_tokens_are_counted_as_the_encoder_does(tiny_base):
    word = "red"
    length = len(tiny_base.tokenizers[0](word).input_ids) - 2
    fits = " ".join([word] * (75 // length))
    assert tiny_base.count_cut(["", fits, f"{fits} {word}"]) == 1
    assert tiny_base.token_limits == [77]


def test_one_encoder_that_reads_on_loses_nothing():
    """SD3's T5 may read more of a prompt than CLIP."""
    from phased_consistency.trainer.families.sd3 import SD3

    def words(prompts, verbose):
        return SimpleNamespace(input_ids=[prompt.split() for prompt in prompts])

    base = object.__new__(SD3)
    base.tokenizers, base.t5_length = [words] * 3, 256
    assert base.token_limits == [77, 77, 256] and base.count_cut(["a " * 200, "a " * 300]) == 1


def test_the_same_pictures_in_another_folder_are_the_same_data(folder, tmp_path):
    before = build(folder, tmp_path / "run").folder
    folder.rename(tmp_path / "moved")
    assert build(tmp_path / "moved", tmp_path / "run").folder == before


def test_pictures_of_every_suffix_are_data(tmp_path):
    kinds = {"a.apng": "PNG", "b.jfif": "JPEG", "c.jpe": "JPEG", "d.gif": "GIF", "e.TIF": "TIFF", "f.tiff": "TIFF"}
    for name, kind in kinds.items():
        write(tmp_path, name)
        Image.new("RGB", (8, 8)).save(tmp_path / name, kind)
    assert captions(tmp_path).keys() == kinds.keys()


@pytest.mark.parametrize(
    ("name", "kind"), [("g0.json", ".json"), ("captions.csv", ".csv"), ("metadata.parquet", ".parquet")]
)
def test_what_may_hold_the_captions_is_named_where_they_lack(folder, name, kind):
    (folder / "g0.txt").unlink()
    (folder / name).write_text("x")
    words = rf"g0.png: no caption g0.txt\n1 file of another kind is not used: 1 \{kind}; captions are read from .txt, "
    with pytest.raises(ValueError, match=words + r".caption, .cap and metadata.jsonl, metadata.csv\.\nMend"):
        find_pictures(str(folder), False)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.symlink_to("gone"), "g0.txt is no file, but a link that leads nowhere"),
        (lambda path: path.mkdir(), "g0.txt is no file\n"),
        (os.mkfifo, "g0.txt is no file\n"),
    ],
)
def test_a_caption_that_is_no_file_is_said(folder, make, words):
    (folder / "g0.txt").unlink()
    make(folder / "g0.txt")
    with pytest.raises(ValueError, match=f"g0.png: {words}"):
        find_pictures(str(folder), False)
