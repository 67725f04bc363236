"""The README's tables, made from the code: `python tests/readme_tables.py` writes them, test_readme.py compares."""

from __future__ import annotations

import re
from pathlib import Path

from phased_consistency.samplers import recipe_for_file
from phased_consistency.samplers.recipe import FAMILIES
from phased_consistency.trainer.config import load_config
from phased_consistency.trainer.presets import PRESETS

README = Path(__file__).parent.parent / "README.md"
PUBLISHED = (
    *(f"pcm_{f}_smallcfg_{n}step_converted" for f in ("sd15", "sdxl") for n in (2, 4, 8, 16)),
    *(f"pcm_{f}_normalcfg_{n}step_converted" for f in ("sd15", "sdxl") for n in (4, 8, 16)),
    *(f"pcm_{f}_lcmlike_lora_converted" for f in ("sd15", "sdxl")),
    "pcm_deterministic_2step_shift1",
    "pcm_deterministic_4step_shift1",
    "pcm_deterministic_4step_shift3",
    "pcm_stochastic_shift3",
)


def settings_table() -> str:
    """One row a published file (the same settings for SD1.5 and SDXL share one)."""
    rows: dict[tuple, list[str]] = {}
    for name in PUBLISHED:
        r = recipe_for_file(f"{name}.safetensors", {})
        cfg = f"{r.guidance:g} ({r.guidance_min:g} to {r.guidance_max:g})"
        steps = f"{r.steps}" if r.mode == "deterministic" else f"{r.steps} (any)"
        shift = "" if r.shift is None else f", shift {r.shift:g}"
        key = (re.sub("sd15|sdxl", "*", name), steps, cfg, "yes" if r.negative_prompts else "no", r.mode + shift)
        rows.setdefault(key, []).append(FAMILIES[r.family])
    lines = ["| file | family | steps | CFG | negative prompt | mode |", "|---|---|---|---|---|---|"]
    for (name, steps, cfg, negative, mode), families in rows.items():
        lines.append(f"| `{name}` | {', '.join(families)} | {steps} | {cfg} | {negative} | {mode} |")
    lines.append("| any LoRA of this trainer | from its header | its phases | its own | normal-CFG ones | its own |")
    return "\n".join(lines)


def presets_table() -> str:
    """One row for the presets that differ in their phases alone."""
    rows: dict[tuple, list[str]] = {}
    for name, preset in PRESETS.items():
        config = load_config(preset=name)
        lora, train, objective = config.lora, config.train, config.objective
        batch = f"{train.batch_size}" + (f" x {train.accumulation}" if train.accumulation > 1 else "")
        guidance = "-".join(f"{g:g}" for g in sorted(set(objective.guidance)))
        teacher = "unguided" if objective.guidance_mode == "normalcfg" else f"CFG {guidance}"
        adversarial = config.adversarial
        loss = f", adversarial {adversarial.weight:g}, lr {adversarial.lr:g}" if adversarial.weight else ""
        learning = f"{train.lr:g}, {batch}, {train.steps}"
        key = (f"{lora.rank} / {lora.alpha:g}", learning, teacher + loss, preset.source, preset.cost)
        rows.setdefault(key, []).append(f"`{name}`")
    lines = [
        "| presets | rank / alpha | lr, batch, updates | teacher | where the numbers come from | cost |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {' '.join(names)} | {' | '.join(key)} |" for key, names in rows.items()]
    return "\n".join(lines)


TABLES = {"settings": settings_table, "presets": presets_table}


def block(name: str) -> re.Pattern:
    """Matches one generated block of the README; group 2 is its content."""
    return re.compile(rf"(<!-- {name} -->\n)(.*?)(\n<!-- /{name} -->)", re.S)


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        text = text.replace(block(name).search(text)[2], make())
    README.write_text(text, encoding="utf-8")
