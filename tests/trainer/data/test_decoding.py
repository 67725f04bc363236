"""A picture as the network sees it: of every kind, in sRGB, on white, upright, with whatever else its file holds."""

import itertools
import re
import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, features

from phased_consistency.trainer import pictures
from phased_consistency.trainer.data import decoding
from phased_consistency.trainer.data.buckets import Buckets
from phased_consistency.trainer.data.decoding import aspect_of, has_strange_profile, load_picture
from phased_consistency.trainer.pictures import MOST_PIXELS, open_picture

SIDE = 8
# Chromaticities of Display P3, white D65, adapted to D50 as in a profile: the columns of its matrix to XYZ.
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))


def colour(file) -> list[int]:
    """The mean colour of a picture, 0 to 255."""
    return load_picture(file, SIDE)[0].mean((1, 2)).add(1).mul(127.5).round().int().tolist()


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of these tags."""
    at, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, tag in tags.items():
        tag += bytes(-len(tag) % 4)
        table += name + struct.pack(">II", at + len(data), len(tag))
        data += tag
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(">I4sI4s4s4s", 128 + len(body), b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">iii", *(round(v * 65536) for v in (0.9642, 1, 0.8249)))
    return head.ljust(128, b"\0") + body


def xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(v * 65536) for v in values))


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


WHITE = {b"wtpt": xyz((0.9642, 1, 0.8249))}
PROFILE = {
    "P3": profile(
        b"RGB ",
        WHITE
        | {
            n + e: t
            for n, v in zip((b"r", b"g", b"b"), P3, strict=True)
            for e, t in ((b"XYZ", xyz(v)), (b"TRC", gamma(2.2)))
        },
    ),
    "grey": profile(b"GRAY", WHITE | {b"kTRC": gamma(1.0)}),
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colours_of_a_wider_profile_are_converted(tmp_path, kind):
    image = Image.new("RGB", (16, 16), (200, 60, 40))
    image.save(tmp_path / "p3", kind, icc_profile=PROFILE["P3"], quality=100)
    assert np.abs(np.subtract(colour(tmp_path / "p3"), (219, 37, 13))).max() <= 6
    image.save(tmp_path / "plain", kind, quality=100)
    assert np.abs(np.subtract(colour(tmp_path / "plain"), (200, 60, 40))).max() <= 2


def test_a_profile_of_srgb_changes_nothing(tmp_path):
    noise = Image.effect_noise((SIDE, SIDE), 99).convert("RGB")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in (("plain", None), ("srgb", srgb)):
        noise.save(tmp_path / f"{name}.png", icc_profile=profile)
    plain, converted = (load_picture(tmp_path / f"{name}.png", SIDE)[0] for name in ("plain", "srgb"))
    assert (plain - converted).abs().max() <= 1 / 127.5 + 1e-6


def test_a_profile_of_grey(tmp_path):
    """Linear: half of the light is 188 in sRGB."""
    Image.new("L", (16, 16), 128).save(tmp_path / "a.png", icc_profile=PROFILE["grey"])
    assert np.abs(np.subtract(colour(tmp_path / "a.png"), 188)).max() <= 1
    Image.fromarray(np.full((16, 16), 128 << 8, np.uint16)).save(tmp_path / "deep.png", icc_profile=PROFILE["grey"])
    assert np.abs(np.subtract(colour(tmp_path / "deep.png"), 188)).max() <= 1
    grey = Image.new("LA", (16, 16), (128, 255))
    grey.save(tmp_path / "clear.png", icc_profile=PROFILE["grey"])
    assert np.abs(np.subtract(colour(tmp_path / "clear.png"), 188)).max() <= 1


@pytest.mark.parametrize(
    ("mode", "profile"), [("L", PROFILE["P3"]), ("RGB", PROFILE["grey"]), ("RGB", b"broken"), ("CMYK", PROFILE["P3"])]
)
def test_a_profile_that_does_not_fit_does_no_harm(tmp_path, mode, profile):
    value = 0 if mode == "CMYK" else 255
    Image.new(mode, (16, 16), (value,) * len(mode)).save(tmp_path / "a.tif", icc_profile=profile)
    assert colour(tmp_path / "a.tif") == [255] * 3


KINDS = {"PNG": 0, "JPEG": 3, "WEBP": 3, "BMP": 0, "GIF": 2, "TIFF": 0, "AVIF": 4, "HEIF": 4}


@pytest.mark.parametrize(("kind", "error"), KINDS.items())
def test_every_kind_is_read(tmp_path, kind, error):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    elif kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    assert kind in pictures.readable_kinds()
    Image.new("RGB", (64, 64), (200, 60, 40)).save(tmp_path / "a", kind)
    assert np.abs(np.subtract(colour(tmp_path / "a"), (200, 60, 40))).max() <= error


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames_counts(tmp_path, kind):
    frames = [Image.new("RGB", (16, 16), name) for name in ("red", "blue")]
    frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:])
    assert np.abs(np.subtract(colour(tmp_path / "a"), (255, 0, 0))).max() <= 3


def clear(mode: str) -> tuple[Image.Image, dict]:
    """A black picture of this mode whose left half is transparent, and how it is saved so."""
    if mode == "P":
        image = Image.new("P", (16, 16), 0)
        image.putpalette([9, 9, 9, 0, 0, 0])
        image.paste(1, (8, 0, 16, 16))
        return image, {"transparency": 0}
    if mode in ("L", "RGB", "I;16"):
        image = (
            Image.fromarray(np.full((16, 16), 9 << 8, np.uint16))
            if mode == "I;16"
            else Image.new(mode, (16, 16), (9,) * len(mode))
        )
        image.paste(0, (8, 0, 16, 16))
        return image, {"transparency": {"L": 9, "RGB": (9, 9, 9), "I;16": 9 << 8}[mode]}
    image = Image.new(mode, (16, 16), (0,) * (len(mode) - 1) + (255,))
    image.paste((0,) * len(mode), (0, 0, 8, 16))
    return image, {}


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "I;16", "LA", "RGBA"])
def test_what_is_transparent_is_white(tmp_path, mode):
    image, options = clear(mode)
    image.save(tmp_path / "a.png", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = load_picture(tmp_path / "a.png", 16)[0]
    assert pixels[..., :8].min() == 1 and pixels[..., 8:].max() == -1


def test_a_palette_with_half_transparent_colours(tmp_path):
    image = Image.new("P", (16, 16), 0)
    image.putpalette([0, 0, 0])
    image.save(tmp_path / "a.png", transparency=bytes([128]))
    assert colour(tmp_path / "a.png") == [127] * 3


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(picture: bytes, *chunks: bytes, last: bool = False) -> bytes:
    """A PNG with these chunks after its header, or before its end."""
    at = len(picture) - 12 if last else 33
    return picture[:at] + b"".join(chunks) + picture[at:]


LONG = b"x" * (PngImagePlugin.MAX_TEXT_CHUNK + 10)
TEXTS = {
    "zTXt": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG)),
    "iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(LONG)),
    "tEXt": chunk(b"tEXt", b"workflow\0" + LONG),
    "broken": chunk(b"zTXt", b"workflow\0\0no zlib"),
}


def saved(image: Image.Image, **options) -> bytes:
    file = BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize(("text", "last"), [*itertools.product(TEXTS, (False, True))])
def test_texts_in_a_png_do_not_hide_its_pixels(tmp_path, text, last):
    picture = saved(Image.effect_noise((16, 16), 99))
    data = with_chunks(picture, *[TEXTS[text]] * 70, last=last)
    (tmp_path / "a.png").write_bytes(data)
    expected = load_picture(BytesIO(picture), 16)[0]
    assert torch.equal(load_picture(tmp_path / "a.png", 16)[0], expected)
    assert torch.equal(load_picture(BytesIO(data), 16)[0], expected) and aspect_of(tmp_path / "a.png") == 1


def test_a_png_with_texts_that_is_cut_short_is_still_told(tmp_path):
    data = with_chunks(saved(Image.effect_noise((64, 64), 99)), TEXTS["zTXt"])
    (tmp_path / "a.png").write_bytes(data[:-1500])
    with pytest.raises(ValueError, match="cannot be read .*truncated"):
        load_picture(tmp_path / "a.png", 16)


@pytest.mark.parametrize("texts", [b"", TEXTS["zTXt"]], ids=["alone", "beside a text"])
def test_what_a_text_says_of_turning_is_kept(tmp_path, texts):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    data = saved(Image.linear_gradient("L"))
    turning = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    pixels = load_picture(BytesIO(with_chunks(data, turning, texts)), 16)[0]
    assert torch.allclose(pixels, load_picture(BytesIO(data), 16)[0].flip(1, 2), atol=0.02)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_turned_kind_is_upright(tmp_path, kind):
    photo = Image.new("RGB", (64, 32), "black")
    photo.paste("white", (0, 0, 32, 32))  # shown turned by a quarter to the right: the upper half
    exif = photo.getexif()
    exif[ExifTags.Base.Orientation] = 6
    photo.save(tmp_path / "a", kind, exif=exif, quality=100)
    pixels, sizes = load_picture(tmp_path / "a", Buckets(((16, 32), (32, 16))))
    assert pixels.shape == (3, 32, 16) and sizes[:2].tolist() == [64, 32] and aspect_of(tmp_path / "a") == 0.5
    assert pixels[:, :14].min() > 0.9 and pixels[:, 18:].max() < -0.9


def test_a_scan_of_100_megapixels_is_read_without_a_warning(tmp_path):
    Image.new("1", (10_000, 10_000), 1).save(tmp_path / "scan.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels, sizes = load_picture(tmp_path / "scan.png", SIDE)
        assert aspect_of(tmp_path / "scan.png") == 1
    assert pixels.min() == 1 and sizes[:2].tolist() == [10_000, 10_000]


@pytest.mark.parametrize("factor", [1, 3])
def test_more_pixels_than_the_limit_are_refused_unread(tmp_path, factor):
    """Some kilobytes that claim any number of pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000 * factor, 10_001, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    assert MOST_PIXELS == 200_000_000
    with pytest.raises(ValueError, match="more than 200 million pixels: make it smaller"):
        load_picture(tmp_path / "bomb.png", SIDE)


def test_numbers_that_are_no_colours_are_named(tmp_path):
    Image.new("F", (16, 16), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="floating-point numbers: save it with 8 or 16 bits"):
        load_picture(tmp_path / "a.tif", SIDE)
    Image.new("I", (16, 16), 1 << 20).save(tmp_path / "b.tif")
    with pytest.raises(ValueError, match="more than 16 bits"):
        load_picture(tmp_path / "b.tif", SIDE)


def test_a_kind_that_no_picture_has_is_not_opened(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", "TGA")
    with pytest.raises(OSError, match="cannot identify"), open_picture(tmp_path / "a.png"):
        pass


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n",
            "it is a git-lfs pointer, and no picture",
        ),
        (b"<!DOCTYPE html><html>Not found", "it is a web page, such as a site's for signing in, and no picture"),
        (b'{"error": "Unauthorized"}', "it is JSON, such as a server's message of an error, and no picture"),
        (b"GIF8", "no picture of a known kind"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "its kind, HEIF, is read after pip install pillow-heif"),
    ],
)
def test_what_stands_in_a_pictures_place_is_called_what_it_is(tmp_path, monkeypatch, content, words):
    kinds = tuple(kind for kind in pictures.readable_kinds() if kind != "HEIF")
    monkeypatch.setattr(pictures, "readable_kinds", lambda: kinds)
    monkeypatch.setattr(decoding, "readable_kinds", lambda: kinds)
    (tmp_path / "a.jpg").write_bytes(content)
    for file in (tmp_path / "a.jpg", BytesIO(content)):
        with pytest.raises(ValueError, match=re.escape(f"cannot be read ({words})")):
            load_picture(file, SIDE)


@pytest.mark.parametrize(
    ("mode", "profile", "strange"),
    [
        ("RGB", PROFILE["P3"], False),
        ("RGB", None, False),
        ("L", PROFILE["grey"], False),
        ("LA", PROFILE["grey"], False),
        ("P", PROFILE["P3"], False),
        ("RGB", b"broken", True),
        ("RGB", PROFILE["grey"], True),
        ("CMYK", PROFILE["P3"], True),
        ("RGB", PROFILE["P3"][:140], True),
    ],
)
def test_profiles_that_count_for_nothing_are_seen(tmp_path, mode, profile, strange):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    Image.new(mode, (8, 8)).save(tmp_path / "a", kind, icc_profile=profile)
    assert has_strange_profile(tmp_path / "a") is strange
    (tmp_path / "none").write_bytes(b"no picture")
    assert not has_strange_profile(tmp_path / "none")
