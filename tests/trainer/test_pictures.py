"""Pictures through files: every kind comes back as it was, and names and sheets are in order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from phased_consistency.trainer.pictures import numbered, read_masks, read_pictures, sheet, write_pictures
from phased_consistency.trainer.tiny.scenes import draw, held_out_scenes

SCENE = held_out_scenes(1, set())[0]


def test_a_sheet_has_eight_in_a_row():
    frames = torch.arange(10.0).view(10, 1, 1, 1).expand(-1, 3, 4, 5) / 10
    one = sheet(frames)
    assert one.shape == (1, 3, 8, 40)
    assert one[0, 0, 4:, 5:10].eq(0.9).all() and one[0, 0, 4:, 10:].eq(1).all()
    assert sheet(frames[:3]).shape == (1, 3, 4, 15)


def test_names_sort():
    assert [p.name for p in numbered(Path("a.b.png"), 10)][::9] == ["a.b_01.png", "a.b_10.png"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "P with a clear colour", "RGB", "RGBA", "CMYK"])
def test_kinds_of_pictures_come_back_as_they_were(tmp_path, mode):
    picture = draw(SCENE, 20).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize((20, 20)))
    name, suffix = mode.split()[0], "tif" if mode == "CMYK" else "png"
    image = picture.convert("RGB").convert(name) if name in ("1", "L", "P", "RGB", "CMYK") else picture.convert(name)
    more = {"transparency": 3} if "clear" in mode else {}
    image.save(tmp_path / f"in.{suffix}", **more)
    expected = Image.open(tmp_path / f"in.{suffix}").convert("RGBA" if "A" in name or more else "RGB")
    read = read_pictures([tmp_path / f"in.{suffix}"])
    write_pictures(read.pixels, [tmp_path / "out.png"], read.profiles)
    written = Image.open(tmp_path / "out.png")
    assert written.mode == expected.mode and written.tobytes() == expected.tobytes()


def test_sixteen_bits_are_read_whole(tmp_path):
    levels = np.array([[0, 1, 257], [40000, 65534, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    read = read_pictures([tmp_path / "deep.png"]).pixels
    assert read.shape == (1, 3, 2, 3) and (read[0, 2] * 65535).round().int().tolist() == levels.tolist()


def test_orientation_and_profile_are_honoured(tmp_path):
    picture = draw(SCENE, 32).crop((0, 0, 32, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it by 90 degrees clockwise
    picture.save(tmp_path / "turned.png", exif=exif, icc_profile=b"a profile")
    read = read_pictures([tmp_path / "turned.png"])
    write_pictures(read.pixels, [tmp_path / "out.png"], read.profiles)
    with Image.open(tmp_path / "out.png") as out:
        assert out.size == (20, 32) and out.info["icc_profile"] == b"a profile" and not out.getexif()
        assert out.tobytes() == picture.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_clear_parts_of_a_mask_are_black(tmp_path):
    paint = Image.new("RGBA", (4, 1), (255, 255, 255, 0))
    paint.putpixel((1, 0), (255, 255, 255, 255))
    paint.putpixel((2, 0), (0, 0, 0, 255))
    paint.putpixel((3, 0), (255, 255, 255, 51))
    paint.save(tmp_path / "paint.png")
    mask = read_masks([tmp_path / "paint.png"])
    assert mask.flatten().tolist() == pytest.approx([0, 1, 0, 0.2])
