"""`make demo`: distil a 4-phase LoRA from the bundled tiny base, and show what it is worth.

    python -m phased_consistency.trainer.demo [--seed 0] [--out out/demo] [key=value ...]

Writes lora.safetensors, grid.png and report.json. The run is the preset "demo"; the prompts and noises of the report are
not those of the training.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from .checkpoint import write_text
from .config import load_config
from .evaluate import Setting, compare
from .export import install
from .families import load_base
from .families.sd15 import SD15
from .loop import train
from .previews import draw_grid, save_image
from .progress import ProgressBar
from .tiny.scenes import Scene, follows_prompt, random_scene

SETTINGS = [
    *(Setting("teacher", steps, 4.0) for steps in (40, 4, 2)),
    *(Setting("lora", steps, 1.0) for steps in (1, 2, 4, 8)),
]
# What the LoRA at 4 steps is measured by: figure, against which teacher row, at most this ratio.
GOALS = (("paired_error", 4, 0.6), ("distance", 4, 0.35), ("paired_error", 2, 0.3))


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate, write; returns 0, or 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--pictures", type=int, default=256, help="held-out prompts in the report")
    parser.add_argument("overrides", nargs="*", help="key=value settings over the preset")
    args = parser.parse_args(argv)
    settings = [f"train.seed={args.seed}", f"output={args.out / 'run'}", *args.overrides]
    config = load_config(overrides=settings, preset="demo")
    started = time.monotonic()
    with ProgressBar() as bar:
        lora = train(config, bar)
    trained = time.monotonic()
    shutil.copyfile(lora, args.out / "lora.safetensors")

    base = load_base(config.base.path)
    install(args.out / "lora.safetensors", base, "demo")
    scenes = held_out_scenes(args.pictures)
    prompts = [s.caption for s in scenes]
    rows, latents = compare(SETTINGS, base, _Toggle(base), config.grid(), prompts, seed=1234)
    pictures = [base.decode(x) for x in latents]
    report = {
        "rows": [r.as_dict() | {"prompt_followed": _followed(scenes, p)} for r, p in zip(rows, pictures, strict=True)],
        "goals": [_goal(rows, *goal) for goal in GOALS],
        "seed": args.seed,
        "pictures": len(prompts),
        "training_seconds": round(trained - started, 1),
        "evaluation_seconds": round(time.monotonic() - trained, 1),
    }
    write_text(args.out / "report.json", json.dumps(report, indent=2) + "\n")
    save_image(draw_grid([(s.label, p[:8]) for s, p in zip(SETTINGS, pictures, strict=True)], prompts[:8]), args.out / "grid.png")
    print(table(report), file=sys.stderr)
    return 0 if all(g["met"] for g in report["goals"]) else 1


def held_out_scenes(count: int) -> list[Scene]:
    """Scenes that no training prompt list of the demo holds."""
    rng = random.Random("held out")
    return [random_scene(rng) for _ in range(count)]


def table(report: dict) -> str:
    """The report as text."""
    head = f"{'':8} steps  CFG  evaluations  paired error  distance  prompt followed"
    lines = [
        f"{r['name']:8} {r['steps']:5} {r['guidance']:4g} {r['evaluations']:12} {r['paired_error']:13.3f} {r['distance']:9.4f} {r['prompt_followed']:16.0%}"
        for r in report["rows"]
    ]
    goals = [
        f"LoRA at 4 steps, {g['figure']} {g['ratio']:.3f} of the teacher's at {g['teacher_steps']} guided steps "
        f"(goal: at most {g['at_most']}): {'met' if g['met'] else 'MISSED'}"
        for g in report["goals"]
    ]
    return "\n".join([head, *lines, *goals])


def _goal(rows: list, figure: str, teacher_steps: int, at_most: float) -> dict:
    lora = next(r for r in rows if r.name == "lora" and r.steps == 4)
    teacher = next(r for r in rows if r.name == "teacher" and r.steps == teacher_steps)
    ratio = getattr(lora, figure) / getattr(teacher, figure)
    return {"figure": figure, "teacher_steps": teacher_steps, "at_most": at_most, "ratio": ratio, "met": ratio <= at_most}


def _followed(scenes: list[Scene], pictures: Tensor) -> float:
    return sum(follows_prompt(s, p) for s, p in zip(scenes, pictures, strict=True)) / len(scenes)


class _Toggle:
    """Switches the installed LoRA off for the teacher's rows."""

    def __init__(self, base: SD15):
        self.network = base.unet

    @contextmanager
    def off(self):
        self.network.disable_adapters()
        try:
            yield
        finally:
            self.network.enable_adapters()


if __name__ == "__main__":
    sys.exit(main())
