"""Picture files in and out: the kinds in `KINDS`, as RGB in [0, 1] with the transparency kept; PNGs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .data.folders import FORMATS
from .previews import save_image, to_image

COLUMNS = 8  # of a sheet
KINDS = (*FORMATS, "GIF", "TIFF")  # others start programs (EPS) or are of no use


class Pictures(NamedTuple):
    """files: where they came from. pixels: (B, 3, H, W) in [0, 1], with a fourth channel where any has transparency.
    profiles: the ICC profile of each, or None.
    """

    files: list[Path]
    pixels: Tensor
    profiles: list[bytes | None]


def read_pictures(files: list[Path]) -> Pictures:
    """Picture files of one size, turned as their EXIF orientation says; of an animated one the first frame.

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


def read_masks(files: list[Path]) -> Tensor:
    """(B, 1, H, W) in [0, 1] how light these pictures are; transparent parts are dark. Raises as `read_pictures`."""
    pixels = read_pictures(files).pixels
    opacity = pixels[:, 3:] if pixels.shape[1] == 4 else 1.0
    return pixels[:, :3].mean(1, keepdim=True) * opacity


def with_mask(pictures: Pictures, masks: list[Path] | None) -> tuple[Tensor, Tensor]:
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
    """What to say of holes (B, 1, H, W) that are empty, or all of the picture."""
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
    """out_1.png, out_2.png, ...; with more digits from 10 on, so that names sort."""
    width = len(str(number))
    return [out.with_stem(f"{out.stem}_{i:0{width}d}") for i in range(1, number + 1)]


def sheet(frames: Tensor) -> Tensor:
    """Frames (B, 3, H, W) side by side in one picture (1, 3, h, w), eight in a row."""
    across = min(COLUMNS, len(frames))
    empty = frames.new_ones(-len(frames) % across, *frames.shape[1:])
    rows = torch.cat([frames, empty]).split(across)
    return torch.cat([torch.cat([*row], -1) for row in rows], -2)[None]


def _opened(file: Path) -> Image.Image:
    if not file.is_file():
        raise FileNotFoundError(f"No file at {file}.")
    try:
        with Image.open(file, formats=KINDS) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as a picture ({error}). Save it as PNG or JPEG.") from error


def _is_transparent(image: Image.Image) -> bool:
    return "transparency" in image.info or image.getbands()[-1] in ("A", "a")


def _pixels(image: Image.Image, file: Path, alpha: bool) -> Tensor:
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
