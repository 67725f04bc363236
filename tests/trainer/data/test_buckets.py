"""Aspect-ratio buckets: every picture in the one nearest its shape, cut in its middle, counted, and none dropped."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from phased_consistency.trainer.data import cache
from phased_consistency.trainer.data.buckets import Buckets, bucket_notes, buckets_for, standard_buckets
from phased_consistency.trainer.data.decoding import aspect_of, load_picture
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.objectives import PCM
from phased_consistency.trainer.training.batches import Batches, Split
from support.data_stubs import StubBase, drawn
from support.runs import small_config, speck

# Width and height of pictures, and the bucket of about 64 x 64 that each goes to.
SHAPES = {(64, 64): (64, 64), (200, 210): (64, 64), (96, 48): (88, 48), (48, 96): (48, 88), (300, 60): (88, 48)}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    for width, height in SHAPES:
        (root / f"{width}x{height}.png").write_bytes(drawn(width, height))
        (root / f"{width}x{height}.txt").write_text(f"{width} by {height}")
    return root


@pytest.fixture
def build(tmp_path, folder):
    def build(base=None, **changes):
        changes = {"data__images": folder, "data__resolution": 64, "data__buckets": "true", **changes}
        return cache.build_cache(small_config(tmp_path / "run", **changes), base or StubBase(), lambda *_: None)

    return build


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (64, 16), (64, 64)])
def test_standard_buckets_keep_to_the_area_and_the_range(resolution, step):
    sizes = standard_buckets(resolution, step).sizes
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert (height, width) in sizes and width % step == height % step == 0
        assert 0.5 <= width / height <= 2
        assert (
            abs(width * height / resolution**2 - 1) <= step / 2 / min(width, height) * max(width, height) / resolution
        )
    aspects = sorted(width / height for width, height in sizes)
    if resolution >= 8 * step:
        assert aspects[-1] > 1.6 and max(b / a for a, b in zip(aspects, aspects[1:], strict=False)) < 1.35, "no gaps"


def test_the_usual_sizes_of_sdxl_are_among_them():
    tall = {(1024, 1024), (896, 1152), (832, 1216), (768, 1344)}
    assert tall | {(height, width) for width, height in tall} <= set(standard_buckets(1024, 64).sizes)


def test_steps_fit_the_network_and_the_resolution():
    class Base:
        def latent_shape(self, side):
            if side % 32:
                raise ValueError("no")

    assert buckets_for(True, 64, Base().latent_shape) == standard_buckets(64, 32)
    assert buckets_for(True, 1024, Base().latent_shape) == standard_buckets(1024, 64)


def test_a_picture_goes_to_the_bucket_of_nearest_aspect_ratio():
    buckets = Buckets(((512, 512), (1024, 1024), (768, 512), (512, 768)))
    assert buckets.nearest(300, 300) == (1024, 1024), "of two squares the larger"
    edge = math.sqrt(1.5)
    assert buckets.nearest(1000 * (edge - 0.01), 1000) == (1024, 1024)
    assert buckets.nearest(1000 * (edge + 0.01), 1000) == (768, 512)
    assert buckets.nearest(1, 100) == (512, 768)


def test_every_picture_is_kept_and_counted(build):
    data = build()
    assert len(data) == len(SHAPES) and data.skipped == []
    sizes = {tuple(map(int, data.captions[i].split(" by "))): data.sizes([i])[0] for i in range(len(data))}
    for shape, bucket in SHAPES.items():
        assert sizes[shape].tolist()[:2] == [*shape[::-1]] and sizes[shape].tolist()[4:] == [*bucket[::-1]]
    assert data.notes == [
        "Buckets: 48x88: 1, 64x64: 2, 88x48: 2",
        "1 picture is wider than 2:1 or taller than 1:2, cropped to the nearest bucket, which cuts off 63% to 63% "
        "of each",
    ]


def test_pictures_smaller_than_their_bucket_are_counted(folder, build):
    (folder / "small.png").write_bytes(drawn(20, 20))
    (folder / "small.txt").write_text("small")
    assert build().notes[-1] == "1 picture is smaller than the bucket and enlarged, 3.2 times at most"


def test_what_is_lost_is_what_the_crop_cuts_off():
    sizes = np.array([[100, 400, 0, 0, 64, 128]])  # 4:1 to 2:1: half
    assert "cuts off 50% to 50% of each" in bucket_notes(sizes)[1]


def test_latents_of_a_bucket_are_those_of_its_pictures(folder, build):
    data = build()
    assert sorted(np.concatenate(data.buckets).tolist()) == list(range(len(SHAPES)))
    assert sorted(len(bucket) for bucket in data.buckets) == [1, 2, 2]
    frames = Buckets(tuple(set(SHAPES.values())))
    for bucket in data.buckets:
        latents = data.latents(bucket, [None] * len(bucket))
        for number, latent in zip(bucket, latents, strict=True):
            width, height = map(int, data.captions[number].split(" by "))
            pixels, _ = load_picture(folder / f"{width}x{height}.png", frames)
            torch.testing.assert_close(latent, StubBase().encode_images(pixels[None])[0][0], atol=1e-3, rtol=1e-3)


def test_a_picture_is_resized_to_cover_its_bucket_and_cut_in_its_middle(tmp_path):
    picture = Image.new("RGB", (120, 30), "black")
    picture.paste("white", (30, 0, 90, 30))
    picture.save(tmp_path / "wide.png")
    pixels, sizes = load_picture(tmp_path / "wide.png", Buckets(((40, 20), (20, 40))))
    assert pixels.shape == (3, 20, 40) and pixels[..., 2:-2].min() > 0.9
    assert sizes.tolist() == [30, 120, 0, 20, 20, 40]


def test_a_single_square_bucket_changes_no_picture(tmp_path):
    for name, size in {"a": (90, 31), "b": (31, 90), "c": (64, 64)}.items():
        (tmp_path / f"{name}.png").write_bytes(drawn(*size, noise=1))
        one, other = (load_picture(tmp_path / f"{name}.png", s) for s in (32, Buckets(((32, 32),))))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_aspect_ratio_is_of_the_picture_held_upright(tmp_path):
    photo = Image.new("RGB", (40, 20))
    exif = photo.getexif()
    for turn, aspect in ((1, 2), (3, 2), (6, 0.5), (8, 0.5)):
        exif[0x0112] = turn
        photo.save(tmp_path / "photo.jpg", exif=exif)
        height, width = load_picture(tmp_path / "photo.jpg", 8)[1][:2].tolist()
        assert aspect_of(tmp_path / "photo.jpg") == width / height == aspect
    (tmp_path / "photo.jpg").write_text("no picture")
    assert aspect_of(tmp_path / "photo.jpg") is None


def test_a_listed_bucket_that_no_picture_fits_is_named(folder, build, tmp_path):
    with pytest.raises(ValueError, match=r"lists 56x120 \(aspect ratio 0.467\).*: 0.500, 0.952, 1.000.\nTake it off"):
        build(data__buckets='["64x64", "64x128", "56x120"]')
    assert not list(tmp_path.rglob("latents-*")), "a folder's pictures are looked at first"
    data = build(data__buckets='["64x64", "128x64"]')
    assert data.notes[0] == "Buckets: 64x64: 3, 128x64: 2"


@pytest.mark.parametrize(
    ("buckets", "problem"),
    [
        ('["60x64"]', "data.buckets lists 60x64: side 60 is not a multiple of 8: use 56 or 64"),
        ('["64:64"]', "data.buckets"),
        ("[]", "data.buckets is an empty list"),
    ],
)
def test_buckets_that_are_none(build, buckets, problem):
    with pytest.raises(ValueError, match=problem):
        build(data__buckets=buckets)


@pytest.mark.parametrize("images", [None, "digits"])
def test_what_is_square_takes_no_buckets(tmp_path, images):
    with pytest.raises(ValueError, match="data.buckets is for pictures in data.images or data.shards"):
        small_config(tmp_path, data__images=images, data__buckets="true")


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_every_family_takes_batches_of_every_shape(family, folder, build):
    base = load_base(speck(family).name)
    data = build(base, data__resolution=128)
    assert len(data.buckets) > 1
    empty = data.encoding([""])
    batches = Batches(data, base, PCM(), empty, split=Split(2), updates=10, seed=0)
    shapes = set()
    for number in range(12):
        _, batch = batches.at(number)
        with torch.no_grad():
            output = base.denoise(batch.x0, batch.levels.u, batch.condition)
        assert output.shape == batch.x0.shape and output.isfinite().all()
        shapes.add(tuple(batch.x0.shape[2:]))
    assert len(shapes) > 1
