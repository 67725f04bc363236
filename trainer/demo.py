"""`make demo`: distil a 4-phase LoRA from the bundled emoji base, and show what it is worth.

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
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config.config import Config
from .config.load import load_config
from .evaluation.contestants import TINY_GUIDANCE
from .evaluation.distances import SCALE
from .evaluation.features import CLASSIFIER
from .evaluation.gauge import Gauge
from .evaluation.intervals import Figure
from .evaluation.judge import SHOWN
from .evaluation.setting import TEACHER, Setting
from .families import load_base
from .lora.install import installed
from .pictures import draw_grid, save_image
from .reporting.progress import progress_on_stderr
from .system.files import write_text
from .system.machine import best_device
from .training.loop import train

NOISE = 1234  # the seed of the report's
REFERENCE = Setting(TEACHER, 40, TINY_GUIDANCE)
TRAINED, UNTRAINED = Setting("lora", 4, 1.0), Setting("lora", 4, 1.0, untrained=True)  # which the goals compare
SETTINGS = [
    *(Setting(TEACHER, steps, TINY_GUIDANCE) for steps in (4, 2)),
    UNTRAINED,
    *(replace(TRAINED, steps=steps) for steps in (1, 2, 4, 8)),
]
# What the LoRA must reach at 4 steps: of the teacher's prompts, and of the distance that it has unless it learns.
LEAST_FOLLOWED, MOST_DISTANCE = 0.9, 0.35


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate, write; returns 0, or 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts in the report, two pictures of each")
    parser.add_argument("overrides", nargs="*", help="key=value settings over the preset")
    args = parser.parse_args(argv)
    settings = [f"train.seed={args.seed}", f"output={args.out / 'run'}", *args.overrides]
    config = load_config(overrides=settings, preset="demo")

    started = time.monotonic()
    with progress_on_stderr() as bar:
        lora = train(config, bar)
    trained = time.monotonic()
    shutil.copyfile(lora, args.out / "lora.safetensors")

    print(f"Comparing it with the teacher on {args.prompts} prompts that it has not seen.", file=sys.stderr)
    report = evaluate(config, args.out, args.prompts)
    report |= {
        "seed": args.seed,
        "training_seconds": round(trained - started, 1),
        "evaluation_seconds": round(time.monotonic() - trained, 1),
    }
    write_text(args.out / "report.json", json.dumps(report, indent=2) + "\n")
    print(table(report), file=sys.stderr)
    return 0 if all(goal["met"] for goal in report["goals"]) else 1


def evaluate(config: Config, out: Path, number: int) -> dict[str, Any]:
    """Write grid.png and return the report of out/lora.safetensors on `number` held-out prompts."""
    base = load_base(config.base.path, device=best_device())
    gauge = Gauge.on_held_out(base, number, NOISE, REFERENCE)
    samples = {REFERENCE: gauge.floor}
    with installed(out / "lora.safetensors", base) as recipe:
        samples |= {setting: gauge.sample(setting, recipe) for setting in SETTINGS}
    rows = [(setting.label, look.examples) for setting, look in samples.items()]
    save_image(draw_grid(rows, gauge.judge.prompts.texts[:SHOWN]), out / "grid.png")

    figures = {}
    for setting, look in samples.items():
        measured = gauge.figures(look)
        in_space = measured.pop("spaces")[CLASSIFIER]
        figures[setting] = measured | {"distance": in_space["kernel"], "recall": in_space["recall"]}
    rows = [setting.as_dict() | row for setting, row in figures.items()]
    return {"rows": rows, "goals": goals(figures), "prompts": number}


def goals(figures: dict[Setting, dict[str, Any]]) -> list[dict[str, Any]]:
    """The LoRA's figures at 4 steps, as ratios to those of the teacher and of the untrained base, and whether they are
    what they must be."""

    def ratio(figure: str, to: Setting) -> float:
        return figures[TRAINED][figure]["value"] / figures[to][figure]["value"]

    followed, distance = ratio("prompt_followed", REFERENCE), ratio("distance", UNTRAINED)
    return [
        {
            "goal": f"prompts followed, at least {LEAST_FOLLOWED} of the teacher's",
            "ratio": followed,
            "met": followed >= LEAST_FOLLOWED,
        },
        {
            "goal": f"distance, at most {MOST_DISTANCE} of the untrained base's",
            "ratio": distance,
            "met": distance <= MOST_DISTANCE,
        },
    ]


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    head = f"{'':19} steps  CFG  evaluations  prompts followed, %    distance x {SCALE}        paired error"
    lines = [
        f"{row['who']:19} {row['steps']:5} {row['guidance']:4g} {row['evaluations']:12}  "
        f"{Figure(**row['prompt_followed']) * 100:5.1f}  {Figure(**row['distance']) * SCALE:6.1f}  "
        f"{Figure(**row['paired_error']):.3f}"
        for row in report["rows"]
    ]
    verdicts = [
        f"LoRA at 4 steps, {goal['goal']}: {goal['ratio']:.2f}, {'met' if goal['met'] else 'MISSED'}"
        for goal in report["goals"]
    ]
    return "\n".join([head, *lines, *verdicts])


if __name__ == "__main__":
    sys.exit(main())
