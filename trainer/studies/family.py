"""PCM and its relatives on a tiny base: the same number of samples seen by each, sampled in every way, compared.

    python -m phased_consistency.trainer.studies.family [--out DIR] [--base tiny-sd15] [--rows pcm-4,lcm]
        [--seeds 0,1,2] [--no-report] [key=value ...]

Every row is the preset "demo" with its own objective and `COMMON`, on one cache of latents that the teacher
made with its guidance; so those that learn from data learn guided pictures too, and all are sampled at CFG 1.
What is finished is not done again: several processes may each take some (--rows, --seeds, --no-report) before
one reports.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from ...samplers import Recipe
from ...samplers.phases import count_steps
from ..config.config import Config
from ..config.load import load_config
from ..evaluation.contestants import unseen_scenes
from ..evaluation.setting import TEACHER, Setting
from ..evaluation.trial import Trial, figures
from ..families import load_base
from ..lora.install import installed
from ..pictures import draw_grid, save_image
from ..reporting.progress import ProgressBar
from ..system.files import write_text
from ..tiny.scenes import follows_prompt
from ..training.loop import train
from .matrix import lora_file

STEPS, SEEDS, GUIDANCE = (1, 2, 4, 8, 16), (0, 1, 2), 4.0
NOISE, SHOWN = 1234, 5  # the seed of the noise, and columns of the grid
# Few points, since what a level learns goes up by one of them at a time; sampled on a finer grid, which 16 steps need.
POINTS, SAMPLED_POINTS = 8, 40
COMMON = (
    f"objective.points={POINTS}",
    "objective.prompt_dropout=0",
    "train.batch_size=16",
    "train.steps=120",
    "train.lr=1e-3",
    "train.trackers=[]",
    "train.report=false",
    "preview.every=0",
    "validation.every=0",
)
# Settings of each row over `COMMON`.
ROWS: dict[str, tuple[str, ...]] = {
    "pcm-4": ("objective.phases=4",),
    "pcm-8": ("objective.phases=8",),
    "lcm": ("objective.name=lcm",),
    "cd": ("objective.name=cd", f"objective.scales={POINTS}"),
    "tcd": ("objective.name=tcd",),
    "ctm": ("objective.name=ctm", "objective.solver_steps=2"),
    "dscd": ("objective.name=dscd",),
    "progressive-4": ("objective.name=progressive", "objective.phases=4", "objective.halvings=2"),
    "ct": ("objective.name=ct",),
    "lcf": ("objective.name=lcf", "objective.phases=1"),
    "ufogen": ("objective.name=ufogen", "adversarial.weight=0.1"),
}
GAMMAS = (0.0, 0.3, 1.0)  # deterministic, TCD's, stochastic


def main(argv: list[str] | None = None) -> int:
    """Train and measure what is missing; write report.json, table.md, plot.png and grid.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/comparison"))
    parser.add_argument("--base", default="tiny-sd15")
    parser.add_argument("--rows", default=",".join(ROWS), help="these alone, with commas")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="of the training, with commas")
    parser.add_argument("--no-report", action="store_true", help="only train and measure")
    parser.add_argument("--pictures", type=int, default=32, help="held-out prompts that are measured")
    parser.add_argument("overrides", nargs="*", help="key=value settings over the preset")
    args = parser.parse_args(argv)
    rows, seeds = args.rows.split(","), [int(seed) for seed in args.seeds.split(",")]
    if unknown := sorted(set(rows) - set(ROWS)):
        parser.error(f"no such rows: {', '.join(unknown)}; available: {', '.join(ROWS)}")

    runs = [(row, _config(row, seed, args)) for seed in seeds for row in rows]
    missing = [(row, config) for row, config in runs if not _figures_file(config).is_file()]
    for _, config in missing:
        with ProgressBar() as bar:
            train(config, bar)

    # only now, so that training has the memory for itself
    comparison = Comparison(args.base, args.pictures)
    for row, config in missing:
        write_text(_figures_file(config), json.dumps(comparison.of_lora(row, config), indent=2) + "\n")
    if not args.no_report:
        write_comparison(args.out, comparison, runs)
    return 0


def _config(row: str, seed: int, args: argparse.Namespace) -> Config:
    """The run of a row and a seed. What the user sets comes last."""
    name = f"{row}-seed{seed}"
    settings = [
        f"base.path={args.base}",
        f"name={name}",
        f"output={args.out / name}",
        f"data.cache={args.out / 'cache'}",
        f"train.seed={seed}",
    ]
    return load_config(overrides=[*settings, *COMMON, *ROWS[row], *args.overrides], preset="demo")


def _figures_file(config: Config) -> Path:
    """Where a run's figures are kept once they are measured."""
    return config.run_folder / "figures.json"


class Comparison:
    """Measures LoRAs on prompts that no run has seen, against a reference: the teacher at 40 guided steps."""

    def __init__(self, path: str, pictures: int):
        self.base = load_base(path)
        self.scenes = unseen_scenes(path, pictures)
        self.prompts = [s.caption for s in self.scenes]
        self.trial = Trial.of(self.base, self.prompts, NOISE)
        self.reference = self.trial.latents(Setting(TEACHER, 40, GUIDANCE), self.base)

    def of_teacher(self) -> list[dict[str, Any]]:
        """Rows of figures: the reference from other noise, which is the least distance that sets without
        shared noise have, and the teacher by each solver, guided and not."""
        other = self.trial.with_noise(NOISE + 1).latents(Setting(TEACHER, 40, GUIDANCE), self.base)
        rows = [self._row(Setting(f"{TEACHER}, other noise", 40, GUIDANCE), other)]
        settings = [Setting(TEACHER, n, GUIDANCE, solver=s) for s in ("ddim", "euler", "dpm++") for n in STEPS[:-1]]
        settings += [Setting(TEACHER, n, 1.0) for n in STEPS]
        return rows + [self._row(setting, self.trial.latents(setting, self.base)) for setting in settings]

    def of_lora(self, row: str, config: Config) -> list[dict[str, Any]]:
        """Rows of figures of one run's LoRA: every gamma at every number of steps."""
        gammas = GAMMAS if row in ("tcd", "ctm") else (0.0, 1.0)
        settings = [Setting(row, n, 1.0, gamma=gamma) for gamma in gammas for n in STEPS]
        with installed(lora_file(config), self.base) as recipe:
            latents = [self.trial.latents(setting, self.base, _finer(recipe)) for setting in settings]
        seed = {"seed": config.train.seed}
        return [self._row(setting, x) | seed for setting, x in zip(settings, latents, strict=True)]

    def pictures(self, row: str, config: Config) -> list[tuple[str, Tensor]]:
        """Rows of the grid: one run's LoRA at four steps, deterministic and stochastic."""
        few = self.trial.first(SHOWN)
        rows = []
        with installed(lora_file(config), self.base) as recipe:
            for gamma in (0.0, 1.0):
                latents = few.latents(Setting(row, 4, 1.0, gamma=gamma), self.base, _finer(recipe))
                rows.append((f"{row}, 4 steps\n{_mode(gamma)}", self.base.decode(latents)))
        return rows

    def _row(self, setting: Setting, latents: Tensor) -> dict[str, Any]:
        """One setting's figures, and the share of its pictures that show what their prompts say."""
        followed = [follows_prompt(s, p) for s, p in zip(self.scenes, self.base.decode(latents), strict=True)]
        facts = {"gamma": setting.gamma, "solver": setting.solver, "followed": mean(followed)}
        return figures(setting, latents, self.reference).as_dict() | facts


def _finer(recipe: Recipe) -> Recipe:
    """The recipe on one grid for all, on which 16 steps are possible; the phases stay the LoRA's own."""
    return replace(recipe, points=SAMPLED_POINTS, sampling_points=None, sampling_from_noise=False)


def write_comparison(out: Path, comparison: Comparison, runs: list[tuple[str, Config]]) -> None:
    """Gather the figures of all runs, and write report.json, table.md, plot.png and grid.png."""
    rows = comparison.of_teacher()
    pictures = [(f"{TEACHER}\n40 steps, CFG {GUIDANCE:g}", comparison.base.decode(comparison.reference[:SHOWN]))]
    for row, config in runs:
        rows += json.loads(_figures_file(config).read_text())
        if config.train.seed == runs[0][1].train.seed:
            pictures += comparison.pictures(row, config)

    save_image(draw_grid(pictures, comparison.prompts[:SHOWN]), out / "grid.png")
    facts = {"pictures": len(comparison.prompts), "base": comparison.base.path, "guidance": GUIDANCE}
    write_text(out / "report.json", json.dumps({"rows": rows} | facts, indent=2) + "\n")
    write_text(out / "table.md", table(rows))
    plot(rows).savefig(out / "plot.png", dpi=110)
    print((out / "table.md").read_text())


def _mode(gamma: float) -> str:
    """A gamma in words."""
    return {0.0: "deterministic", 1.0: "stochastic"}.get(gamma, f"gamma {gamma:g}")


def grouped(rows: list[dict[str, Any]], figure: str) -> dict[tuple[str, str], dict[int, list[float]]]:
    """(name, mode) -> steps -> the figure of every seed. The mode is a gamma's, or the teacher's solver and CFG."""
    groups: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        mode = f"{row['solver']}, CFG {row['guidance']:g}" if row["gamma"] is None else _mode(row["gamma"])
        groups.setdefault((row["name"], mode), {}).setdefault(row["steps"], []).append(row[figure])
    return groups


def table(rows: list[dict[str, Any]]) -> str:
    """Three tables as Markdown: the mean over the seeds, and in brackets half of their range."""
    parts = []
    for title, figure in (
        ("Distance (sliced 2-Wasserstein to the reference)", "distance"),
        ("Paired error (to the reference from the same noise)", "paired_error"),
        ("Share of the pictures that show what the prompt says", "followed"),
    ):
        groups = grouped(rows, figure)
        steps = sorted({n for by_steps in groups.values() for n in by_steps})
        lines = [f"**{title}**", "", f"| | how | {' | '.join(map(count_steps, steps))} |"]
        lines.append("|---" * (2 + len(steps)) + "|")
        for (name, mode), by_steps in groups.items():
            cells = " | ".join(_cell(by_steps[n]) if n in by_steps else "" for n in steps)
            lines.append(f"| {name} | {mode} | {cells} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cell(values: list[float]) -> str:
    spread = f" ({(max(values) - min(values)) / 2:.3f})" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Distance over steps, deterministic and stochastic; bars from the lowest seed to the highest."""
    figure = Figure(figsize=(12.5, 5), layout="constrained")
    groups = grouped(rows, "distance")
    names = list(dict.fromkeys(name for name, mode in groups if mode == "deterministic"))
    panels = [figure.add_subplot(1, 2, i + 1) for i in (0, 1)]
    for panel, mode in zip(panels, ("deterministic", "stochastic"), strict=True):
        for i, name in enumerate(names):
            by_steps = groups[name, mode]
            middle = [mean(v) for v in by_steps.values()]
            below = [m - min(v) for m, v in zip(middle, by_steps.values(), strict=True)]
            above = [max(v) - m for m, v in zip(middle, by_steps.values(), strict=True)]
            panel.errorbar(
                list(by_steps),
                middle,
                yerr=[below, above],
                label=name,
                capsize=2,
                color=f"C{i % 10}",
                linestyle="-" if i < 10 else "--",
                marker="o",
                markersize=4,
            )
        for teacher, dashes in ((f"ddim, CFG {GUIDANCE:g}", "--"), ("ddim, CFG 1", ":")):
            by_steps = groups[TEACHER, teacher]
            middle = [mean(v) for v in by_steps.values()]
            panel.plot(list(by_steps), middle, color="0.5", linestyle=dashes, label=f"teacher, {teacher}")
        panel.set(title=mode, xlabel="steps", ylabel="distance to the teacher's 40 steps", xscale="log", yscale="log")
        panel.set_xticks(STEPS, [str(n) for n in STEPS])
        panel.minorticks_off()
        panel.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    sys.exit(main())
