"""Picture files in and out: kinds in `SUFFIXES` as tensors in [0, 1], RGB with the transparency kept; grids; PNGs."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from io import SEEK_END, BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, features
from torch import Tensor

from ..samplers.writing import written_whole

# What picture files are called, and their kind in Pillow. A file of one of these kinds is read whatever it is called;
# other kinds start programs (EPS) or are of no use.
SUFFIXES = {
    ".png": "PNG",
    ".apng": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
    ".heic": "HEIF",
    ".heif": "HEIF",
    ".hif": "HEIF",
}
# What reads the kinds that not every Pillow does.
READERS = {"AVIF": "pip install 'pillow>=11.3'", "HEIF": "pip install pillow-heif"}
# A picture of more pixels is not read: a file of a few kilobytes can hold any number. Pillow's own limit is in the way
# of large scans, of which it warns.
MOST_PIXELS = 200_000_000
Image.MAX_IMAGE_PIXELS = MOST_PIXELS
# Texts in a PNG that may say how the picture is to be turned, and the most bytes of one that Pillow takes.
TURNING, MOST_TEXT = re.compile(rb"Raw profile type exif\0|XML:com\.adobe\.xmp\0"), 1 << 20
PNG, LONGEST_KEYWORD = b"\x89PNG\r\n\x1a\n", 80
LABEL_WIDTH, CAPTION_HEIGHT, GAP = 132, 44, 4  # of a grid, in pixels
COLUMNS = 8  # of a sheet


@cache
def readable_kinds() -> tuple[str, ...]:
    """The kinds in `SUFFIXES` that can be read here: HEIF where pillow-heif is installed, AVIF by newer Pillows."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    kinds = [kind for kind in dict.fromkeys(SUFFIXES.values()) if kind in Image.OPEN]
    return tuple(kind for kind in kinds if kind != "AVIF" or features.check("avif"))


@contextmanager
def open_picture(file: Path | BytesIO) -> Iterator[Image.Image]:
    """A picture file of a kind that is read here, open; not yet turned as its EXIF orientation says.

    Raises ValueError for one of more than `MOST_PIXELS`, and what Pillow raises.
    """
    try:
        with Image.open(_without_texts(file), formats=readable_kinds()) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(f"more than {MOST_PIXELS // 10**6} million pixels: make it smaller") from error


def _without_texts(file: Path | BytesIO) -> Path | BytesIO:
    """The file, or where it is a PNG with texts a copy without them.

    A workflow in a PNG's text may be longer than Pillow takes, and the pixels are good all the same.
    """
    with file.open("rb") if isinstance(file, Path) else BytesIO(file.getbuffer()) as png:
        if png.read(len(PNG)) != PNG:
            return file
        length = png.seek(0, SEEK_END)
        at, parts, start = len(PNG), [], 0
        while at + 8 <= length:
            png.seek(at)
            head = png.read(8 + LONGEST_KEYWORD)
            end = at + 12 + int.from_bytes(head[:4], "big")  # four bytes each: length, kind, and a check at the end
            if head[4:8] in (b"tEXt", b"zTXt", b"iTXt") and not (TURNING.match(head, 8) and end - at <= MOST_TEXT):
                parts.append((start, at))
                start = end
            at = end
        if not parts:
            return file

        copy = BytesIO()
        for begin, stop in [*parts, (start, length)]:
            png.seek(begin)
            copy.write(png.read(max(0, stop - begin)))
        copy.seek(0)
        return copy


class Pictures(NamedTuple):
    """Pictures of one size, from files.

    files: where they came from, or Pillow's own. pixels: (B, 3, H, W) in [0, 1], with a fourth channel where any has
    transparency. profiles: the ICC profile of each, or None.
    """

    files: list[Path | Image.Image]
    pixels: Tensor
    profiles: list[bytes | None]


def read_pictures(files: Sequence[Path | Image.Image]) -> Pictures:
    """Read picture files, or take Pillow's pictures, of one size, turned as their EXIF orientation says; an animated
    one's first frame.

    Raises FileNotFoundError for a missing one and ValueError for one that cannot be read, and for several sizes.
    """
    images = [_opened(file) for file in files]
    sizes = {image.size: file for file, image in zip(files, images, strict=True)}
    if len(sizes) > 1:
        named = ", ".join(f"{file} is {width}x{height}" for (width, height), file in sizes.items())
        raise ValueError(f"{named}: pictures that are edited together must be of one size. Edit them one by one.")
    alpha = any(_is_transparent(image) for image in images)
    pixels = torch.stack([_pixels(image, file, alpha) for file, image in zip(files, images, strict=True)])
    profiles = [image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P") else None for image in images]
    return Pictures(list(files), pixels, profiles)


def read_masks(files: Sequence[Path | Image.Image]) -> Tensor:
    """(B, 1, H, W) how light these pictures are, in [0, 1]; transparent parts are dark. Raises as `read_pictures`."""
    pixels = read_pictures(files).pixels
    opacity = pixels[:, 3:] if pixels.shape[1] == 4 else 1.0
    return pixels[:, :3].mean(1, keepdim=True) * opacity


def with_mask(pictures: Pictures, masks: Sequence[Path | Image.Image] | None) -> tuple[Tensor, Tensor]:
    """(pixels, mask (B, 1, H, W)) to inpaint: by mask files, or opaque pixels where these are transparent.

    Raises ValueError for pictures without transparent parts and without masks.
    """
    if masks:
        if len(masks) not in (1, len(pictures.files)):
            raise ValueError(
                f"{len(masks)} masks for {len(pictures.files)} pictures: give one mask, or one for each picture."
            )
        return pictures.pixels, read_masks(masks)

    pixels, alpha = pictures.pixels[:, :3], pictures.pixels[:, 3:]
    if not alpha.numel() or alpha.min() == 1:
        raise ValueError(
            f"{pictures.files[0]} has no transparent parts to draw in: give --mask, a picture of the same size that is "
            "white where to draw."
        )
    return pixels, 1 - alpha


def hole_notes(hole: Tensor) -> list[str]:
    """A sentence on each of the holes (B, 1, H, W) that is empty, or all of its picture."""
    notes = []
    for i, share in enumerate(hole.flatten(1).mean(1).tolist(), 1):
        which = f" of picture {i}" if len(hole) > 1 else ""
        if share == 0:
            notes.append(f"The mask{which} is empty: nothing is drawn, and the result is the picture itself.")
        if share == 1:
            notes.append(f"The mask{which} covers all of the picture: nothing of it is kept.")
    return notes


def write_pictures(pixels: Tensor, files: list[Path], profiles: Sequence[bytes | None] = ()) -> None:
    """Write (B, 3 or 4, H, W) in [0, 1] as these PNGs, with these ICC profiles, if any."""
    for picture, file, profile in zip_longest(pixels, files, profiles):
        image = to_image(picture)
        image.info["icc_profile"] = profile
        save_image(image, file)


def numbered(out: Path, number: int) -> list[Path]:
    """The names out_1.png, out_2.png, ... up to `number`; with more digits where there are 10 or more, so
    that they sort."""
    width = len(str(number))
    return [out.with_stem(f"{out.stem}_{i:0{width}d}") for i in range(1, number + 1)]


def sheet(frames: Tensor) -> Tensor:
    """Frames (B, 3, H, W) side by side in one picture (1, 3, h, w), eight in a row."""
    across = min(COLUMNS, len(frames))
    empty = frames.new_ones(-len(frames) % across, *frames.shape[1:])
    rows = torch.cat([frames, empty]).split(across)
    return torch.cat([torch.cat([*row], -1) for row in rows], -2)[None]


def _opened(file: Path | Image.Image) -> Image.Image:
    """A picture, upright. Raises as `read_pictures`."""
    if isinstance(file, Image.Image):
        return ImageOps.exif_transpose(file)
    if not file.is_file():
        raise FileNotFoundError(f"No file at {file}.")
    try:
        with open_picture(file) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a picture ({error}). Save it as PNG or JPEG.") from error


def _is_transparent(image: Image.Image) -> bool:
    return "transparency" in image.info or image.getbands()[-1] in ("A", "a")


def _pixels(image: Image.Image, file: Path | Image.Image, alpha: bool) -> Tensor:
    """(3, or with `alpha` 4, H, W) in [0, 1]; grey of 16 bits keeps them all."""
    if image.mode.startswith("I"):
        grey = torch.from_numpy(np.asarray(image).astype(np.float32))[None] / 65535
        if grey.min() < 0 or grey.max() > 1:
            raise ValueError(f"{file} has more than 16 bits a pixel. Save it as a PNG of 8 or 16 bits.")
        return torch.cat([grey.expand(3, -1, -1), torch.ones_like(grey)])[: 3 + alpha]
    if image.mode == "F":
        raise ValueError(f"{file} holds floating-point numbers. Save it as a PNG of 8 or 16 bits.")
    values = np.array(image.convert("RGBA" if alpha else "RGB"))
    return torch.from_numpy(values).permute(2, 0, 1).float() / 255


def draw_grid(rows: list[tuple[str, Tensor]], captions: list[str], cell: int | None = None) -> Image.Image:
    """A grid with a row for each (label, pixels (B, 3, H, W) in [0, 1]), and a column for each caption, drawn above.

    cell: side to draw the pictures at; default: their own, but at least 96 so that captions fit.
    """
    side = cell or max(96, rows[0][1].shape[-1])
    columns = len(captions)
    size = (LABEL_WIDTH + columns * (side + GAP), CAPTION_HEIGHT + len(rows) * (side + GAP))
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    font, small_font = ImageFont.load_default(12), ImageFont.load_default(10)

    letters = max(8, side // 6)
    for j, caption in enumerate(captions):
        lines = textwrap.wrap(caption, letters)
        text = "\n".join(lines[:3]) + ("…" if len(lines) > 3 else "")
        place = (LABEL_WIDTH + j * (side + GAP), 2)
        pen.multiline_text(place, text, fill="black", font=small_font, spacing=1)

    for i, (label, pixels) in enumerate(rows):
        top = CAPTION_HEIGHT + i * (side + GAP)
        pen.multiline_text((6, top + side // 2 - 14), label, fill="black", font=font)
        for j, picture in enumerate(pixels[:columns]):
            image = to_image(picture).resize((side, side), Image.Resampling.LANCZOS)
            grid.paste(image, (LABEL_WIDTH + j * (side + GAP), top))
    return grid


def to_image(pixels: Tensor) -> Image.Image:
    """The picture of pixels (3, or 4 with transparency, H, W) in [0, 1]."""
    return Image.fromarray(pixels.mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def check_png(out: Path) -> None:
    """Raise ValueError for a name that is no PNG's."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out is {str(out)!r}; write a name that ends in .png.")


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all, in the format that its name says, making its folder.

    Raises ValueError for a name of no format.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path} is no picture's name: end it in .png.")
    with written_whole(path) as part:
        image.save(part, kind)
