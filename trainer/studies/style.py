"""A folder of a few scenes in one drawn style, with captions: all that a fine-tuning has to learn from.

    python -m phased_consistency.trainer.studies.style OUT [--number 10]
    python -m phased_consistency.trainer.studies.style OUT.png --compare LORA [LORA ...]

The style: every ground is striped. No caption speaks of it, so a run that has learnt it draws stripes for
prompts that ask for none. `is_striped` tells from a picture.
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

from ..evaluation.setting import Setting
from ..evaluation.trial import Trial
from ..families import load_base
from ..lora.install import installed
from ..pictures import draw_grid, save_image
from ..tiny.scenes import COLOURS, Scene, draw, follows_prompt, random_scene, shade


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


def compare(base_path: str, loras: list[Path], out: Path, number: int = 64, steps: int = 4) -> str:
    """A line for each LoRA, sampled at its own CFG on prompts that no run has seen: how many of its pictures
    are in the style, and how many show what the prompt says. Draws some of them into `out`."""
    base = load_base(base_path)
    scenes = list(islice(plain_scenes(random.Random("unseen")), number))
    captions = [scene.caption for scene in scenes]
    trial = Trial.of(base, captions, seed=1234)

    rows, lines = [], []
    for lora in loras:
        with installed(lora, base) as recipe:
            pictures = base.decode(trial.latents(Setting(lora.stem, steps, recipe.guidance), base, recipe))
        in_style = sum(is_striped(s, p) for s, p in zip(scenes, pictures, strict=True))
        followed = sum(follows_prompt(s.caption, p) for s, p in zip(scenes, pictures, strict=True))
        lines.append(f"{lora.stem}, {steps} steps: {in_style} of {number} in the style, {followed} follow the prompt")
        rows.append((f"{lora.stem}\n{steps} steps", pictures[:8]))
    save_image(draw_grid(rows, captions[:8]), out)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Draw the folder; with --compare, look at LoRAs instead."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to draw; with --compare, PNG to write")
    parser.add_argument("--number", type=int, default=10)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--compare", type=Path, nargs="+", metavar="LORA")
    parser.add_argument("--base", default="tiny-sd15")
    args = parser.parse_args(argv)
    if args.compare:
        print(compare(args.base, args.compare, args.out))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(islice(plain_scenes(random.Random("stripes")), args.number)):
        draw(striped(scene), args.size).save(args.out / f"{i:02}.png")
        (args.out / f"{i:02}.txt").write_text(scene.caption + "\n", encoding="utf-8")
    print(f"{args.number} pictures with captions in {args.out}")


if __name__ == "__main__":
    main()
