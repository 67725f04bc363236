"""The matrix of PCM on a tiny base: phases, guidance modes, plain and adversarial, each trained, measured and drawn.

    python -m phased_consistency.trainer.studies.matrix [--out DIR] [--base tiny-sd15] [--cells smallcfg-4 ...]
        [key=value ...]

Every cell is the preset "demo" with its own objective, on one cache. Its LoRA is sampled at as many steps as
it has phases and compared with the teacher at 40 steps, on prompts and noises that no run has seen. Cells
that are finished are not trained again: once the latents are cached, several processes may each take some
(--cells, --train-only) before one reports.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.config import Config
from ..config.load import load_config
from ..evaluation.distances import SCALE
from ..evaluation.gauge import Gauge
from ..evaluation.guidance import GuidanceTrial
from ..evaluation.intervals import Figure
from ..evaluation.setting import TEACHER, Setting
from ..evaluation.trial import Trial
from ..families import Base, load_base
from ..lora.install import installed
from ..pictures import draw_grid, save_image
from ..reporting.progress import progress_on_stderr
from ..system.files import write_text
from ..training.loop import train

PHASES, MODES = (1, 2, 4, 8), ("smallcfg", "normalcfg")
GUIDANCE = 4.0  # of the teacher, in the reference and in the small-CFG solver step
ADVERSARIAL = ("adversarial.weight=0.1", "adversarial.lr=1e-4")
SWEEP = (1.0, 2.0, 4.0, 6.0, 8.0)
SEED, SHOWN = 1234, 6  # the seed of the noise, and columns of the grids
# Columns of the table: key, head, format, factor.
FIGURES = (
    ("paired_error", "paired error", ".3f", 1),
    ("kernel", f"kernel distance x {SCALE}", ".3g", SCALE),
    ("recall", "recall", ".2f", 1),
    ("diversity_share", "diversity", ".2f", 1),
    ("prompt_followed", "prompt followed", ".2f", 1),
)
FEWER = 32  # prompts of the negative-prompt figures, whose references cost the most


@dataclass(frozen=True)
class Cell:
    """One LoRA of the matrix."""

    mode: str
    phases: int
    adversarial: bool = False

    @property
    def name(self) -> str:
        return f"{self.mode}-{self.phases}{'-adv' if self.adversarial else ''}"

    @property
    def setting(self) -> Setting:
        """The steps and the CFG that it is measured at.

        A small-CFG LoRA has the teacher's guidance in it, and is sampled without any; a normal-CFG one needs it.
        """
        return Setting(self.name, self.phases, 1.0 if self.mode == "smallcfg" else GUIDANCE)

    def config(self, out: Path, base: str, overrides: list[str]) -> Config:
        """The cell's run: the demo's, with this objective."""
        settings = [
            f"base.path={base}",
            f"name={self.name}",
            f"output={out / self.name}",
            f"data.cache={out / 'cache'}",
            f"objective.phases={self.phases}",
            f"objective.guidance_mode={self.mode}",
            "preview.every=0",
            *(ADVERSARIAL if self.adversarial else ()),
        ]
        return load_config(overrides=[*settings, *overrides], preset="demo")


CELLS = [Cell(mode, phases, adv) for mode in MODES for phases in PHASES for adv in (False, True)]


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, measure, write report.json, table.md and grid.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/matrix"))
    parser.add_argument("--base", default="tiny-sd15")
    parser.add_argument("--cells", help="these alone, with commas: smallcfg-4,normalcfg-8-adv")
    parser.add_argument("--train-only", action="store_true", help="no report")
    parser.add_argument("--pictures", type=int, default=128, help="held-out prompts in the report")
    parser.add_argument("overrides", nargs="*", help="key=value settings over the preset")
    args = parser.parse_args(argv)
    chosen = [c for c in CELLS if args.cells is None or c.name in args.cells.split(",")]
    if not chosen:
        parser.error(f"no such cells: {args.cells}; available: {', '.join(c.name for c in CELLS)}")
    configs = {cell: cell.config(args.out, args.base, args.overrides) for cell in chosen}
    for config in configs.values():
        with progress_on_stderr() as bar:
            train(config, bar)
    if not args.train_only:
        write_matrix(args.out, args.base, configs, args.pictures)
    return 0


def write_matrix(out: Path, path: str, configs: dict[Cell, Config], number: int) -> None:
    """Measure every cell and the teacher, and write report.json, table.md, grid.png and negative.png."""
    base = load_base(path)
    reference = Setting(TEACHER, 40, GUIDANCE)
    gauge = Gauge.on_held_out(base, number, SEED, reference)
    prompts = gauge.judge.prompts.texts
    samples = {reference: gauge.floor}
    for setting in (Setting(TEACHER, steps, guidance) for guidance in (GUIDANCE, 1.0) for steps in PHASES[::-1]):
        samples[setting] = gauge.sample(setting)
    for cell, config in configs.items():
        with installed(lora_file(config), base) as recipe:
            samples[cell.setting] = gauge.sample(cell.setting, recipe)
        bare = gauge.without(cell.setting, recipe)
        if bare not in samples:
            samples[bare] = gauge.sample(bare, recipe)

    rows = [setting.as_dict() | gauge.figures(sample) for setting, sample in samples.items()]
    pictures = [(setting.label, sample.examples) for setting, sample in samples.items()]
    save_image(draw_grid(pictures, prompts[:SHOWN]), out / "grid.png")
    responses = negative_prompts(out, base, prompts[:FEWER], configs)
    report = {"rows": rows, "guidance": responses, "pictures": number, "base": path}
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    write_text(out / "table.md", table(rows, responses))
    print((out / "table.md").read_text())


def lora_file(config: Config) -> Path:
    """Where a finished run left its LoRA."""
    return config.run_folder / f"{config.name}.safetensors"


def negative_prompts(out: Path, base: Base, prompts: list[str], configs: dict[Cell, Config]) -> list[dict]:
    """The effects of CFG and a negative prompt on the teacher and the 4-phase LoRAs of both modes; draws negative.png.

    A prompt's negative is the next one. Each entry's change: |with - without| / |without| of the negative
    prompt; agreement: the cosine between that change and the teacher's; sweep: paired error against the
    teacher at 40 steps of the same CFG.
    """
    cells = [(c, configs[c]) for c in (Cell(mode, 4) for mode in MODES) if c in configs]
    if not cells:
        return []
    guided = GuidanceTrial(Trial.of(base, prompts, SEED), base, prompts, Setting(TEACHER, 40, GUIDANCE))
    responses, pictures = [], []

    def add(setting: Setting, swept: dict[float, Tensor], avoided: Tensor) -> None:
        sweep = {g: error.as_dict() for g, error in guided.errors(swept).items()}
        response = guided.response(GUIDANCE, swept[GUIDANCE], avoided)
        facts = {"name": setting.name, "steps": setting.steps, "sweep": sweep}
        responses.append(facts | {key: figure.as_dict() for key, figure in response.items()})
        name = f"{setting.name}, {setting.steps}"
        pictures.extend([(name, swept[GUIDANCE]), ("with negative", avoided)])

    add(guided.setting, {g: guided.reference(g) for g in SWEEP}, guided.reference(GUIDANCE, avoiding=True))
    for cell, config in cells:
        setting = Setting(cell.name, 4, GUIDANCE)
        with installed(lora_file(config), base) as recipe:
            swept = guided.sweep(setting, recipe, SWEEP)
            avoided = guided.avoiding.latents(setting, base, recipe)
        add(setting, swept, avoided)
    grid = draw_grid([(f"{n}\nCFG {GUIDANCE:g}", base.decode(x[:SHOWN])) for n, x in pictures], prompts[:SHOWN])
    save_image(grid, out / "negative.png")
    return responses


def table(rows: list[dict[str, Any]], responses: list[dict[str, Any]]) -> str:
    """The report as Markdown; every figure with its 95 % confidence interval."""
    columns = [column for column in FIGURES if column[0] in rows[0] | rows[0]["spaces"]["latents"]]
    lines = [f"| | steps | CFG | evaluations | {' | '.join(head for _, head, *_ in columns)} |"]
    lines.append("|---" * (4 + len(columns)) + "|")
    for r in rows:
        figures = r | r["spaces"]["latents"]
        cells = " | ".join(_cell(figures[key], form, factor) for key, _, form, factor in columns)
        lines.append(f"| {r['who']} | {r['steps']} | {r['guidance']:g} | {r['evaluations']} | {cells} |")
    heads = " | ".join(f"error at CFG {g:g}" for g in SWEEP)
    lines += ["", f"| | steps | a negative prompt's change | agreement with the teacher's | {heads} |"]
    lines.append("|---" * (4 + len(SWEEP)) + "|")
    for r in responses:
        cells = " | ".join(_cell(figure, ".3f") for figure in (r["change"], r["agreement"], *r["sweep"].values()))
        lines.append(f"| {r['name']} | {r['steps']} | {cells} |")
    return "\n".join(lines) + "\n"


def _cell(figure: dict[str, float], form: str, factor: float = 1) -> str:
    return format(Figure(**figure) * factor, form)


if __name__ == "__main__":
    sys.exit(main())
