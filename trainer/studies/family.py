"""PCM and its relatives on a tiny base, as many evaluations of the network spent on each: sampled, compared, drawn.

    python -m phased_consistency.trainer.studies.family [--out DIR] [--base tiny-emoji] [--rows pcm-4,lcm]
        [--seeds 0,1,2] [--no-report] [--no-training] [key=value ...]

Every row is the preset "demo" with its own objective and `COMMON`, on one cache of latents that the teacher
made with its guidance; so those that learn from data learn guided pictures too, and all are sampled at CFG 1.
What is finished is not done again: several processes may each take some (--rows, --seeds, --no-report) before
one reports. Seed after seed, so that one seed of all rows is there early, and --no-training reports what there is.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from torch import Tensor

from ...samplers import Recipe, Schedule
from ...samplers.phases import count_steps
from ..config.config import Config
from ..config.load import load_config
from ..evaluation.distances import SCALE
from ..evaluation.features import CLASSIFIER
from ..evaluation.gauge import Gauge
from ..evaluation.intervals import Figure
from ..evaluation.plots import plain, with_bars
from ..evaluation.setting import TEACHER, Setting
from ..families import load_base
from ..lora.install import installed
from ..pictures import draw_grid, save_image
from ..reporting.log import read_log
from ..reporting.progress import progress_on_stderr
from ..system.files import write_text
from ..training.loop import train
from .matrix import ADVERSARIAL, lora_file

STEPS, SEEDS, GUIDANCE = (1, 2, 4, 8, 16), (0, 1, 2), 4.0
PARTS, DRAWN = 96, 1024  # of a run, and samples in each, from which evaluations are worked out: all stages divide it
NOISE, SHOWN = 1234, 5  # the seed of the noise, and columns of the grid
EVALUATIONS = 12_000  # of the network, a sample's pass each, that a run may spend: a quarter of the demo's
# Few points, since what a level learns goes up by one of them at a time; sampled on a finer grid, which 16 steps need.
POINTS, SAMPLED_POINTS = 8, 40
COMMON = (
    f"objective.points={POINTS}",
    "objective.prompt_dropout=0",
    "train.batch_size=16",
    "train.lr=1e-3",
    "train.trackers=[]",
    "train.report=false",
    "preview.every=0",
    "validation.every=0",
)
PHASED = ("pcm-2", "pcm-4", "pcm-4-inside", "pcm-8", "pcm-2-adv", "progressive-4", "progressive-4-stages")
PHASED += ("tdm-4", "tdm-2")
# A sample is a whole trajectory here; the warm-up is for few updates.
MATCHING = ("objective.scale=2", "objective.critic_warmup=0", "train.batch_size=4")
# Settings of each row over `COMMON`.
ROWS: dict[str, tuple[str, ...]] = {
    "pcm-4": ("objective.phases=4",),
    "lcm": ("objective.name=lcm",),  # on one grid it is PCM of one phase: the same levels, the same loss
    "pcm-2": ("objective.phases=2",),
    "dscd": ("objective.name=dscd",),
    "tcd": ("objective.name=tcd",),
    "cd": ("objective.name=cd", f"objective.scales={POINTS}"),
    "pcm-8": ("objective.phases=8",),
    "progressive-4": ("objective.name=progressive", "objective.phases=4", "objective.halvings=2"),
    "ctm": ("objective.name=ctm", "objective.solver_steps=2"),
    "pcm-2-adv": ("objective.phases=2", *ADVERSARIAL),
    "pcm-1-adv": ("objective.phases=1", *ADVERSARIAL),
    "ct": ("objective.name=ct",),
    "lcf": ("objective.name=lcf", "objective.phases=1"),
    "ufogen": ("objective.name=ufogen", *ADVERSARIAL),
    "tdm-4": ("objective.name=tdm", "objective.phases=4", *MATCHING),
    "tdm-2": ("objective.name=tdm", "objective.phases=2", *MATCHING),
    "dmd-4": ("objective.name=dmd", "objective.steps=4", *MATCHING),
    "dmd-1": ("objective.name=dmd", "objective.steps=1", *MATCHING),
}
# Settings to try beside the row that they change; these rows are made where --rows names them.
TRIALS: dict[str, tuple[str, ...]] = {
    "pcm-4-inside": (*ROWS["pcm-4"], "objective.inside=0.5"),
    "lcm-output": (*ROWS["lcm"], "objective.distance_in=output", "objective.huber_c=0.03"),
    "lcm-average": (*ROWS["lcm"], "objective.target_ema=0.95"),
    "dscd-noisiest": (*ROWS["dscd"], "objective.noisiest_share=0.2"),
    "ct-noisiest": (*ROWS["ct"], "objective.noisiest_share=0.2"),
    "progressive-4-stages": (
        *ROWS["progressive-4"],
        "train.lr_schedule=stages",
        "objective.average_teaches=true",
    ),
}
ALL_ROWS = ROWS | TRIALS
# 0 is deterministic, 0.3 TCD's, 1 stochastic; phases are chained without noise.
GAMMAS = {"tcd": (0.0, 0.3), "ctm": (0.0, 0.3)} | dict.fromkeys(PHASED, (0.0,))
FLOOR = f"{TEACHER}, the floor"  # the reference itself, measured like the others
# The tables: title, key of the figure, format, factor. Of sets: in the classifier's features, or else in latents.
FIGURES = (
    (f"Kernel distance x {SCALE} (to the reference's pictures from other noise)", "kernel", ".0f", SCALE),
    ("Recall (nearest neighbours)", "recall", ".2f", 1),
    ("Diversity within a prompt, as a share of the reference's", "diversity_share", ".2f", 1),
    ("Paired error (to the reference from the same noise)", "paired_error", ".3f", 1),
    ("Share of the pictures that show what the prompt says", "prompt_followed", ".2f", 1),
)


def main(argv: list[str] | None = None) -> int:
    """Train and measure what is missing; write report.json, table.md, plot.png and grid.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/comparison"))
    parser.add_argument("--base", default="tiny-emoji")
    parser.add_argument("--rows", default=",".join(ROWS), help="these alone, with commas")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="of the training, with commas")
    parser.add_argument("--no-report", action="store_true", help="only train and measure")
    parser.add_argument("--no-training", action="store_true", help="only report, on the runs that are finished")
    parser.add_argument("--pictures", type=int, default=64, help="held-out prompts, two pictures of each")
    parser.add_argument("overrides", nargs="*", help="key=value settings over the preset")
    args = parser.parse_args(argv)
    rows, seeds = args.rows.split(","), [int(seed) for seed in args.seeds.split(",")]
    if unknown := sorted(set(rows) - set(ALL_ROWS)):
        parser.error(f"no such rows: {', '.join(unknown)}; available: {', '.join(ALL_ROWS)}")

    comparison = Comparison(args.base, args.pictures)
    runs = [(row, _config(row, seed, args, comparison.base.schedule)) for seed in seeds for row in rows]
    if args.no_training:
        runs = [(row, config) for row, config in runs if _figures_file(config).is_file()]
        if not runs:
            parser.error(f"no run in {args.out} is finished: leave out --no-training")
    for row, config in runs:
        if _figures_file(config).is_file():
            continue
        with progress_on_stderr() as bar:
            train(config, bar)
        figures = {"training": training(row, config), "rows": comparison.of_lora(row, config)}
        write_text(_figures_file(config), json.dumps(figures, indent=2) + "\n")
    if not args.no_report:
        write_comparison(args.out, comparison, runs)
    return 0


def _config(row: str, seed: int, args: argparse.Namespace, schedule: Schedule) -> Config:
    """The run of a row and a seed, of as many updates as `EVALUATIONS` allow. What the user sets comes last."""
    name = f"{row}-seed{seed}"
    settings = [
        f"base.path={args.base}",
        f"name={name}",
        f"output={args.out / name}",
        f"data.cache={args.out / 'cache'}",
        f"train.seed={seed}",
        *COMMON,
        *ALL_ROWS[row],
    ]
    config = load_config(overrides=[*settings, *args.overrides], preset="demo")
    steps = max(1, round(EVALUATIONS / (config.train.batch_size * evaluations_a_sample(config, schedule))))
    return load_config(overrides=[*settings, f"train.steps={steps}", *args.overrides], preset="demo")


def evaluations_a_sample(config: Config, schedule: Schedule) -> float:
    """How often the network is evaluated for one sample of a run, on average over the run.

    Once for the student; for the teacher's steps, twice where it is guided; for the target, unless it is the teacher's
    own point; twice for a discriminator. Where distributions are matched a sample is a whole trajectory.
    """
    if config.objective.matching:
        return config.objective.passes()
    objective, generator = config.objective, torch.Generator().manual_seed(0)
    solver, steps = objective.teacher_solver()
    teacher = steps * (2 if solver == "heun" else 1) * objective.needs_teacher
    total = 0.0
    for part in range(PARTS):
        progress = (part + 0.5) / PARTS
        levels = objective.levels(DRAWN, schedule, progress, generator)
        guided = objective.draw_guidance(DRAWN, progress, generator) is not None
        total += 1 + teacher * (1 + guided) + (levels.r > levels.s).double().mean().item()
    return total / PARTS + 2 * bool(config.adversarial.weight)


def training(row: str, config: Config) -> dict[str, Any]:
    """What a finished run took: updates, evaluations of the network, a sample's pass each, and seconds.

    The evaluations were counted since the last start that was followed by updates; where the run was killed before,
    those of the updates that came before that start are taken to be as many each.
    """
    lines = pairwise(line for line in read_log(config.run_folder) if line["kind"] in ("start", "end"))
    start, end = [
        (before, after) for before, after in lines if after["kind"] == "end" and after["step"] > before["step"]
    ][-1]
    share = config.train.steps / (end["step"] - start["step"])
    took = {"evaluations": round(end["evaluations"] * share), "seconds": round(end["seconds"] * share)}
    return {"name": row, "seed": config.train.seed, "updates": config.train.steps} | took


def _figures_file(config: Config) -> Path:
    """Where a run's figures are kept once they are measured."""
    return config.run_folder / "measurements.json"


class Comparison:
    """Measures LoRAs on prompts that no run has seen, against a reference: the teacher at 40 guided steps."""

    def __init__(self, path: str, pictures: int):
        self.base = load_base(path)
        self.gauge = Gauge.on_held_out(self.base, pictures, NOISE, Setting(TEACHER, 40, GUIDANCE))
        self.prompts = self.gauge.judge.prompts.texts
        self._untrained: dict[Setting, dict[str, Any]] = {}  # many LoRAs are drawn alike

    def of_teacher(self, file: Path) -> list[dict[str, Any]]:
        """Rows of figures: the reference itself, which is the floor, and the teacher by each solver, guided and not.

        file: where they are kept once they are measured, for another report.
        """
        if file.is_file():
            return json.loads(file.read_text())
        settings = [Setting(TEACHER, n, GUIDANCE, solver=s) for s in ("ddim", "euler", "dpm++") for n in STEPS[:-1]]
        settings += [Setting(TEACHER, n, 1.0) for n in STEPS]
        floor = self.gauge.row(self.gauge.reference) | {"name": FLOOR}
        rows = [floor, *(self.gauge.row(setting) for setting in settings)]
        write_text(file, json.dumps(rows, indent=2) + "\n")
        return rows

    def of_lora(self, row: str, config: Config) -> list[dict[str, Any]]:
        """Rows of figures of one run's LoRA, and of the base without it: every gamma at every number of steps."""
        settings = [Setting(row, n, 1.0, gamma=gamma) for gamma in GAMMAS.get(row, (0.0, 1.0)) for n in STEPS]
        with installed(lora_file(config), self.base) as trained:
            recipe = _finer(trained)
            rows = [self.gauge.row(setting, recipe) for setting in settings]
        rows += [self._of_untrained(self.gauge.without(setting, recipe), recipe) for setting in settings]
        return [row | {"seed": config.train.seed} for row in rows]

    def _of_untrained(self, setting: Setting, recipe: Recipe) -> dict[str, Any]:
        """The row of figures of the base without a LoRA."""
        if setting not in self._untrained:
            self._untrained[setting] = self.gauge.row(setting, recipe)
        return self._untrained[setting]

    def pictures(self, row: str, config: Config) -> list[tuple[str, Tensor]]:
        """Rows of the grid: one run's LoRA at four steps, in each of its ways."""
        with installed(lora_file(config), self.base) as recipe:
            settings = [Setting(row, 4, 1.0, gamma=gamma) for gamma in GAMMAS.get(row, (0.0, 1.0))]
            return [(f"{row}, 4 steps\n{_mode(s.gamma)}", self.drawn(s, _finer(recipe))) for s in settings]

    def drawn(self, setting: Setting, recipe: Recipe | None = None) -> Tensor:
        """Pixels of the first prompts; recipe: as in `Gauge.sample`."""
        return self.base.decode(self.gauge.trials[0].first(SHOWN).latents(setting, self.base, recipe))


def _finer(recipe: Recipe) -> Recipe:
    """The recipe on one grid for all, on which 16 steps are possible; the phases stay the LoRA's own."""
    return replace(recipe, points=SAMPLED_POINTS, sampling_points=None, sampling_from_noise=False)


def write_comparison(out: Path, comparison: Comparison, runs: list[tuple[str, Config]]) -> None:
    """Gather the figures of all runs, and write report.json, table.md, plot.png and grid.png."""
    rows, trained = comparison.of_teacher(out / "teacher.json"), []
    reference = comparison.gauge.reference
    pictures = [(reference.label, comparison.drawn(reference))]
    for row, config in runs:
        measured = json.loads(_figures_file(config).read_text())
        phases = config.grid().phases  # which decide how the base alone is drawn, whatever LoRA it is drawn beside
        untrained = {"name": f"untrained, {phases} phase{'s' * (phases > 1)}"}
        rows += [row | untrained if row["untrained"] else row for row in measured["rows"]]
        trained.append(measured["training"])
        if config.train.seed == runs[0][1].train.seed:
            pictures += comparison.pictures(row, config)

    save_image(draw_grid(pictures, comparison.prompts[:SHOWN]), out / "grid.png")
    facts = {"pictures": len(comparison.prompts), "base": comparison.base.path, "guidance": GUIDANCE}
    write_text(out / "report.json", json.dumps({"training": trained, "rows": rows} | facts, indent=2) + "\n")
    write_text(out / "table.md", f"{training_table(trained)}\n{table(rows)}")
    plot(rows).savefig(out / "plot.png", dpi=110)
    print((out / "table.md").read_text())


def _mode(gamma: float) -> str:
    """A gamma in words."""
    return {0.0: "deterministic", 1.0: "stochastic"}.get(gamma, f"gamma {gamma:g}")


def grouped(rows: list[dict[str, Any]], key: str) -> dict[tuple[str, str], dict[int, list[Figure]]]:
    """(name, mode) -> steps -> the figure of every seed, where rows have it. The mode is a gamma's, or the teacher's
    solver and CFG."""
    groups: dict[tuple[str, str], dict[int, list[Figure]]] = {}
    for row in rows:
        mode = f"{row['solver']}, CFG {row['guidance']:g}" if row["gamma"] is None else _mode(row["gamma"])
        figures = row | row["spaces"].get(CLASSIFIER, row["spaces"]["latents"])
        if key in figures:
            groups.setdefault((row["name"], mode), {}).setdefault(row["steps"], []).append(Figure(**figures[key]))
    return groups


def over_seeds(figures: list[Figure]) -> Figure:
    """The mean of a figure over the seeds of training, from the lowest end of their intervals to the highest."""
    return Figure(mean(f.value for f in figures), min(f.low for f in figures), max(f.high for f in figures))


def training_table(trained: list[dict[str, Any]]) -> str:
    """What each row's training took, as Markdown: means over the seeds."""
    lines = ["| | updates | evaluations of the network | minutes | seeds |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(run["name"] for run in trained):
        runs = [run for run in trained if run["name"] == name]
        evaluations, seconds = (mean(run[key] for run in runs) for key in ("evaluations", "seconds"))
        updates = runs[0]["updates"]
        lines.append(f"| {name} | {updates} | {evaluations:,.0f} | {seconds / 60:.1f} | {len(runs)} |")
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """A table for each figure as Markdown: the mean over the seeds, and in brackets their 95 % intervals together."""
    parts = []
    for title, key, form, factor in FIGURES:
        if not (groups := grouped(rows, key)):
            continue
        steps = sorted({n for by_steps in groups.values() for n in by_steps})
        lines = [f"**{title}**", "", f"| | how | {' | '.join(map(count_steps, steps))} |"]
        lines.append("|---" * (2 + len(steps)) + "|")
        for (name, mode), by_steps in groups.items():
            cells = (format(over_seeds(by_steps[n]) * factor, form) if n in by_steps else "" for n in steps)
            lines.append(f"| {name} | {mode} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def plot(rows: list[dict[str, Any]]) -> Drawing:
    """Kernel distance over steps, deterministic and with fresh noise; bars as in `over_seeds`, the floor as a band."""
    drawing = Drawing(figsize=(12.5, 5), layout="constrained")
    groups = grouped(rows, "kernel")
    ((floor,),) = (by_steps.values() for (name, _), by_steps in groups.items() if name == FLOOR)
    floor = floor[0] * SCALE
    panels = [drawing.add_subplot(1, 2, i + 1) for i in (0, 1)]
    trained = dict.fromkeys(name for name, _ in groups if not name.startswith((TEACHER, "untrained")))
    colours = dict(zip(trained, colormaps["tab20"].colors, strict=False))
    for panel, title in zip(panels, ("deterministic", "stochastic, or with a gamma"), strict=True):
        for (name, way), by_steps in groups.items():
            if name.startswith(TEACHER) or (way == "deterministic") != (title == "deterministic"):
                continue
            bare = name.startswith("untrained")
            style = {"color": "0.6", "linestyle": "-."} if bare else {"color": colours[name], "marker": "o"}
            _line(panel, name, by_steps, **style)
        for way, dashes in ((f"ddim, CFG {GUIDANCE:g}", "--"), ("ddim, CFG 1", ":")):
            _line(panel, f"{TEACHER}, {way}", groups[TEACHER, way], color="0.4", linestyle=dashes)
        panel.axhspan(floor.low, floor.high, color="black", alpha=0.08, linewidth=0, label="the floor")
        panel.set(title=title, xlabel="steps", ylabel=f"kernel distance x {SCALE}", xscale="log")
        panel.set_yscale("symlog", linthresh=max(floor.half_width, 1e-9))
        panel.set_xticks(STEPS, [str(n) for n in STEPS])
        panel.minorticks_off()
        plain(panel)
    drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return drawing


def _line(panel: Axes, label: str, by_steps: dict[int, list[Figure]], **style) -> None:
    """A line over steps, with bars."""
    with_bars(panel, [(n, over_seeds(f) * SCALE) for n, f in by_steps.items()], label=label, markersize=4, **style)


if __name__ == "__main__":
    sys.exit(main())
