"""`make demo`: distil a 4-phase LoRA from the bundled tiny base, and show what it is worth.

    python -m phased_consistency.trainer.demo [--seed 0] [--out out/demo] [key=value ...]

Writes lora.safetensors, grid.png and report.json. The run is the preset "demo"; the report's prompts and
noises are not those of the training.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from torch import Tensor

from .config.config import Config
from .config.load import load_config
from .evaluation.contestants import unseen_scenes
from .evaluation.setting import Setting
from .evaluation.trial import Row, Trial, compare
from .families import load_base
from .lora.install import installed
from .pictures import draw_grid, save_image
from .reporting.progress import progress_on_stderr
from .system.files import write_text
from .tiny.scenes import Scene, follows_prompt
from .training.loop import train

SETTINGS = [
    *(Setting("teacher", steps, 4.0) for steps in (40, 4, 2)),
    *(Setting("lora", steps, 1.0) for steps in (1, 2, 4, 8)),
]
# The base at 4 steps without guidance: a LoRA that had learnt nothing would give the same.
UNTRAINED = Setting("teacher", 4, 1.0)
# Goals of the LoRA at 4 steps: figure, steps of the guided teacher that it is divided by that of, greatest ratio.
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
    with progress_on_stderr() as bar:
        lora = train(config, bar)
    trained = time.monotonic()
    shutil.copyfile(lora, args.out / "lora.safetensors")

    report = evaluate(config, args.out, args.pictures)
    report |= {
        "seed": args.seed,
        "training_seconds": round(trained - started, 1),
        "evaluation_seconds": round(time.monotonic() - trained, 1),
    }
    write_text(args.out / "report.json", json.dumps(report, indent=2) + "\n")
    print(table(report), file=sys.stderr)
    return 0 if all(g["met"] for g in report["goals"]) else 1


def evaluate(config: Config, out: Path, number: int) -> dict:
    """Write grid.png and return the report of out/lora.safetensors on `number` held-out prompts."""
    base = load_base(config.base.path)
    scenes = unseen_scenes(config.base.path, number)
    prompts = [scene.caption for scene in scenes]
    trial = Trial.of(base, prompts, seed=1234)
    with installed(out / "lora.safetensors", base) as recipe:
        rows, latents = compare([*SETTINGS, UNTRAINED], base, recipe, trial)

    pictures = [base.decode(x) for x in latents]
    grid = [(s.label, p[:8]) for s, p in zip(SETTINGS, pictures[:-1], strict=True)]
    save_image(draw_grid(grid, prompts[:8]), out / "grid.png")

    *figures, untrained = (
        r.as_dict() | {"prompt_followed": _followed(scenes, p)} for r, p in zip(rows, pictures, strict=True)
    )
    goals = [_goal(rows, *goal) for goal in GOALS]
    return {"rows": figures, "untrained": untrained, "goals": goals, "pictures": number}


def table(report: dict) -> str:
    """The report as text."""
    head = f"{'':9} steps  CFG  evaluations  paired error  distance  prompt followed"
    lines = [
        f"{r['name']:9} {r['steps']:5} {r['guidance']:4g} {r['evaluations']:12} "
        f"{r['paired_error']:13.3f} {r['distance']:9.4f} {r['prompt_followed']:16.0%}"
        for r in [*report["rows"], report["untrained"] | {"name": "untrained"}]
    ]
    goals = [
        f"LoRA at 4 steps, {g['figure']} {g['ratio']:.3f} of the teacher's at {g['teacher_steps']} guided steps "
        f"(goal: at most {g['at_most']}): {'met' if g['met'] else 'MISSED'}"
        for g in report["goals"]
    ]
    return "\n".join([head, *lines, *goals])


def _goal(rows: list[Row], figure: str, teacher_steps: int, at_most: float) -> dict:
    """The LoRA's figure at 4 steps over the guided teacher's, and whether that is at most so much."""
    lora = next(r for r in rows if r.name == "lora" and r.steps == 4)
    teacher = next(r for r in rows if r.name == "teacher" and r.steps == teacher_steps and r.guidance > 1)
    ratio = getattr(lora, figure) / getattr(teacher, figure)
    facts = {"figure": figure, "teacher_steps": teacher_steps, "at_most": at_most}
    return facts | {"ratio": ratio, "met": ratio <= at_most}


def _followed(scenes: list[Scene], pictures: Tensor) -> float:
    """The share of the pictures that show their scenes."""
    return sum(follows_prompt(s, p) for s, p in zip(scenes, pictures, strict=True)) / len(scenes)


if __name__ == "__main__":
    sys.exit(main())
