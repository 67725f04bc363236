"""An existing few-step LoRA on a fine-tuned base: what it loses there, and how many updates win it back.

    python -m phased_consistency.trainer.studies.refine --out out/refine

The fine-tune is a style LoRA, learnt by plain diffusion on striped scenes and merged into the tiny base
(`base.loras`). On it the few-step LoRA of the plain base is measured as it is, then refined from `lora.init`, beside a
LoRA that starts from nothing with the same settings.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...samplers import jump
from ...samplers.phases import count_steps
from ..config.config import Config
from ..config.load import load_config
from ..families import Base, load_base
from ..families.base import DTYPES
from ..lora.adapter import learner
from ..lora.write import lora_tensors
from ..reporting.log import read_log
from ..system.files import write_tensors, write_text
from ..tiny.scenes import draw, random_scene

BASE = "tiny-sd15"
PHASES = 4
COMMON = {
    "base.path": BASE,
    "data.count": 128,
    "lora.rank": 16,
    "lora.alpha": 16.0,
    "objective.phases": PHASES,
    "train.batch_size": 16,
    "train.trackers": [],
    "train.report": False,
    "train.warmup": 0,
    "preview.every": 0,
    "validation.count": 12,
    "validation.steps": [PHASES],
    "validation.best": False,
}
STYLE_RANK = 16


def style_lora(out: Path, side: int, updates: int, pictures: int = 256, batch: int = 16, lr: float = 1e-3) -> None:
    """Write a LoRA that has learnt striped grounds by plain diffusion on the tiny base, as any style's LoRA is made."""
    base, rng = load_base(BASE), random.Random("stripes")
    plain = (scene for scene in iter(lambda: random_scene(rng), None) if not scene.pattern)
    scenes = [replace(scene, pattern="striped ") for scene in islice(plain, pictures)]  # no caption speaks of them
    with torch.no_grad():
        drawn = torch.stack([torch.from_numpy(np.array(draw(scene, side))) for scene in scenes])
        latents, _ = base.encode_images(drawn.permute(0, 3, 1, 2) / 127.5 - 1)
        condition = base.encode_prompts([scene.caption for scene in scenes])

    adapter = learner(base.network, type(base), STYLE_RANK, float(STYLE_RANK), seed=0)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr)
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        rows = torch.randint(pictures, (batch,), generator=generator)
        loss = _diffusion_loss(base, latents[rows], {k: v[rows] for k, v in condition.items()}, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tensors = lora_tensors(adapter.state(), STYLE_RANK, float(STYLE_RANK), type(base), DTYPES["fp16"])
    write_tensors(out, tensors, {"ss_output_name": out.stem, "ss_base_model_version": base.base_version})


def _diffusion_loss(base: Base, x0: Tensor, condition: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """Mean squared error of the noise that the network sees in latents x0 (B, C, h, w), at random ticks."""
    tick = torch.randint(1, base.schedule.ticks + 1, (len(x0),), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    x = jump(x0, noise, base.schedule.alpha(tick), base.schedule.sigma(tick))
    return (base.denoise(x, tick, condition) - noise).square().mean()


def run(out: Path, name: str, changes: dict[str, object]) -> tuple[Path, dict[int, float]]:
    """Train one LoRA, or go on with it; returns its file, and its paired error at each update where it was measured."""
    from ..training.loop import train

    config: Config = load_config(None, COMMON | {"name": name, "output": str(out / name)} | changes, "demo-sd15")
    file = train(config)
    key = f"paired error at {count_steps(PHASES)}"
    measured = [row for row in read_log(config.run_folder) if row["kind"] == "validation"]
    return file, {row["step"]: row["figures"][key] for row in measured}


def table(errors: dict[str, dict[int, float]]) -> str:
    """A row for each number of updates, a column for each kind of run."""
    updates = sorted(set().union(*errors.values()))
    lines = ["| updates | " + " | ".join(errors) + " |", "|---|" + "---|" * len(errors)]
    for n in updates:
        cells = (f"{row[n]:.3f}" if n in row else "" for row in errors.values())
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Make the style, the LoRA of the plain base, and the two runs on the fine-tuned one; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/refine"))
    parser.add_argument("--side", type=int, default=64, help="of the pictures, in pixels")
    parser.add_argument("--style-updates", type=int, default=400)
    parser.add_argument("--updates", type=int, default=120, help="of the LoRA on the plain base")
    parser.add_argument("--strength", type=float, default=0.4, help="of the style: how far the fine-tune goes")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the runs on the fine-tuned base")
    parser.add_argument("--refine", type=int, default=60, help="updates on the fine-tuned base")
    parser.add_argument("--every", type=int, default=15, help="updates between measurements there")
    args = parser.parse_args(argv)

    style = args.out / "stripes.safetensors"
    if not style.is_file():
        style_lora(style, args.side, args.style_updates)
    side = {"data.resolution": args.side}
    plain, before = run(
        args.out, "plain", side | {"train.steps": args.updates, "validation.every": args.updates, "train.lr": 2e-3}
    )
    tuned = side | {
        "base.loras": [f"{style}:{args.strength:g}"],
        "train.steps": args.refine,
        "validation.every": args.every,
    }
    tuned |= {"data.cache": str(args.out / "cache"), "train.lr": args.lr}
    _, refined = run(args.out, f"refined-{args.strength:g}-{args.lr:g}", tuned | {"lora.init": str(plain)})
    _, scratch = run(args.out, f"scratch-{args.strength:g}-{args.lr:g}", tuned)

    errors = {"refined from the plain base's LoRA": refined, "from nothing": scratch}
    at_home = before[max(before)]
    text = f"On its own base the LoRA's paired error is {at_home:.3f}.\n\n{table(errors)}\n"
    write_text(args.out / "report.json", json.dumps({"on its own base": at_home} | errors, indent=2) + "\n")
    write_text(args.out / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
