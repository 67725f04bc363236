"""Captioned pictures that the emoji base learns from, drawn with the font Noto Color Emoji (OFL 1.1).

As in `scenes`, a `EmojiScene` is one picture in words and in numbers. What its caption leaves out (place, exact size,
tilt, and the ground where it names none) is random; all that it says is visible.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...samplers.emoji_words import GROUNDS, PATTERNS, THINGS, Meaning, caption
from .scenes import shade

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
PACKAGE = "fonts-noto-color-emoji"  # Debian's
BITMAP = 109  # the one size, in points, of the font's bitmaps
SIDE = 128  # of the pictures that the base learns, in pixels

PAIRS = 0.3  # share of the pictures that show two things
PATTERNED = 0.2  # share of the grounds with a pattern
NO_GROUND = 0.1  # share of the captions that leave the ground out
PATTERN_SHADE = 0.8  # what `shade` makes of a ground where its pattern is
TILT = 10.0  # degrees, to either side
# longer sides of the drawings, as shares of the picture's; at less than half of it they look like nothing
EXTENT = {"": (0.56, 0.74), "large": (0.82, 0.93)}
PAIR_EXTENT = (0.465, 0.49)


@dataclass(frozen=True)
class Spot:
    """One thing where it is drawn: centre and longer side as shares of the picture's side, tilt in degrees."""

    thing: str
    x: float
    y: float
    extent: float
    tilt: float


@dataclass(frozen=True)
class EmojiScene:
    """One picture: its things from left to right, its ground, and a caption that says a part of that."""

    spots: tuple[Spot, ...]
    ground: str
    pattern: str
    caption: str


def random_scene(rng: random.Random, pairs: float = PAIRS) -> EmojiScene:
    """One scene of the language; this share of them shows two things."""
    ground = rng.choice(tuple(GROUNDS))
    pattern = rng.choice(PATTERNS[1:]) if rng.random() < PATTERNED else ""
    if rng.random() < pairs:
        things, size = tuple(rng.sample(tuple(THINGS), 2)), ""
        spots = tuple(_spot(rng, thing, x, 0.01, PAIR_EXTENT) for thing, x in zip(things, (0.255, 0.745), strict=True))
    else:
        things, size = (rng.choice(tuple(THINGS)),), rng.choice(tuple(EXTENT))
        spots = (_spot(rng, things[0], 0.5, None, EXTENT[size]),)
    named = Meaning(things, size, ground, pattern) if pattern or rng.random() >= NO_GROUND else Meaning(things, size)
    return EmojiScene(spots, ground, pattern, caption(named, rng))


def _spot(rng: random.Random, thing: str, x: float, reach: float | None, extents: tuple[float, float]) -> Spot:
    """A thing about (x, 0.5). reach: how far it may stand to the left or right, None: anywhere within the picture."""
    extent = rng.uniform(*extents)
    room = 0.9 * (1 - extent) / 2
    across, down = room if reach is None else reach, min(room, 0.15)
    return Spot(
        thing, x + rng.uniform(-across, across), 0.5 + rng.uniform(-down, down), extent, rng.uniform(-TILT, TILT)
    )


def draw(scene: EmojiScene, side: int = SIDE) -> Image.Image:
    """A scene as an RGB picture of `side` pixels. Raises FileNotFoundError where the font is not installed."""
    image = draw_ground(scene.ground, scene.pattern, side)
    for spot in scene.spots:
        thing = sprite(spot.thing)
        scale = spot.extent * side / max(thing.size)
        size = [max(1, round(length * scale)) for length in thing.size]
        thing = thing.resize(size, Image.Resampling.LANCZOS)
        thing = thing.rotate(spot.tilt, Image.Resampling.BICUBIC, expand=True)
        corner = round(spot.x * side - thing.width / 2), round(spot.y * side - thing.height / 2)
        image.paste(thing, corner, thing)
    return image


def draw_ground(ground: str, pattern: str, side: int) -> Image.Image:
    """A plain ground, or one with stripes, dots or squares of its shade, eight to a side."""
    image = Image.new("RGB", (side, side), GROUNDS[ground])
    canvas, shaded, step = ImageDraw.Draw(image), shade(GROUNDS[ground], PATTERN_SHADE), side / 8
    if pattern == "striped":
        for i in range(0, 8, 2):
            canvas.rectangle((i * step, 0, (i + 1) * step - 1, side), fill=shaded)
    elif pattern:
        for i in range(8):
            for j in range(i % 2, 8, 2):
                x, y = i * step, j * step
                if pattern == "dotted":
                    canvas.ellipse((x + 0.2 * step, y + 0.2 * step, x + 0.8 * step, y + 0.8 * step), fill=shaded)
                else:
                    canvas.rectangle((x, y, x + step - 1, y + step - 1), fill=shaded)
    return image


@cache
def sprite(thing: str) -> Image.Image:
    """A thing as RGBA, cut to what is drawn. Raises FileNotFoundError where the font is not installed."""
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((8, 8), THINGS[thing][0], font=find_font(), embedded_color=True)
    return canvas.crop(canvas.getbbox())


@cache
def find_font(path: Path = FONT) -> ImageFont.FreeTypeFont:
    """The font that draws the things. Raises FileNotFoundError, naming Debian's package, where it is not installed."""
    if not path.is_file():
        raise FileNotFoundError(
            f"The emoji are drawn with the font Noto Color Emoji, which is not at {path}. Install it "
            f"(on Debian and Ubuntu: apt install {PACKAGE})."
        )
    return ImageFont.truetype(str(path), BITMAP)


def pixels_of(scene: EmojiScene, side: int = SIDE) -> Tensor:
    """A scene drawn as uint8 pixels (3, side, side)."""
    return torch.from_numpy(np.asarray(draw(scene, side)).copy()).permute(2, 0, 1)


def draw_pictures(scenes: Sequence[EmojiScene]) -> Tensor:
    """Uint8 pixels (N, 3, SIDE, SIDE) of every scene."""
    pixels = torch.empty(len(scenes), 3, SIDE, SIDE, dtype=torch.uint8)
    for i, scene in enumerate(scenes):
        pixels[i] = pixels_of(scene)
    return pixels


def random_scenes(count: int, seed: int, pairs: float = PAIRS) -> list[EmojiScene]:
    """`count` random scenes; the same seed gives the same ones."""
    rng = random.Random(f"emoji {seed}")
    return [random_scene(rng, pairs) for _ in range(count)]
