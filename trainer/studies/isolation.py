"""The progress of a run of the preset "digits", by the networks that it saved on its way.

    python -m phased_consistency.trainer.studies.isolation runs/digits [--pictures 1000] [--out stages.png]

Prints a table of sample quality against updates, and draws the same noises at each stage. Figures are against
drawings that no run has seen.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from ...samplers.lora_file import read_header
from ...samplers.phases import count_steps
from ..evaluation.distances import sliced_wasserstein
from ..families import Base, load_base
from ..families.generate import draw, unit_noise
from ..families.pixels import WEIGHTS
from ..pictures import draw_grid, save_image
from ..tiny.digits import DIGITS, random_digit

STEPS = (1, 2, 4)
HELD_OUT, SEED = 1, 1234  # the seed of the drawings, which is 0 in training, and that of the noise
REFERENCES = 4000  # drawings in which a sample's nearest is looked for


def main(argv: list[str] | None = None) -> int:
    """Print the table, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--pictures", type=int, default=1000, help="samples a figure, the digits in turn")
    parser.add_argument("--out", type=Path, default=Path("stages.png"), help="picture to write")
    args = parser.parse_args(argv)
    stages = saved_stages(args.run)
    side = load_base(str(stages[0])).default_resolution
    references = drawings(0, REFERENCES, side)
    others = drawings(REFERENCES, args.pictures, side)

    # the first row is the best that there is: drawings by the same hand
    print("| | steps | of the digit asked for | distance |\n|---|---|---|---|")
    best = drawings(REFERENCES + args.pictures, args.pictures, side)
    print(row("drawings", "", best, references, others))
    rows = []
    for folder in stages:
        base = load_base(str(folder))
        for steps in STEPS:
            pictures = samples(base, args.pictures, steps)
            print(row(f"{updates(folder)} updates", str(steps), pictures, references, others), flush=True)
            if steps <= 2:
                label = f"{updates(folder)} updates\n{count_steps(steps)}"
                rows.append((label, pictures[: len(DIGITS)].expand(-1, 3, -1, -1)))
    save_image(draw_grid(rows, list(DIGITS), cell=48), args.out)
    return 0


def saved_stages(run: Path) -> list[Path]:
    """The networks that a run saved, in the order of their updates. Raises ValueError where there is none."""
    stages = {updates(p.parent): p.parent for p in run.glob("*/unet") if p.parent.suffix != ".part"}
    if not stages:
        raise ValueError(f"{run} holds no network. Train one: pcm train --preset digits output={run}")
    return [stages[number] for number in sorted(stages)]


def updates(folder: Path) -> int:
    """After how many updates a network was saved."""
    return int(read_header(folder / WEIGHTS).metadata["pcm.step"])


def drawings(start: int, count: int, side: int) -> Tensor:
    """Grey held-out drawings (count, 1, side, side) in [0, 1], the digits in turn."""
    pixels = [random_digit(n, HELD_OUT).load(side)[0][:1] for n in range(start, start + count)]
    return torch.stack(pixels).add(1).div(2)


@torch.no_grad()
def samples(base: Base, count: int, steps: int) -> Tensor:
    """Grey pictures (count, 1, side, side) in [0, 1] from the same noises for every base, the digits in turn."""
    noise = unit_noise((count, *base.latent_shape(base.default_resolution)), SEED)
    condition = base.encode_prompts([DIGITS[i % len(DIGITS)] for i in range(count)])
    ticks = base.alone.grid().plan(steps).ticks
    return base.decode(draw(base, base.alone, condition, {}, noise, ticks, seed=SEED))[:, :1]


def row(name: str, steps: str, pictures: Tensor, references: Tensor, others: Tensor) -> str:
    """A row of the table, on pictures (B, 1, H, W) of the digits in turn.

    The share of those whose nearest of the references (L2) shows the same digit, and the sliced 2-Wasserstein
    distance to other drawings, in units of a pixel's range.
    """
    nearest = torch.cdist(pictures.flatten(1), references.flatten(1)).argmin(1)
    right = (nearest - torch.arange(len(pictures))) % len(DIGITS) == 0
    return f"| {name} | {steps} | {right.float().mean():.1%} | {sliced_wasserstein(pictures, others):.4f} |"


if __name__ == "__main__":
    sys.exit(main())
