"""Folders of pictures: files, captions beside them or in a metadata.jsonl, and a picture as the network sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...samplers.texts import brief
from ..pictures import FORMATS
from .buckets import Buckets
from .reading import stop_or_skip

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"
# EXIF's tag for how a picture is to be turned; from the value 5 on it is turned by a quarter.
ORIENTATION, QUARTER = 0x0112, 5


@dataclass(frozen=True)
class Picture:
    """A picture file and its caption."""

    path: Path
    caption: str

    @property
    def name(self) -> str:
        return self.path.name

    def load(self, size: int | Buckets) -> tuple[Tensor, Tensor]:
        """The picture as `load_picture` gives it."""
        return load_picture(self.path, size)


def find_pictures(folder: str, skip_bad: bool) -> tuple[list[Picture], list[str]]:
    """Pictures below a folder with their captions, and the skipped ones with the reason.

    A caption is in a text file of the picture's name, or in a metadata.jsonl of the picture's folder or one
    above it: {"file_name": ..., "text": ...} a line, as in Hugging Face's image folders. Raises ValueError
    for a missing or empty folder, and for missing, empty or double captions unless `skip_bad`.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"No folder at {folder}. Set data.images to a folder of pictures with .txt captions.")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURES)}).")
    captions, bad = _read_metadata(root, set(files))
    pictures = []
    for file in files:
        caption, problem = _caption(file, captions.get(file))
        if caption:
            pictures.append(Picture(file, caption))
        else:
            bad.append(f"{file.relative_to(root)}: {problem}")
    stop_or_skip(bad, skip_bad, f"of the {len(files)} pictures in {folder} lack a good caption")
    if not pictures:
        raise ValueError(
            f"None of the {len(files)} pictures in {folder} has a caption (same name, .txt; or a line in {METADATA})."
        )
    return pictures, bad


def _caption(file: Path, line: str | None) -> tuple[str, str]:
    """A picture's caption, "" where it has no good one, and what is wrong then; line: its text in a metadata.jsonl."""
    text = file.with_suffix(".txt")
    if line is not None:
        if text.is_file():
            return "", f"captions in both {text.name} and {METADATA}"
        return line.strip(), f"empty caption in {METADATA}"
    try:
        caption = text.read_text(encoding="utf-8-sig").strip()
    except OSError:
        return "", f"no caption {text.name}"
    except UnicodeDecodeError:
        return "", f"not UTF-8: {text.name}"
    return (caption, f"empty caption {text.name}") if is_text(caption) else ("", f"not UTF-8: {text.name}")


def is_text(caption: str) -> bool:
    """Whether this can be a caption: UTF-16 read as UTF-8 has zeros, and JSON may hold halves of characters."""
    return "\0" not in caption and not any("\ud800" <= c <= "\udfff" for c in caption)


def _read_metadata(root: Path, files: set[Path]) -> tuple[dict[Path, str], list[str]]:
    """Captions by picture from every metadata.jsonl below a folder, and the lines that are none, with the reason."""
    captions: dict[Path, str] = {}
    bad = []
    for path in sorted(root.rglob(METADATA)):
        for number, name, text in _lines(path):
            where = f"{path.relative_to(root)} line {number}"
            if not (isinstance(name, str) and isinstance(text, str) and is_text(name + text)):
                bad.append(f'{where}: not {{"file_name": "...", "text": "..."}}')
            elif (file := path.parent / name) not in files:
                bad.append(f"{where}: no picture {name}")
            elif file in captions:
                bad.append(f"{where}: another caption of {name}")
            else:
                captions[file] = text
    return captions, bad


def _lines(path: Path) -> Iterator[tuple[int, object, object]]:
    """(line number, file_name, text) of a metadata.jsonl; None for what a line lacks."""
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    entry = None
                entry = entry if isinstance(entry, dict) else {}
                yield number, entry.get("file_name"), entry.get("text")


def load_picture(file: Path | BytesIO, size: int | Buckets) -> tuple[Tensor, Tensor]:
    """(pixels, sizes) of a picture, upright, resized to cover its frame (Lanczos), cropped at the centre, on white.

    size: the frame's side, for a square, or the buckets of which the one of nearest aspect ratio is the
    frame. pixels: (3, H, W) in [-1, 1]. sizes: (6,) original height and width, top and left of the crop (in
    the resized picture), height and width of the result: SDXL's micro-conditioning (arXiv 2307.01952, Sec.
    2.2). Raises ValueError when it cannot be read.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            image = _in_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # each of Pillow's decoders fails in its own way
        raise ValueError(f"cannot be read ({brief(error)})") from error

    width, height = image.size
    frame = size.nearest(width, height) if isinstance(size, Buckets) else (size, size)
    scale = max(to / side for to, side in zip(frame, image.size, strict=True))
    covering = [max(to, round(side * scale)) for to, side in zip(frame, image.size, strict=True)]
    left, top = ((side - to) // 2 for side, to in zip(covering, frame, strict=True))

    # only what stays is resized: a line of pixels that covers the frame would be of any length
    across, down = width / covering[0], height / covering[1]
    box = left * across, top * down, min(width, (left + frame[0]) * across), min(height, (top + frame[1]) * down)
    image = image.resize(frame, Image.Resampling.LANCZOS, box)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float().div(127.5).sub(1)
    return pixels, torch.tensor([height, width, top, left, frame[1], frame[0]])


def _in_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, on white where it is transparent. Grey of 16 bits keeps its upper 8, as Pillow does
    it with coloured pictures."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode not in ("RGBA", "LA", "P"):
        return image.convert("RGB")
    white = Image.new("RGB", image.size, "white")
    image = image.convert("RGBA")
    white.paste(image, mask=image)
    return white


def aspect_of(path: Path) -> float | None:
    """Width over height of a picture held upright, from the file's header; None where that cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION, 1) >= QUARTER
        return height / width if turned else width / height
    except Exception:  # as in load_picture, which says so
        return None
