"""The student's data: read from folders of pictures or made by the teacher, fingerprinted, and made once."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from phased_consistency.samplers import PhaseGrid
from phased_consistency.trainer.data import cache
from phased_consistency.trainer.data.decoding import load_picture
from phased_consistency.trainer.data.folders import find_pictures
from phased_consistency.trainer.data.prompts import PROMPTS, read_prompts
from phased_consistency.trainer.families.generate import generate
from phased_consistency.trainer.tiny.bundled import bundled_folder
from phased_consistency.trainer.training.loop import train
from support.data_stubs import StubBase, small_files
from support.runs import sha256, small_config

SIDE = 32


@pytest.fixture
def folder(tmp_path):
    """Five good pictures of every kind, with captions."""
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    pictures = {
        "a.png": Image.new("RGB", (48, 40), (255, 0, 0)),
        "b.jpg": Image.new("L", (33, 64), 200),
        "c.webp": Image.new("RGBA", (40, 40), (0, 0, 255, 0)),
        "d.PNG": Image.new("P", (9, 3), 0),
        "more/e.bmp": Image.new("RGB", (32, 32), (0, 255, 0)),
    }
    for name, picture in pictures.items():
        picture.save(root / name)
        (root / name).with_suffix(".txt").write_text(f"a picture called {name}\n", encoding="utf-8")
    return root


@pytest.fixture
def build(tmp_path, folder):
    """Build the cache of the folder, with settings changed."""

    def build(base=None, progress=lambda *_: None, **changes):
        config = small_config(tmp_path / "run", **{"data__images": folder, **changes})
        return cache.build_cache(config, base or StubBase(), progress)

    return build


def test_pictures_and_captions_are_paired(folder):
    pictures, skipped, _ = find_pictures(str(folder), skip_bad=False)
    captions = {p.path.relative_to(folder).as_posix(): p.caption for p in pictures}
    assert captions == {n: f"a picture called {n}" for n in ("a.png", "b.jpg", "c.webp", "d.PNG", "more/e.bmp")}
    assert skipped == []


@pytest.mark.parametrize(
    ("name", "colour"),
    [
        ("a.png", (1, -1, -1)),
        ("b.jpg", (200 / 127.5 - 1,) * 3),
        ("c.webp", (1, 1, 1)),  # transparent: white
        ("d.PNG", (-1, -1, -1)),
        ("more/e.bmp", (-1, 1, -1)),
    ],
)
def test_every_kind_of_picture_is_read(folder, name, colour):
    pixels = load_picture(folder / name, SIDE)[0]
    assert pixels.shape == (3, SIDE, SIDE) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels.mean((1, 2)), torch.tensor(colour, dtype=torch.float32), atol=0.02, rtol=0)


def test_pictures_are_cut_in_their_middle(tmp_path):
    wide = Image.new("RGB", (90, 30), "black")
    wide.paste("white", (30, 0, 60, 30))
    wide.save(tmp_path / "wide.png")
    pixels, sizes = load_picture(tmp_path / "wide.png", 15)
    assert pixels[..., 1:-1].min() > 0.9
    assert sizes.tolist() == [30, 90, 0, 15, 15, 15]  # the file's own size, the crop after resizing


def test_photographs_are_turned_upright(tmp_path):
    photo = Image.new("RGB", (32, 32), "black")
    photo.paste("white", (0, 0, 32, 16))
    exif = photo.getexif()
    exif[0x0112] = 3  # taken upside down
    photo.save(tmp_path / "photo.png", exif=exif)
    pixels = load_picture(tmp_path / "photo.png", 32)[0]
    assert pixels[:, 20:].min() == 1 and pixels[:, :12].max() == -1


def test_bad_captions_stop_the_run_by_name(folder):
    (folder / "a.txt").unlink()
    (folder / "b.txt").write_text("  \n", encoding="utf-8")
    (folder / "c.txt").write_bytes("färg".encode("latin-1"))
    with pytest.raises(ValueError, match="3 of the 5 pictures in .* lack a good caption") as raised:
        find_pictures(str(folder), skip_bad=False)
    for line in (
        "a.png: no caption a.txt",
        "b.jpg: empty caption b.txt",
        "c.webp: not UTF-8: c.txt",
        "data.skip_bad=true",
    ):
        assert line in str(raised.value)
    pictures, skipped, _ = find_pictures(str(folder), skip_bad=True)
    assert [p.path.name for p in pictures] == ["d.PNG", "e.bmp"] and len(skipped) == 3


def test_a_folder_without_any_caption_is_refused(folder):
    for text in folder.rglob("*.txt"):
        text.unlink()
    with pytest.raises(ValueError, match="None of the 5 pictures in .* has a caption"):
        find_pictures(str(folder), skip_bad=True)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="No folder at .*Set data.images"):
        find_pictures(str(tmp_path / "gone"), skip_bad=False)
    with pytest.raises(ValueError, match="holds no pictures"):
        find_pictures(str(tmp_path), skip_bad=False)


def test_broken_pictures_stop_the_run_or_are_left_out_by_name(folder, build):
    whole = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(whole[: len(whole) // 2])
    (folder / "b.jpg").write_text("not a picture")
    with pytest.raises(ValueError, match="2 of the 5 pictures in .* cannot be used") as raised:
        build()
    assert "a.png: cannot be read" in str(raised.value) and "b.jpg: cannot be read" in str(raised.value)
    data = build(data__skip_bad="true")
    assert list(data.captions) == [f"a picture called {n}" for n in ("c.webp", "d.PNG", "more/e.bmp")]
    assert [line.split(":")[0] for line in data.skipped] == ["a.png", "b.jpg"]


def test_everything_left_out_is_reported_every_time(folder, build):
    """A caption that goes missing changes no fingerprint where its picture was left out already."""
    (folder / "a.txt").unlink()
    assert len(build(data__skip_bad="true").skipped) == 1
    Image.new("RGB", (8, 8)).save(folder / "late.png")
    assert [line.split(":")[0] for line in build(data__skip_bad="true").skipped] == ["a.png", "late.png"]


def test_a_folder_of_broken_pictures_is_refused(folder, build):
    for picture in find_pictures(str(folder), skip_bad=False)[0]:
        picture.path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="None of the 5 pictures in .* can be used: a.png: cannot be read"):
        build(data__skip_bad="true")


def test_a_cached_sample_is_its_picture(folder, build):
    data = build()
    latent = data.latents([0], [torch.Generator()])[0]
    expected = StubBase().encode_images(load_picture(folder / "a.png", SIDE)[0][None])[0][0]
    torch.testing.assert_close(latent, expected, atol=1e-3, rtol=1e-3)
    assert data.encoding([data.captions[0]])["hidden"].item() == len("a picture called a.png")
    assert data.encoding([""])["hidden"].item() == 0
    assert data.sizes([1]).tolist() == [[64, 33, 15, 0, SIDE, SIDE]]


CHANGES = {
    "caption": lambda folder: (folder / "a.txt").write_text("another caption"),
    "picture": lambda folder: Image.new("RGB", (48, 40), "yellow").save(folder / "a.png"),
    "one picture less": lambda folder: (folder / "a.png").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_data_make_a_new_cache(folder, build, change):
    before = build().folder
    CHANGES[change](folder)
    assert build().folder != before


def test_another_resolution_or_base_makes_a_new_cache(build):
    other = StubBase()
    other.weights_hash = "1" * 64
    assert len({build().folder, build(data__resolution=64).folder, build(other).folder}) == 3


def test_nothing_else_makes_a_new_cache(folder, build, tmp_path):
    before = build().folder.name
    for changes in (
        {"train__lr": 1},
        {"data__batch_size": 1},
        {"data__count": 3},
        {"data__skip_bad": "true"},
        {"preview__prompts": '["a new prompt"]'},
        {"lora__rank": 2},
        {"base__dtype": "bf16"},
        {"data__workers": 0},
    ):
        assert build(**changes).folder.name == before, changes
    folder.rename(tmp_path / "moved")
    assert build(data__images=tmp_path / "moved").folder.name == before


def test_preview_prompts_are_known_without_being_samples(build):
    data = build(preview__prompts='["four", "a picture called a.png"]')
    assert data.encoding(["four", ""])["hidden"].flatten().tolist() == [4, 0]
    assert "four" not in data.captions


def test_a_cache_is_made_once(build):
    build()

    class NoEncoder(StubBase):
        encode_images = encode_prompts = None

    assert len(build(NoEncoder())) == 5


def test_a_lost_shard_is_made_again_to_the_bit(build, monkeypatch):
    small_files(monkeypatch)
    shards = sorted(build().folder.glob("latents-*"))
    hashes = [sha256(s) for s in shards]
    assert len(shards) == 3
    shards[1].unlink()
    build()
    assert [sha256(s) for s in shards] == hashes


def test_an_interrupted_caching_goes_on(build, monkeypatch, tmp_path):
    small_files(monkeypatch)
    whole = [sha256(s) for s in sorted(build(data__cache=tmp_path / "whole").folder.glob("*"))]

    def interrupt(what, done, total):
        if what == "pictures" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(progress=interrupt, data__batch_size=2)
    reports = []
    data = build(progress=lambda *report: reports.append(report), data__batch_size=2)
    prompts = [("prompts", done, 6) for done in (2, 4, 6)]
    assert reports == [("pictures", 4, 5), ("pictures", 5, 5), *prompts], "the first shard was there"
    assert [sha256(s) for s in sorted(data.folder.glob("*"))] == whole


def test_a_spread_is_drawn_afresh_at_each_visit(build):
    base = StubBase()
    base.spread = 0.5
    data, generator = build(base), torch.Generator().manual_seed(0)
    drawn = data.latents([0] * 4000, [generator] * 4000)
    mean = base.encode_images(torch.stack([torch.ones(SIDE, SIDE), *-torch.ones(2, SIDE, SIDE)])[None])[0][0]
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.std(0), torch.full_like(mean, 0.5), atol=0.03, rtol=0)


def test_an_autoencoders_own_mean_and_spread_are_cached(tiny_base, build, folder):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, **_four("Down"), **_four("Up")).eval()
    base = replace(tiny_base, vae=vae)
    data, generator = build(base), torch.Generator().manual_seed(0)
    with torch.no_grad():
        posterior = vae.encode(load_picture(folder / "a.png", SIDE)[0][None]).latent_dist
    scale, drawn = vae.config.scaling_factor, data.latents([0] * 2000, [generator] * 2000)
    torch.testing.assert_close(drawn.mean(0), scale * posterior.mean[0], atol=0.03, rtol=0.01)
    torch.testing.assert_close(drawn.std(0), scale * posterior.std[0], atol=0.01, rtol=0.08)


def _four(side):
    return {f"{side.lower()}_block_types": (f"{side}{'En' if side == 'Down' else 'De'}coderBlock2D",) * 4}


def test_the_teachers_latents_are_its_pictures(tiny_base, tmp_path):
    """Prompts alone: each latent is what sampling its prompt from its own noise gives, and carries no spread."""
    (tmp_path / "prompts.txt").write_text(
        "# a comment\na red star\n\na blue ring on a white background\n", encoding="utf-8"
    )
    config = small_config(tmp_path / "run", data__prompts=tmp_path / "prompts.txt", data__count=5)
    data = cache.build_cache(config, tiny_base, lambda *_: None)
    assert list(data.captions) == ["a red star", "a blue ring on a white background"] * 2 + ["a red star"]

    batch = [3, 4]
    noise = torch.stack([torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in batch])
    condition = tiny_base.encode_prompts([data.captions[i] for i in batch])
    ticks = PhaseGrid(points=1000, phases=1).plan(config.data.teacher_steps).ticks
    direct = generate(tiny_base, condition, tiny_base.encode_prompts([""]), noise, ticks, config.data.teacher_guidance)
    assert torch.equal(data.latents(batch, [None] * 2), direct.half().float())


@pytest.mark.parametrize("change", [{"data__teacher_steps": 5}, {"data__teacher_guidance": 2}, {"data__count": 5}])
def test_how_the_teacher_samples_is_in_the_fingerprint(tmp_path, change):
    contents = [
        cache._content(small_config(tmp_path, **changes), StubBase(), None, ["a", "b"]) for changes in ({}, change)
    ]
    assert contents[0] != contents[1]


def test_latents_that_are_not_finite_are_not_cached(tiny_base, tmp_path):
    class Broken:
        def __getattr__(self, name):
            return getattr(tiny_base, name)

        def denoise(self, x, tick, condition):
            return torch.full_like(x, float("nan"))

    config = small_config(tmp_path / "run")
    with pytest.raises(RuntimeError, match="teacher's latents for samples 0 to 2 are not finite. Set base.dtype=fp32"):
        cache.build_cache(config, Broken(), lambda *_: None)
    assert not list((tmp_path / "run").rglob("latents-*"))


def test_prompt_files(tmp_path):
    assert read_prompts(None) == read_prompts(str(PROMPTS))
    file = tmp_path / "mine.txt"
    with pytest.raises(ValueError, match="No prompt file at .*Set data.prompts"):
        read_prompts(str(file))
    file.write_bytes("\ufeff# only a comment\r\n\r\n".encode())
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(str(file))
    file.write_bytes(f"\ufeffone prompt{os.linesep} another, föreign ".encode())
    assert read_prompts(str(file)) == ["one prompt", "another, föreign"]


@pytest.mark.parametrize("resolution", [64, 128])
def test_an_unmarked_v_base_is_refused_before_its_latents_are_made(tmp_path, resolution):
    """Made under the wrong reading they would mean nothing, and neither reading would then fit them."""
    shutil.copytree(bundled_folder("tiny-sdxl"), tmp_path / "base")
    scheduler = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    plain = {k: v for k, v in json.loads(scheduler.read_text()).items() if k[:4] not in ("pred", "resc")}
    scheduler.write_text(json.dumps(plain))
    prompts = bundled_folder("tiny-sdxl") / "prompts.txt"
    changes = {"base__path": tmp_path / "base", "data__prompts": prompts, "data__resolution": resolution}
    config = small_config(tmp_path / "run", **changes)
    with pytest.raises(ValueError, match="predicts v_prediction, not epsilon.*Set base.prediction=v_prediction"):
        train(config)
    assert not list(config.run_folder.rglob("latents-*"))
