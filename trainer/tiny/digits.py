"""Pictures of the digits 0 to 9 for the example in isolation, drawn with Pillow's own font.

Each is light on dark, and the caption is the digit. Place, size, slant, turn and thickness are free.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# What `data.images` and `base.path` call them.
NAME = "digits"
DIGITS = tuple("0123456789")
# Drawn so large, then made as small as asked for.
CANVAS = 160


@dataclass(frozen=True)
class Digit:
    """One drawing. x, y: offset of its centre, height: of its box, as fractions of the side; stroke: what its lines
    are thickened by, in parts of the height; slant: sideways per height; turn: degrees."""

    caption: str
    x: float
    y: float
    height: float
    stroke: float
    slant: float
    turn: float

    @property
    def name(self) -> str:
        return f"drawing of {self.caption}"

    def content(self) -> str:
        """What decides the picture."""
        return repr(self)

    def load(self, resolution: int) -> tuple[Tensor, Tensor]:
        """The picture (3, R, R) in [-1, 1], and its sizes as `load_picture` gives them."""
        grey = torch.frombuffer(bytearray(draw(self, resolution).tobytes()), dtype=torch.uint8)
        pixels = grey.view(1, resolution, resolution).expand(3, -1, -1).float().div(127.5).sub(1)
        return pixels, torch.tensor([resolution, resolution, 0, 0, resolution, resolution])


def drawn_digits(count: int) -> list[Digit]:
    """The first `count` drawings."""
    return [random_digit(number) for number in range(count)]


def random_digit(number: int, seed: int = 0) -> Digit:
    """Drawing `number` of an endless list; the digits take turns. The same numbers give the same drawing."""
    rng = random.Random(f"{seed} {number}")
    return Digit(
        caption=DIGITS[number % 10],
        x=rng.uniform(-0.08, 0.08),
        y=rng.uniform(-0.06, 0.06),
        height=rng.uniform(0.64, 0.82),
        stroke=rng.uniform(0.0, 0.05),
        slant=rng.uniform(-0.2, 0.3),
        turn=rng.uniform(-8, 8),
    )


def draw(digit: Digit, resolution: int) -> Image.Image:
    """A greyscale picture of `resolution` pixels a side."""
    glyph = _glyph(digit.caption, round(digit.stroke * CANVAS))
    scale = glyph.height / (digit.height * CANVAS)
    cos, sin = (f(math.radians(digit.turn)) * scale for f in (math.cos, math.sin))
    # from a point of the canvas, measured from the digit's centre, to one of the glyph: turn, scale, then slant
    row_y = (sin, cos)
    row_x = (cos + digit.slant * row_y[0], -sin + digit.slant * row_y[1])
    cx, cy = (0.5 + digit.x) * CANVAS, (0.5 + digit.y) * CANVAS
    offset = [half - a * cx - b * cy for half, (a, b) in ((glyph.width / 2, row_x), (glyph.height / 2, row_y))]
    canvas = glyph.transform(
        (CANVAS, CANVAS), Image.Transform.AFFINE, (*row_x, offset[0], *row_y, offset[1]), Image.Resampling.BILINEAR
    )
    return canvas.resize((resolution, resolution), Image.Resampling.HAMMING)


@cache
def _glyph(character: str, stroke: int) -> Image.Image:
    """The character alone, cut at its ink, with a dark margin for the transform."""
    font, margin = ImageFont.load_default(CANVAS), 2
    left, top, right, bottom = font.getbbox(character, stroke_width=stroke)
    glyph = Image.new("L", (right - left + 2 * margin, bottom - top + 2 * margin))
    place = (margin - left, margin - top)
    ImageDraw.Draw(glyph).text(place, character, fill=255, font=font, stroke_width=stroke)
    return glyph
