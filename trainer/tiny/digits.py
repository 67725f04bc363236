"""Pictures of the digits 0 to 9, drawn with Pillow's own font, for training without a teacher (`studies/isolation`).

Each is light on dark, and its caption is the digit. Place, size, slant, turn and thickness are random.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# The value of `data.images` and of `base.path` that stands for them.
NAME = "digits"
DIGITS = tuple("0123456789")
CANVAS = 160  # side in pixels that they are drawn at, before they are made smaller


@dataclass(frozen=True)
class Digit:
    """One drawing.

    x, y: offset of its centre, and height: that of its box, as fractions of the picture's side. stroke:
    thickness that is added to its lines, as a fraction of the height. slant: how far it leans sideways for each
    unit of height. turn: in degrees.
    """

    caption: str
    x: float
    y: float
    height: float
    stroke: float
    slant: float
    turn: float

    @property
    def name(self) -> str:
        """Its name in errors and lists, as a picture file has one."""
        return f"drawing of {self.caption}"

    def content(self) -> str:
        """A text of everything that decides the picture, for the cache's key."""
        return repr(self)

    def load(self, resolution: int) -> tuple[Tensor, Tensor]:
        """The picture (3, R, R) in [-1, 1], and its sizes as `load_picture` gives them."""
        grey = torch.frombuffer(bytearray(draw(self, resolution).tobytes()), dtype=torch.uint8)
        pixels = grey.view(1, resolution, resolution).expand(3, -1, -1).float().div(127.5).sub(1)
        return pixels, torch.tensor([resolution, resolution, 0, 0, resolution, resolution])

    def has_strange_profile(self) -> bool:
        """Whether its colour profile counts for nothing, as a picture file's may: a drawing has none."""
        return False


def drawn_digits(count: int) -> list[Digit]:
    """The first `count` drawings."""
    return [random_digit(number) for number in range(count)]


def random_digit(number: int, seed: int = 0) -> Digit:
    """Drawing `number` of an endless list in which the digits take turns; equal numbers give equal drawings."""
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
    cos = math.cos(math.radians(digit.turn)) * scale
    sin = math.sin(math.radians(digit.turn)) * scale

    # from a point of the canvas, measured from the digit's centre, to one of the glyph: turn, scale, then
    # slant
    row_y = (sin, cos)
    row_x = (cos + digit.slant * row_y[0], -sin + digit.slant * row_y[1])
    centre_x, centre_y = (0.5 + digit.x) * CANVAS, (0.5 + digit.y) * CANVAS
    offset_x = glyph.width / 2 - row_x[0] * centre_x - row_x[1] * centre_y
    offset_y = glyph.height / 2 - row_y[0] * centre_x - row_y[1] * centre_y
    canvas = glyph.transform(
        (CANVAS, CANVAS), Image.Transform.AFFINE, (*row_x, offset_x, *row_y, offset_y), Image.Resampling.BILINEAR
    )
    return canvas.resize((resolution, resolution), Image.Resampling.HAMMING)


@cache
def _glyph(character: str, stroke: int) -> Image.Image:
    """The character alone, cut at its ink, with a dark margin into which the transform blends its edge."""
    font, margin = ImageFont.load_default(CANVAS), 2
    left, top, right, bottom = font.getbbox(character, stroke_width=stroke)
    glyph = Image.new("L", (right - left + 2 * margin, bottom - top + 2 * margin))
    place = (margin - left, margin - top)
    ImageDraw.Draw(glyph).text(place, character, fill=255, font=font, stroke_width=stroke)
    return glyph
