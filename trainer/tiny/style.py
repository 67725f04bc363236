"""A folder of a few scenes in one drawn style, with captions: what a fine-tuning has to learn from.

    python -m phased_consistency.trainer.tiny.style OUT [--number 10]

The style: every ground is striped. No caption speaks of it, so a run that has learnt it draws stripes for prompts that
ask for none. `is_striped` tells from a picture.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from .scenes import COLOURS, Scene, draw, random_scene, shade


def plain_scenes(rng: random.Random) -> Iterator[Scene]:
    """Random scenes whose captions ask for no stripes."""
    while True:
        scene = random_scene(rng)
        if not scene.pattern:
            yield scene


def striped(scene: Scene) -> Scene:
    """The scene in the style, its caption as it was."""
    return replace(scene, pattern="striped ")


def is_striped(scene: Scene, pixels: Tensor) -> bool:
    """Whether a quarter to three quarters of the ground have the darker band's colour; pixels (3, H, W) in [0, 1]."""
    ground = COLOURS[scene.background]
    palette = torch.tensor([ground, shade(ground, 0.72), *(COLOURS[s.colour] for s in scene.shapes)]) / 255
    counts = torch.cdist(pixels.flatten(1).T, palette).argmin(1).bincount(minlength=len(palette))
    return bool(0.25 <= counts[1] / counts[:2].sum().clamp(min=1) <= 0.75)


def main(argv: list[str] | None = None) -> None:
    """Draw the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--number", type=int, default=10)
    parser.add_argument("--size", type=int, default=128)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(islice(plain_scenes(random.Random("stripes")), args.number)):
        draw(striped(scene), args.size).save(args.out / f"{i:02}.png")
        (args.out / f"{i:02}.txt").write_text(scene.caption + "\n", encoding="utf-8")
    print(f"{args.number} pictures with captions in {args.out}")


if __name__ == "__main__":
    main()
