"""A picture as the network sees it: upright, in sRGB, on white, resized and cut to its frame."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from io import BytesIO
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from ...samplers.file_kinds import HEAD, PICTURE, known_kind
from ...samplers.texts import brief
from ..pictures import READERS, open_picture, readable_kinds
from .buckets import Buckets

# EXIF's tag for how a picture is to be turned; from the value 5 on it is turned by a quarter.
ORIENTATION, QUARTER = 0x0112, 5
# Of pictures with more pixels one is unpacked at a time: all threads' together would fill the memory.
LARGE = 30_000_000
_ONE_LARGE = Lock()
# A profile's colour space -> Pillow's mode.
SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
GREY = ("1", "L", "LA", "La")
WHITE = 65535  # of 16 bits
# How a file of one of these kinds names its own, from its ninth byte on.
BRANDS = dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), "HEIF") | {b"avif": "AVIF", b"avis": "AVIF"}


def load_picture(file: Path | BytesIO, size: int | Buckets) -> tuple[Tensor, Tensor]:
    """(pixels, sizes) of a picture, upright, resized to cover its frame (Lanczos), cropped at the centre, on white.

    size: the frame's side, for a square, or the buckets of which the one of nearest aspect ratio is the
    frame. pixels: (3, H, W) in [-1, 1], sRGB. sizes: (6,) original height and width, top and left of the crop (in
    the resized picture), height and width of the result: SDXL's micro-conditioning (arXiv 2307.01952, Sec.
    2.2). Raises ValueError when it cannot be read.
    """
    try:
        with open_picture(file) as image:
            large = image.width * image.height > LARGE
            with _ONE_LARGE if large else nullcontext():
                return _framed(_in_colours(_upright(image)), size)
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot be read ({_what_it_is(file)})") from error
    except Exception as error:  # each of Pillow's decoders fails in its own way
        words = (isinstance(error, OSError) and error.strerror) or brief(error)
        raise ValueError(f"cannot be read ({words})") from error


def _what_it_is(file: Path | BytesIO) -> str:
    """What a file is that Pillow takes for no picture: what a download left in its place, or a kind not read here."""
    with file.open("rb") if isinstance(file, Path) else BytesIO(file.getbuffer()) as stream:
        head = stream.read(HEAD)
    if not head:
        return "it is empty"
    kind = BRANDS.get(head[8:12]) if head[4:8] == b"ftyp" else None
    if kind and kind not in readable_kinds():
        return f"its kind, {kind}, is read after {READERS[kind]}"
    known = known_kind(head)
    return f"it is {known[0]}, and no picture" if known and known[0] != PICTURE else "no picture of a known kind"


def has_strange_profile(file: Path | BytesIO) -> bool:
    """Whether a picture's colour profile counts for nothing, as it is damaged or of other colours than the picture."""
    try:
        with open_picture(file) as image:
            return bool(image.info.get("icc_profile")) and _profile_of(image) is None
    except Exception:  # as in load_picture, which says so
        return False


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; itself, not a copy."""
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _framed(image: Image.Image, size: int | Buckets) -> tuple[Tensor, Tensor]:
    """(pixels, sizes) of a picture in RGB or grey, as `load_picture` says."""
    width, height = image.size
    frame = size.nearest(width, height) if isinstance(size, Buckets) else (size, size)
    scale = max(to / side for to, side in zip(frame, image.size, strict=True))
    covering = [max(to, round(side * scale)) for to, side in zip(frame, image.size, strict=True)]
    left, top = ((side - to) // 2 for side, to in zip(covering, frame, strict=True))

    # only what stays is resized: a line of pixels that covers the frame would be of any length
    across, down = width / covering[0], height / covering[1]
    box = left * across, top * down, min(width, (left + frame[0]) * across), min(height, (top + frame[1]) * down)
    image = image.resize(frame, Image.Resampling.LANCZOS, box).convert("RGB")
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float().div(127.5).sub(1)
    return pixels, torch.tensor([height, width, top, left, frame[1], frame[0]])


def _in_colours(image: Image.Image) -> Image.Image:
    """The picture in sRGB, or in grey, on white where it is transparent.

    Raises ValueError for numbers that are no colours: of floating point, or of more than 16 bits.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _in_8_bits(image)
    if not image.has_transparency_data:
        return _in_srgb(image)

    clear = image.convert("RGBA")
    colours = image.convert("L") if image.mode in GREY else clear
    white = Image.new("RGB", image.size, "white")
    white.paste(_in_srgb(colours), mask=clear.getchannel("A"))
    return white


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits with its upper 8, as Pillow does it with coloured pictures, and white where it is transparent."""
    grey = np.asarray(image)
    if grey.min() < 0 or grey.max() > WHITE:
        raise ValueError("its pixels have more than 16 bits: save it with 8 or 16")
    facts = dict(image.info)
    clear = facts.pop("transparency", None)
    if clear is not None:
        grey = np.where(grey == clear, WHITE, grey)
    result = Image.fromarray((grey >> 8).astype(np.uint8))
    result.info = facts
    return result


def _in_srgb(image: Image.Image) -> Image.Image:
    """The picture's colours in sRGB; grey without a profile stays grey, a quarter of the memory.

    A profile that is damaged or of another kind of colours than the picture's counts for nothing, as in a browser.
    """
    with suppress(ImageCms.PyCMSError, OSError):
        if profile := _profile_of(image):
            mode = SPACES[profile.profile.xcolor_space.strip()]
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image.convert(mode), profile, srgb, outputMode="RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _profile_of(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """A picture's colour profile, where it can be read and is of the picture's kind of colours."""
    content = image.info.get("icc_profile")
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(content)) if content else None
    except (ImageCms.PyCMSError, OSError):
        return None
    mode = SPACES.get(profile.profile.xcolor_space.strip()) if profile else None
    grey = image.mode in GREY or image.mode.startswith("I")
    fits = mode and (image.mode == "CMYK") == (mode == "CMYK") and (grey or mode != "L")
    return profile if fits else None


def aspect_of(path: Path) -> float | None:
    """Width over height of a picture held upright, from the file's header; None where that cannot be read."""
    try:
        with open_picture(path) as image:
            width, height = image.size
            # a TIFF's size is that of the picture held upright already
            turned = image.format != "TIFF" and image.getexif().get(ORIENTATION, 1) >= QUARTER
        return height / width if turned else width / height
    except Exception:  # as in load_picture, which says so
        return None
