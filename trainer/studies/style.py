"""A folder of a few pictures in one style, with captions: all that a fine-tuning has to learn from.

    python -m phased_consistency.trainer.studies.style OUT [--number 10]
    python -m phased_consistency.trainer.studies.style OUT.png --compare LORA [LORA ...]

The style: every ground is striped. The emoji base draws the pictures, asked for stripes and guided; no caption speaks
of them, so a run that has learnt the style draws stripes for prompts that ask for none. `is_striped` tells from a
picture.
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

from ...samplers.emoji_words import GROUNDS, SIZES, THINGS, Meaning, wordings
from ..evaluation.setting import TEACHER, Setting
from ..evaluation.trial import Trial
from ..families import load_base
from ..lora.install import installed
from ..pictures import draw_grid, save_image, to_image
from ..tiny.bundled import bundled_folder
from ..tiny.emoji_classifier import agreement, load_classifier
from ..tiny.emoji_scenes import PATTERN_SHADE
from ..tiny.scenes import shade

BASE = "tiny-emoji"
DRAWING = Setting(TEACHER, 25, 4.0)  # how the base draws the folder's pictures
NEAR = 0.12  # of a colour, as a distance in RGB of [0, 1]: what counts as the ground
NOISE = 1234  # its seed


def plain_prompts(rng: random.Random) -> Iterator[Meaning]:
    """Random prompts of one thing on a ground, which ask for no stripes."""
    while True:
        yield Meaning((rng.choice(list(THINGS)),), rng.choice(SIZES), rng.choice(list(GROUNDS)))


def wording(meaning: Meaning) -> str:
    """The fullest prompt that says it."""
    return wordings(meaning)[0]


def striped(meaning: Meaning) -> Meaning:
    """The same, asked for in the style."""
    return replace(meaning, pattern="striped")


def is_striped(meaning: Meaning, pixels: Tensor) -> bool:
    """Whether the ground has upright stripes; pixels (3, H, W) in [0, 1].

    A quarter to three quarters of the ground must be of the darker shade, and a column of one shade, nearly all of it.
    """
    ground = GROUNDS[meaning.ground]
    palette = torch.tensor([ground, shade(ground, PATTERN_SHADE)]) / 255
    distances = torch.cdist(pixels.permute(1, 2, 0).flatten(0, 1), palette)
    nearest, shades = (part.view(pixels.shape[1:]) for part in distances.min(1))
    seen = nearest < NEAR
    dark, all_of_it = (shades * seen).sum(0), seen.sum(0)
    if not all_of_it.sum():
        return False
    upright = torch.maximum(dark, all_of_it - dark).sum() / all_of_it.sum()
    return bool(0.25 <= dark.sum() / all_of_it.sum() <= 0.75 and upright > 0.85)


def write_folder(out: Path, number: int) -> None:
    """Draw pictures in the style into a folder, each with its caption in a text file beside it."""
    meanings = list(islice(plain_prompts(random.Random("stripes")), number))
    base, prompts = load_base(BASE), [wording(striped(meaning)) for meaning in meanings]
    pictures = base.decode(Trial.of(base, prompts, NOISE).latents(DRAWING, base))

    out.mkdir(parents=True, exist_ok=True)
    for i, (meaning, picture) in enumerate(zip(meanings, pictures, strict=True)):
        save_image(to_image(picture), out / f"{i:02}.png")
        (out / f"{i:02}.txt").write_text(wording(meaning) + "\n", encoding="utf-8")
    print(f"{number} pictures with captions in {out}")


def compare(loras: list[Path], out: Path, number: int = 64, steps: int = 4) -> str:
    """A line for each LoRA, sampled at its own CFG on prompts that no run has seen: how many of its pictures
    are in the style, and how many show what the prompt says. Draws some of them into `out`."""
    base, classifier = load_base(BASE), load_classifier(bundled_folder(BASE))
    meanings = list(islice(plain_prompts(random.Random("unseen")), number))
    captions = [wording(meaning) for meaning in meanings]
    trial = Trial.of(base, captions, NOISE)

    rows, lines = [], []
    for lora in loras:
        with installed(lora, base) as recipe:
            pictures = base.decode(trial.latents(Setting(lora.stem, steps, recipe.guidance), base, recipe))
        in_style = sum(map(is_striped, meanings, pictures))
        followed = int(agreement(classifier, 2 * pictures - 1, meanings).sum())
        lines.append(f"{lora.stem}, {steps} steps: {in_style} of {number} in the style, {followed} follow the prompt")
        rows.append((f"{lora.stem}\n{steps} steps", pictures[:8]))
    save_image(draw_grid(rows, captions[:8]), out)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Draw the folder; with --compare, look at LoRAs instead."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to draw; with --compare, PNG to write")
    parser.add_argument("--number", type=int, default=10)
    parser.add_argument("--compare", type=Path, nargs="+", metavar="LORA")
    args = parser.parse_args(argv)
    if args.compare:
        print(compare(args.compare, args.out))
        return
    write_folder(args.out, args.number)


if __name__ == "__main__":
    main()
