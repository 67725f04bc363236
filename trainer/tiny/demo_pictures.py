"""The pictures that the demo's editing templates begin with, as `make comfy` puts them into ComfyUI's input/.

    python -m phased_consistency.trainer.tiny.demo_pictures FOLDER

draws them anew, with the font that the base learnt from (`emoji_scenes`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ...samplers.emoji_words import GROUNDS
from .emoji_scenes import SIDE, EmojiScene, Spot, draw

HOLE = (66, 24, 126, 104)  # left, top, right and bottom of what the inpainting template draws anew
NOISE = 40  # standard deviation, in levels of 255
SMALLER = 4  # times, of the picture to enlarge
EXTENTS = (0.88, 0.48)  # of one thing, and of each of two
GREEN, BROWN = (40, 130, 60), (120, 70, 30)
Picture = Callable[[], Image.Image]


def main(argv: list[str] | None = None) -> int:
    """Draw the pictures into a folder. Returns 0, or after a sentence on what is missing 1, as `pcm` does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        for edit, picture in PICTURES.items():
            picture().save(args.folder / f"pcm_demo_{edit}.png", optimize=True)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def one(thing: str, ground: str) -> Image.Image:
    """A large thing in the middle."""
    return draw(EmojiScene((Spot(thing, 0.5, 0.5, EXTENTS[0], 0),), ground, "", ""))


def pair(left: str, right: str, ground: str) -> Image.Image:
    """Two things side by side."""
    places = zip((left, right), (0.255, 0.745), strict=True)
    return draw(EmojiScene(tuple(Spot(thing, x, 0.5, EXTENTS[1], 0) for thing, x in places), ground, "", ""))


def with_hole() -> Image.Image:
    """A pair, transparent over the right one, as the host's mask editor saves a mask."""
    image = pair("fox", "moon", "blue")
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, HOLE)
    image.putalpha(alpha)
    return image


def grey() -> Image.Image:
    return one("strawberry", "white").convert("L")


def small() -> Image.Image:
    return one("panda", "purple").reduce(SMALLER)


def strokes() -> Image.Image:
    """A tree in a few strokes of a broad brush."""
    image = Image.new("RGB", (SIDE, SIDE), GROUNDS["yellow"])
    brush = ImageDraw.Draw(image)
    brush.line(((64, 96), (64, 120)), BROWN, 16)
    for top, reach in ((8, 24), (36, 36), (64, 48)):
        brush.polygon(((64, top), (64 - reach, top + 38), (64 + reach, top + 38)), GREEN)
    return image


def noisy() -> Image.Image:
    pixels = np.asarray(one("butterfly", "white")).astype(np.float64)
    pixels += np.random.default_rng(0).normal(0, NOISE, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


PICTURES: dict[str, Picture] = {  # by edit
    "image_to_image": partial(one, "lion", "blue"),
    "inpaint": with_hole,
    "outpaint": lambda: pair("fox", "pumpkin", "blue").crop((0, 0, SIDE // 2, SIDE)),
    "colorize": grey,
    "super_resolution": small,
    "stroke_to_image": strokes,
    "denoise": noisy,
}


if __name__ == "__main__":
    sys.exit(main())
