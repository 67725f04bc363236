"""The README's tables, made from the code: `python tests/readme_tables.py` writes them, test_readme.py compares."""

from __future__ import annotations

import re
from pathlib import Path

from phased_consistency.samplers import Recipe, recipe_for_file
from phased_consistency.samplers.recipe import FAMILIES
from phased_consistency.trainer.config.config import Config, TrainConfig
from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.config.presets import PRESETS

README = Path(__file__).parent.parent / "README.md"
PUBLISHED = {
    "pcm_*_smallcfg_*step_converted": [f"pcm_{f}_smallcfg_{n}step" for f in ("sd15", "sdxl") for n in (2, 4, 8, 16)],
    "pcm_*_normalcfg_*step_converted": [f"pcm_{f}_normalcfg_{n}step" for f in ("sd15", "sdxl") for n in (4, 8, 16)],
    "pcm_*_lcmlike_lora_converted": [f"pcm_{f}_lcmlike_lora" for f in ("sd15", "sdxl")],
    "pcm_deterministic_*step_shift1": [f"pcm_deterministic_{n}step_shift1" for n in (2, 4)],
    "pcm_deterministic_4step_shift3": ["pcm_deterministic_4step_shift3"],
    "pcm_stochastic_shift3": ["pcm_stochastic_shift3"],
    "lcm-lora-*": ["lcm-lora-sdv1-5", "lcm-lora-sdxl"],
    "TCD-*-LoRA": ["TCD-SD15-LoRA", "TCD-SD21-base-LoRA", "TCD-SDXL-LoRA"],
    "Hyper-*-*steps-lora": [f"Hyper-{f}-{n}steps-lora" for f in ("SD15", "SDXL") for n in (2, 4, 8)],
    "Hyper-*-1step-lora": [f"Hyper-{f}-1step-lora" for f in ("SD15", "SDXL")],
    "Hyper-SD15-*steps-CFG-lora, Hyper-SDXL-*steps-CFG-lora": [
        f"Hyper-{f}-{n}steps-CFG-lora" for f in ("SD15", "SDXL") for n in (8, 12)
    ],
    "Hyper-SD3-*steps-CFG-lora": [f"Hyper-SD3-{n}steps-CFG-lora" for n in (4, 8, 16)],
    "sdxl_lightning_*step_lora": [f"sdxl_lightning_{n}step_lora" for n in (2, 4, 8)],
    "dmd2_sdxl_4step_lora": ["dmd2_sdxl_4step_lora"],
    "flash-sd, FlashSDXL": ["flash-sd", "FlashSDXL"],
    "flash-sd3": ["flash-sd3"],
    "sd_xl_turbo_lora*": ["sd_xl_turbo_lora_v1"],
}


def settings_table() -> str:
    """One row a kind of published file: what its files share, or what each has, in their order."""
    lines = ["| file | family | steps | CFG | negative prompt | mode |", "|---|---|---|---|---|---|"]
    for kind, names in PUBLISHED.items():
        recipes = [recipe_for_file(f"{name}.safetensors", {}) for name in names]
        rows = (
            (
                FAMILIES[r.family],
                f"{r.steps}" if r.mode == "deterministic" else f"{r.steps} (any)",
                f"{r.guidance:g} ({r.guidance_min:g} to {r.guidance_max:g})",
                "yes" if r.negative_prompts else "no",
                _mode(r),
            )
            for r in recipes
        )
        cells = (", ".join(dict.fromkeys(column)) for column in zip(*rows, strict=True))
        lines.append(f"| {', '.join(f'`{k}`' for k in kind.split(', '))} | {' | '.join(cells)} |")
    lines.append("| any LoRA of this trainer | from its header | its phases | its own | normal-CFG ones | its own |")
    return "\n".join(lines)


def _mode(recipe: Recipe) -> str:
    levels = ", LCM's levels" if recipe.distilled and recipe.prediction != "flow" else ""
    shift = "" if recipe.shift is None else f", shift {recipe.shift:g}"
    strength = "" if recipe.strength == 1 else f", strength {recipe.strength:g}"
    return recipe.mode_text + levels + shift + strength


def presets_table() -> str:
    """One row for the PCM presets that differ in their phases alone, and one for each relative in all families."""
    rows: dict[tuple, dict[str, tuple[str, ...]]] = {}
    for name, preset in PRESETS.items():
        config = load_config(preset=name)
        cells = (_weights(config), _learning(config.train), _teacher(config), preset.source, preset.cost)
        relative = config.objective.name != "pcm" and config.base.family
        rows.setdefault((config.objective.name, preset.source) if relative else cells, {})[f"`{name}`"] = cells
    lines = [
        "| presets | rank / alpha | lr, batch, updates | teacher | where the numbers come from | cost |",
        "|---|---|---|---|---|---|",
    ]
    for presets in rows.values():
        cells = ("; ".join(dict.fromkeys(column)) for column in zip(*presets.values(), strict=True))
        lines.append(f"| {' '.join(presets)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _weights(config: Config) -> str:
    lora = config.lora
    return "no LoRA: all weights" if config.base.path == "digits" else f"{lora.rank} / {lora.alpha:g}"


def _learning(train: TrainConfig) -> str:
    batch = f"{train.batch_size}" + (f" x {train.accumulation}" if train.accumulation > 1 else "")
    return f"{train.lr:g}, {batch}, {train.steps}"


def _teacher(config: Config) -> str:
    objective, adversarial = config.objective, config.adversarial
    teacher = "unguided" if objective.needs_teacher else "none: pictures"
    if objective.guided():
        teacher = "CFG " + "-".join(f"{g:g}" for g in sorted(set(objective.guidance)))
    return teacher + (f", adversarial {adversarial.weight:g}, lr {adversarial.lr:g}" if adversarial.weight else "")


TABLES = {"settings": settings_table, "presets": presets_table}


def block(name: str) -> re.Pattern:
    """Matches one generated block of the README; group 2 is its content."""
    return re.compile(rf"(<!-- {name} -->\n)(.*?)(\n<!-- /{name} -->)", re.S)


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        text = text.replace(block(name).search(text)[2], make())
    README.write_text(text, encoding="utf-8")
