"""The documents: their generated blocks, their commands, their links.

    python tests/house/pages.py              write every generated block from the code
    python tests/house/pages.py --commands   print the commands that CI runs, in the order of the pages

test_pages.py compares the blocks with the code, looks for every link, and parses every command.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import typer

from phased_consistency.samplers import Recipe, recipe_for_file
from phased_consistency.samplers.families import family_title
from phased_consistency.trainer.cli.main import app
from phased_consistency.trainer.config.config import MAY_CHANGE
from phased_consistency.trainer.config.load import flat, load_config
from phased_consistency.trainer.config.reference import SettingRow, presets, sections, settings
from phased_consistency.trainer.efficiency.memory import MARGIN, PEAKS, estimate_memory
from phased_consistency.trainer.families import FAMILIES as MODELS
from phased_consistency.trainer.objectives import OBJECTIVES, Objective

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
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
    "sdxl_tdd_lora_weights": ["sdxl_tdd_lora_weights"],
}
# what fits which GPU: the goal, a preset, and what is changed in it
FITTING = (
    ("SD1.5, 512 px, 8 GB", "sd15-4step", "train.batch_size=10", "train.accumulation=2"),
    ("SDXL, 1024 px, 12 GB", "sdxl-4step", "base.quantize=int8"),
    ("the same without 8 bits", "sdxl-4step", "train.offload=true"),
    ("SD3-medium, 1024 px, 16 GB", "sd3-4step"),
    ("SD3-medium, adversarial", "sd3-4step-adv", "base.quantize=int8"),
)
BAR = "\\|"  # within a cell of a table
BREAK = "<br>"  # the same
NOT_RUN = ("# needs ", "# takes ")  # how a fence begins whose commands CI does not run
RUNNABLE = ("pcm ", "python -m phased_consistency")


# --- the documents


def pages() -> list[Path]:
    """Every page that is written for readers of the repository, the README first."""
    others = [ROOT / "BENCHMARKS.md", ROOT / "CHANGELOG.md"]
    docs = sorted((ROOT / "docs").rglob("*.md"), key=lambda page: (len(page.parts), page))
    return [README, *docs, *others]


def fences(text: str) -> list[tuple[str, str]]:
    """The kind and the content of every fenced block of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)


@dataclass(frozen=True)
class Command:
    """A line of a page's fence, and why CI does not run it ("" where it does)."""

    page: str
    line: str
    not_run: str


def commands() -> Iterator[Command]:
    """Every runnable line in the fences of the pages, in their order; repeated where pages repeat it."""
    for page in pages():
        for _, content in fences(page.read_text(encoding="utf-8")):
            lines = content.splitlines()
            not_run = lines[0] if lines and lines[0].startswith(NOT_RUN) else ""
            for line in lines:
                if line.startswith(RUNNABLE):
                    yield Command(page.relative_to(ROOT).as_posix(), line, not_run)


# --- docs/settings.md


def settings_table() -> str:
    """One row a kind of published file: what its files share, or what each has, in their order."""
    rows = []
    for kind, names in PUBLISHED.items():
        recipes = [recipe_for_file(f"{name}.safetensors", {}) for name in names]
        cells = [
            (
                family_title(recipe.family),
                f"{recipe.steps}" if recipe.mode == "deterministic" else f"{recipe.steps} (any)",
                f"{recipe.guidance:g} ({recipe.guidance_min:g} to {recipe.guidance_max:g})",
                "yes" if recipe.negative_prompts else "no",
                _mode(recipe),
            )
            for recipe in recipes
        ]
        rows.append([_names(kind), *_shared(cells)])
    rows.append(["any LoRA of this trainer", "from its header", "its phases", "its own", "normal-CFG ones", "its own"])
    return _table(["file", "family", "steps", "CFG", "negative prompt", "mode"], rows)


def software_table() -> str:
    """What samples each kind of published file elsewhere, as its recipe says it: of its file for 4 steps, or the
    first."""
    rows = []
    for kind, names in PUBLISHED.items():
        recipes = [recipe_for_file(f"{name}.safetensors", {}) for name in names]
        recipe = next((recipe for recipe in recipes if recipe.steps == 4), recipes[0])
        words = recipe.usage_hint().split("; ", 1)[1].split(", or the PCM nodes")[0]
        host, _, diffusers = words.rpartition("diffusers ")
        host = host.removeprefix("ComfyUI sampler and scheduler ").removesuffix(", ")
        rows.append([_names(kind), f"{recipe.steps}", host or "none: only these nodes", diffusers or "none"])
    return _table(["file", "steps", "ComfyUI's sampler + scheduler", "diffusers' scheduler"], rows)


def _names(kind: str) -> str:
    return ", ".join(f"`{name}`" for name in kind.split(", "))


def _mode(recipe: Recipe) -> str:
    levels = ", LCM's levels" if recipe.distilled and recipe.prediction != "flow" else ""
    shift = "" if recipe.shift is None else f", shift {recipe.shift:g}"
    strength = "" if recipe.strength == 1 else f", strength {recipe.strength:g}"
    return recipe.mode_text + levels + shift + strength


# --- docs/presets.md


def presets_table() -> str:
    """One row for the PCM presets that differ in their phases alone, and one for each relative in all families."""
    groups: dict[tuple, dict[str, tuple[str, ...]]] = {}
    for name, row in presets().items():
        config, cells = load_config(preset=name), astuple(row)
        is_relative = config.objective.name != "pcm" and config.base.family
        key = (config.objective.name, row.source) if is_relative else cells
        groups.setdefault(key, {})[name] = cells
    rows: list[list[str]] = []
    printed: set[str] = set()
    for group in groups.values():
        columns = zip(*group.values(), strict=True)
        *cells, source = (column[0] if len(set(column)) == 1 else BREAK.join(column) for column in columns)
        sentences = re.split(r"(?<=\.) ", source)
        news = [sentence for sentence in sentences if sentence not in printed]
        printed.update(sentences)
        words = " ".join(["As above."] * (news != sentences) + news)
        words = re.sub(r"docs/(measurements/\w+\.md)", r"[\1](\1)", words)
        rows.append([BREAK.join(f"`{name}`" for name in group), *cells, words])
    heads = ["presets", "rank / alpha", "lr", "batch, updates", "teacher", "seen, or time", "where from"]
    return _table(heads, rows)


# --- docs/memory.md


def memory_table() -> str:
    """The three largest moments of runs that fit common GPUs, as a dry run prints them."""
    rows = []
    for goal, preset, *changes in FITTING:
        config = load_config(overrides=changes, preset=preset)
        gib = estimate_memory(config, MODELS[config.base.family])["gib"]
        moments = [next(value for name, value in gib.items() if name.startswith(peak)) for peak in PEAKS]
        command = " ".join(["pcm train --preset", preset, *changes, "--dry-run"])
        cells = [f"{value:.2f}" for value in moments]
        rows.append([goal, f"`{command}`", *cells, f"{max(moments) * MARGIN:.1f}"])
    return _table(["goal", "command", "training", "previews", "before", f"largest + {MARGIN - 1:.0%}"], rows)


# --- docs/objectives.md


def objectives_table() -> str:
    """One row an objective: what it is, what it learns from, how its LoRA is sampled, the paper."""
    rows = []
    for name, kind in OBJECTIVES.items():
        source = "the teacher" if kind.needs_teacher else "your pictures"
        judge = ", and a discriminator" if kind.adversarial == "required" else ""
        judge += ", and a critic, on prompts alone" if kind.matching else ""
        paper = re.search(r"arXiv (\d+\.\d+)", sys.modules[kind.__module__].__doc__)[1]
        link = f"[{paper}](https://arxiv.org/abs/{paper})"
        rows.append([f"`{name}`", kind.model_fields["name"].description, source + judge, _sampled(kind()), link])
    return _table(["`objective.name`", "what it is", "learns from", "its LoRA is sampled", "paper"], rows)


def _sampled(objective: Objective) -> str:
    recipe = objective.sampling()
    if recipe["gamma"] == 0:
        return "in as many steps as `phases`, deterministic"
    noise = "with fresh noise" if recipe["gamma"] == 1 else f"with gamma {recipe['gamma']:g}"
    phased = "; with `phases` above 1 as `pcm`" if hasattr(objective, "phases") else ""
    return f"in any few steps, {noise}{phased}"


# --- docs/config.md


def config_tables() -> str:
    """Every setting: a section each, the objectives' together, and what may change between two starts."""
    rows: dict[str, list[SettingRow]] = {}
    for row in settings():
        rows.setdefault(row.key.rpartition(".")[0], []).append(row)
    heads = ["key", "type", "default", "bounds", "what it does"]
    parts = []
    for name, model in sections().items():
        title = f"`[{name}]`" if name else "At the top"
        table = _table(heads, [[f"`{row.key}`", *_cells(row)] for row in rows[name]])
        parts.append(f"## {title}\n\n{' '.join(inspect.getdoc(model).split())}\n\n{table}")
        if name == "lora":
            parts.append(_objectives_settings(rows["objective"]))
    return "\n\n".join([*parts, _resumable()])


def _objectives_settings(settings: list[SettingRow]) -> str:
    """The settings of all objectives, with whose they are."""
    choice, *others = settings
    rows = [
        [
            f"`{row.key}`",
            "all" if len(row.objectives) == len(OBJECTIVES) else ", ".join(row.objectives),
            *_cells(row),
        ]
        for row in others
    ]
    about = (
        f"`objective.name` is one of {choice.bounds}; `pcm` by default. What each is: [objectives.md](objectives.md)."
    )
    heads = ["key", "of", "type", "default", "bounds", "what it does"]
    return f"## `[objective]`\n\n{about}\n\n{_table(heads, rows)}"


def _cells(row: SettingRow) -> list[str]:
    """Type, default, bounds and description of a setting."""
    return [row.type, row.default, row.bounds, row.description.replace("<", "&lt;")]


def _resumable() -> str:
    """The settings in which two starts of one run may differ."""
    config = load_config(preset="demo")
    every = flat(config.model_dump(mode="json"))
    deciding = flat(config.what_decides_the_weights())
    free = [f"`{key}`" for key in every if key in MAY_CHANGE or key not in {*deciding, "output"}]
    title = "## What may change between two starts"
    about = "A change of any other setting is shown and refused, unless you add `--accept-changes`."
    return f"{title}\n\n{', '.join(free)}.\n\n{about}"


# --- docs/cli.md


def verbs() -> list[tuple[str, Any]]:
    """Every command (click's) with its words, such as "edit inpaint"."""
    top = typer.main.get_command(app).commands.items()
    inner = [(f"{name} {word}", verb) for name, group in top for word, verb in getattr(group, "commands", {}).items()]
    return [*((name, verb) for name, verb in top if not hasattr(verb, "commands")), *inner]


def cli_list() -> str:
    """A heading, a line and an example for each verb, in the groups of `pcm --help`."""
    groups: dict[str, list[str]] = {}
    run_elsewhere = {command.line for command in commands() if command.page != "docs/cli.md" and not command.not_run}
    for words, verb in verbs():
        panel = getattr(verb, "rich_help_panel", None)
        group = "Editing" if words.startswith("edit ") else panel if isinstance(panel, str) else "Commands"
        about, _, example = inspect.cleandoc(verb.help).partition("\n\nExample: ")
        line = about.split("\n\n")[0].replace("\n", " ")
        example = " ".join(example.split("\n\n")[0].split()) or f"pcm {words} {_needed(verb)}".rstrip()
        mark = "" if example in run_elsewhere else "# needs the files it names, or takes minutes\n"
        text = f"### `pcm {words}`\n\n{line}\n\n```\n{mark}{example}\n```"
        groups.setdefault(group, []).append(text)
    return "\n\n".join(f"## {group}\n\n" + "\n\n".join(texts) for group, texts in groups.items())


def _needed(verb: Any) -> str:
    """What a command cannot do without, with stand-ins."""
    stands_for = {"file": "lora.safetensors", "base": "tiny-sd15", "run": "runs/pcm-lora"}
    words = []
    for parameter in verb.params:
        if parameter.required:
            value = stands_for.get(parameter.name, parameter.name)
            words.append(value if parameter.param_type_name == "argument" else f"--{parameter.name} {value}")
    return " ".join(words)


# --- writing


def _shared(rows: list[tuple[str, ...]]) -> list[str]:
    """Each column's different cells, in their order."""
    return [", ".join(dict.fromkeys(column)) for column in zip(*rows, strict=True)]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(cell.replace('|', BAR) for cell in row)} |" for row in [heads, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


BLOCKS = {
    "docs/settings.md": {"settings": settings_table, "software": software_table},
    "docs/presets.md": {"presets": presets_table},
    "docs/objectives.md": {"objectives": objectives_table},
    "docs/memory.md": {"memory": memory_table},
    "docs/config.md": {"config": config_tables},
    "docs/cli.md": {"cli": cli_list},
}


def block(name: str) -> re.Pattern:
    """Matches one generated block of a page; group 2 is its content."""
    return re.compile(rf"(<!-- {name} -->\n)(.*?)(\n?<!-- /{name} -->)", re.S)


def write() -> None:
    """Every generated block of every page, from the code."""
    for page, blocks in BLOCKS.items():
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        for name, make in blocks.items():
            start, content, end = block(name).search(text).groups()
            text = text.replace(start + content + end, f"{start}{make()}\n{end.lstrip()}")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commands", action="store_true", help="print the commands that CI runs")
    if parser.parse_args().commands:
        print("\n".join(dict.fromkeys(command.line for command in commands() if not command.not_run)))
    else:
        write()
