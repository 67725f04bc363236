"""What a run of the preset "digits" has learnt, by the networks that it saved on its way.

    python -m phased_consistency.trainer.studies.isolation runs/digits [--pictures 1000] [--out stages.png]

Prints a table of sample quality against updates, and draws the same noises at each stage. Figures are against drawings
that no run has seen.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from ...samplers.lora_file import read_header
from ..evaluation.metrics import sliced_wasserstein
from ..families import Base, load_base
from ..families.generate import generate
from ..families.pixels import WEIGHTS
from ..pictures import draw_grid, save_image
from ..tiny.digits import DIGITS, random_digit

STEPS = (1, 2, 4)
HELD_OUT, SEED = 1, 1234  # the drawings' seed, which is 0 in training, and the noise's
REFERENCES = 4000


def main(argv: list[str] | None = None) -> int:
    """Print the table, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--pictures", type=int, default=1000, help="samples a figure, the digits in turn")
    parser.add_argument("--out", type=Path, default=Path("stages.png"), help="picture to write")
    args = parser.parse_args(argv)
    stages = saved_stages(args.run)
    side = load_base(str(stages[0])).default_resolution
    drawn = drawings(0, REFERENCES, side), drawings(REFERENCES, args.pictures, side)
    print("| | steps | of the digit asked for | distance |\n|---|---|---|---|")
    print(row("drawings", "", drawings(REFERENCES + args.pictures, args.pictures, side), *drawn))
    shown = []
    for folder in stages:
        base = load_base(str(folder))
        for steps in STEPS:
            made = samples(base, args.pictures, steps)
            print(row(f"{updates(folder)} updates", str(steps), made, *drawn), flush=True)
            if steps <= 2:
                label = f"{updates(folder)} updates\n{steps} step{'s' * (steps > 1)}"
                shown.append((label, made[: len(DIGITS)].expand(-1, 3, -1, -1)))
    save_image(draw_grid(shown, list(DIGITS), cell=48), args.out)
    return 0


def saved_stages(run: Path) -> list[Path]:
    """The networks that a run saved, in the order of their updates. Raises ValueError where there is none."""
    found = {updates(p.parent): p.parent for p in run.glob("*/unet") if p.parent.suffix != ".part"}
    if not found:
        raise ValueError(f"{run} holds no network. Train one: pcm train --preset digits output={run}")
    return [found[number] for number in sorted(found)]


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
    noise = torch.randn(
        count, *base.latent_shape(base.default_resolution), generator=torch.Generator().manual_seed(SEED)
    )
    condition = base.encode_prompts([DIGITS[i % len(DIGITS)] for i in range(count)])
    ticks = base.alone.grid().plan(steps).ticks
    return base.decode(generate(base, condition, {}, noise, ticks, *base.alone, seed=SEED))[:, :1]


def row(name: str, steps: str, made: Tensor, references: Tensor, others: Tensor) -> str:
    """Share of pictures whose nearest of the references (L2) shows the digit asked for, and the sliced 2-Wasserstein
    distance to other drawings, in units of a pixel's range."""
    nearest = torch.cdist(made.flatten(1), references.flatten(1)).argmin(1)
    right = (nearest - torch.arange(len(made))) % len(DIGITS) == 0
    return f"| {name} | {steps} | {right.float().mean():.1%} | {sliced_wasserstein(made, others):.4f} |"


if __name__ == "__main__":
    sys.exit(main())
