"""Captioned pictures that the tiny bases learn from: coloured shapes, drawn with Pillow.

A `Scene` is one picture in words and in numbers: `scene.caption` and `draw(scene, size)` are its two faces.
All that a caption leaves out (size, place, exact shade) is random, so that a prompt has many right pictures;
all that it says is visible, so that a wrong picture is easy to tell.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

COLOURS = {
    "red": (214, 40, 40),
    "orange": (244, 132, 28),
    "yellow": (250, 208, 44),
    "green": (48, 160, 72),
    "blue": (40, 84, 208),
    "purple": (128, 60, 176),
    "pink": (244, 130, 178),
    "white": (244, 244, 240),
    "black": (28, 28, 32),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "moon")
PATTERNS = ("", "striped ")
DrawScene = Callable[[random.Random], Any]  # draws a scene, which has a caption
PLACES = {
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
    "in the middle": (0.5, 0.5),
}
SIZES = {"small ": 0.15, "large ": 0.27}
RELATIONS = {"left of": ((0.27, 0.5), (0.73, 0.5)), "above": ((0.5, 0.27), (0.5, 0.73))}


@dataclass(frozen=True)
class Shape:
    """One shape; centre and radius are fractions of the picture's side."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One picture: its shapes and its ground, and the caption that says a part of that."""

    shapes: tuple[Shape, ...]
    background: str
    pattern: str
    caption: str


def random_scene(rng: random.Random) -> Scene:
    """Draw one scene from the language above; two fifths hold two shapes."""
    background = rng.choice(tuple(COLOURS))
    pattern = rng.choices(PATTERNS, (4, 1))[0]
    colours = rng.sample([c for c in COLOURS if c != background], 2)
    ground = f"on {_article(pattern + background)} background"
    if rng.random() < 0.4:
        relation, centres = rng.choice(tuple(RELATIONS.items()))
        pair = tuple(_place(rng, c, rng.choice(SHAPES), xy, 0.19) for c, xy in zip(colours, centres, strict=True))
        first, second = (_noun("", s) for s in pair)
        return Scene(pair, background, pattern, f"{first} {relation} {second} {ground}")
    size = rng.choice(("", *SIZES))
    place = rng.choice(("", *PLACES))
    shape = _place(
        rng,
        colours[0],
        rng.choice(SHAPES),
        PLACES.get(place) or (rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7)),
        SIZES.get(size) or rng.uniform(0.15, 0.27),
    )
    words = [_noun(size, shape), place, ground]
    return Scene((shape,), background, pattern, " ".join(w for w in words if w))


def _article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _noun(size: str, shape: Shape) -> str:
    """The shape in words, such as "a small red circle"."""
    return _article(f"{size}{shape.colour} {shape.shape}")


def _place(rng: random.Random, colour: str, shape: str, centre: tuple[float, float], radius: float) -> Shape:
    """A shape about here and about so large."""
    x, y = (c + rng.uniform(-0.03, 0.03) for c in centre)
    return Shape(colour, shape, x, y, radius * rng.uniform(0.93, 1.07))


def draw(scene: Scene, size: int, oversample: int = 4) -> Image.Image:
    """Draw a scene as an RGB picture of `size` pixels, anti-aliased by drawing it larger."""
    side = size * oversample
    image = Image.new("RGB", (side, side), COLOURS[scene.background])
    canvas = ImageDraw.Draw(image)
    if scene.pattern:
        band = side // 8
        for x in range(0, side, 2 * band):
            canvas.rectangle((x, 0, x + band - 1, side), fill=shade(COLOURS[scene.background], 0.72))
    for shape in scene.shapes:
        _draw_shape(image, shape, side)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def _draw_shape(image: Image.Image, shape: Shape, side: int) -> None:
    """Paste the shape through a mask, so that rings and moons leave the ground visible."""
    mask = Image.new("L", image.size, 0)
    pen = ImageDraw.Draw(mask)
    x, y, r = shape.x * side, shape.y * side, shape.radius * side

    def disc(cx: float, cy: float, radius: float, fill: int = 255) -> None:
        pen.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=fill)

    def polygon(points: list[tuple[float, float]]) -> None:
        pen.polygon([(x + r * px, y + r * py) for px, py in points], fill=255)

    if shape.shape == "circle":
        disc(x, y, r)
    elif shape.shape == "ring":
        disc(x, y, r)
        disc(x, y, 0.55 * r, fill=0)
    elif shape.shape == "moon":
        disc(x, y, r)
        disc(x + 0.45 * r, y - 0.2 * r, 0.8 * r, fill=0)
    elif shape.shape == "square":
        polygon([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)])
    elif shape.shape == "triangle":
        polygon([(0, -1), (0.95, 0.8), (-0.95, 0.8)])
    elif shape.shape == "cross":
        polygon([(-0.32, -1), (0.32, -1), (0.32, 1), (-0.32, 1)])
        polygon([(-1, -0.32), (1, -0.32), (1, 0.32), (-1, 0.32)])
    elif shape.shape == "star":
        polygon([_polar(1.1 if i % 2 == 0 else 0.45, i * 36 - 90) for i in range(10)])
    elif shape.shape == "heart":
        disc(x - 0.46 * r, y - 0.35 * r, 0.5 * r)
        disc(x + 0.46 * r, y - 0.35 * r, 0.5 * r)
        polygon([(-0.9, -0.12), (0.9, -0.12), (0, 0.98)])
    else:
        raise ValueError(f"unknown shape {shape.shape!r}; the language has {', '.join(SHAPES)}")
    image.paste(COLOURS[shape.colour], mask=mask)


def _polar(radius: float, degrees: float) -> tuple[float, float]:
    """(x, y) of a point by its radius and angle."""
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


def shade(colour: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    """The colour of a stripe: darker than the ground, or lighter where that is dark already."""
    if sum(colour) < 150:
        return tuple(min(255, round(c + 50)) for c in colour)
    return tuple(round(c * factor) for c in colour)


def prompts(number: int, seed: int | str, draw_scene: DrawScene = random_scene) -> list[str]:
    """`number` different captions of random scenes; the same seed gives the same list."""
    rng = random.Random(seed)
    captions: dict[str, None] = {}
    while len(captions) < number:
        captions[draw_scene(rng).caption] = None
    return list(captions)


def held_out_scenes(number: int, trained_on: set[str], draw_scene: DrawScene = random_scene) -> list[Any]:
    """The first `number` of an endless list of random scenes whose captions are no training prompts."""
    rng = random.Random("held out")
    endless = (draw_scene(rng) for _ in count())
    return list(islice((s for s in endless if s.caption not in trained_on), number))


def follows_prompt(caption: str, pixels: Tensor) -> bool:
    """Whether a picture (3, H, W) in [0, 1] shows the colours its caption names: each shape's, and the ground's last.

    Each pixel counts as the palette colour nearest to it (stripes as their ground); the ground must hold the
    largest part of the border, and each shape's colour at least 1 % of the picture.
    """
    names = list(COLOURS)
    palette = torch.tensor([COLOURS[n] for n in names] + [shade(COLOURS[n], 0.72) for n in names]) / 255
    nearest = torch.cdist(pixels.flatten(1).T, palette).argmin(1) % len(names)
    share = torch.bincount(nearest, minlength=len(names)) / len(nearest)
    grid = nearest.view(pixels.shape[1:])
    border = torch.cat([grid[:6].flatten(), grid[-6:].flatten(), grid[:, :6].flatten(), grid[:, -6:].flatten()])
    ground = names[torch.bincount(border, minlength=len(names)).argmax()]
    *colours, background = (word for word in caption.split() if word in COLOURS)
    return ground == background and all(share[names.index(colour)] >= 0.01 for colour in colours)
