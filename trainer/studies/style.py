"""A folder of a few pictures in one style, with captions: all that a fine-tuning has to learn from.

    python -m phased_consistency.trainer.studies.style OUT [--number 10]
    python -m phased_consistency.trainer.studies.style OUT.png --compare LORA [LORA ...]

The style: squares of one colour, sixteen to a side, as in old video games. The pictures are the bundled emoji base's
own, made coarse. No caption speaks of it, so a run that has learnt it draws squares for prompts that ask for none.
`is_coarse` tells from a picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from ..evaluation.contestants import TINY_GUIDANCE, unseen_prompts
from ..evaluation.setting import TEACHER, Setting
from ..evaluation.trial import Trial
from ..families import load_base
from ..lora.install import installed
from ..pictures import draw_grid, save_image, to_image
from ..tiny.bundled import EMOJI
from ..tiny.languages import language_of

SQUARE = 8  # pixels of a side, as many as a latent stands for
SHOWN = 8  # columns of the grid


def coarse(pictures: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in the style: each square has the mean of its pixels."""
    return F.interpolate(F.avg_pool2d(pictures, SQUARE), scale_factor=SQUARE, mode="nearest")


def is_coarse(pictures: Tensor) -> Tensor:
    """Whether neighbours differ less than half as much within squares as across their borders, bool (N)."""
    within, across = [], []
    for picture in (pictures, pictures.mT):
        steps = picture.diff(dim=-1).abs().mean((1, 2))  # (N, W - 1), between a column of pixels and the next
        border = steps[:, SQUARE - 1 :: SQUARE]
        across.append(border.mean(1))
        within.append((steps.sum(1) - border.sum(1)) / (steps.shape[1] - border.shape[1]))
    return sum(within) < 0.5 * sum(across)


def draw_folder(out: Path, number: int) -> None:
    """Write pictures of the base in the style, each with its caption beside it."""
    base, prompts = load_base(EMOJI), unseen_prompts(EMOJI, number)
    pictures = coarse(base.decode(Trial.of(base, prompts, seed=1).latents(Setting(TEACHER, 25, TINY_GUIDANCE), base)))
    out.mkdir(parents=True, exist_ok=True)
    for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        save_image(to_image(picture), out / f"{i:02}.png")
        (out / f"{i:02}.txt").write_text(prompt + "\n", encoding="utf-8")


def compare(loras: list[Path], out: Path, number: int = 64, steps: int = 4) -> str:
    """A line for each LoRA, sampled at its own CFG on prompts that no run has seen: how many of its pictures
    are in the style, and how many show what the prompt says. Draws some of them into `out`."""
    base, prompts = load_base(EMOJI), unseen_prompts(EMOJI, 2 * number)[number:]  # the first may be the style's own
    trial = Trial.of(base, prompts, seed=1234)

    rows, lines = [], []
    for lora in loras:
        with installed(lora, base) as recipe:
            pictures = base.decode(trial.latents(Setting(lora.stem, steps, recipe.guidance), base, recipe))
        in_style, followed = is_coarse(pictures).sum(), language_of(EMOJI).shows(prompts, pictures).sum()
        lines.append(f"{lora.stem}, {steps} steps: {in_style} of {number} in the style, {followed} follow the prompt")
        rows.append((f"{lora.stem}\n{steps} steps", pictures[:SHOWN]))
    save_image(draw_grid(rows, prompts[:SHOWN]), out)
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
    draw_folder(args.out, args.number)
    print(f"{args.number} pictures with captions in {args.out}")


if __name__ == "__main__":
    main()
