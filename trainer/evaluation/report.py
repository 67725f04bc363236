"""`pcm evaluate`: LoRAs and the teacher's solvers on the same prompts and noises, as report.json, report.md, pictures.

Every figure is against the reference, the teacher at many steps: the paired error against its picture from the same
noise, all others against a set of its pictures from other noise. Beside them stands the reference itself, measured like
the others: that is the floor. Every figure has a 95 % confidence interval.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...samplers.lora_file import file_hash, read_header
from ..families import Base, family_of
from ..lora.install import installed, load_for_sample, mismatches, remarks
from ..lora.merged import merge_into
from ..pictures import draw_grid, save_image
from ..system.files import write_text
from ..system.machine import best_device, package_version
from . import plots
from .contest import Contest, cost
from .contestants import (
    Contestant,
    choose_prompts,
    find_contestants,
    teacher_guidance,
    tells_most,
)
from .features import Absent, ClipScore, find_features, own_spaces
from .gauge import NOISES, Gauge
from .judge import SHOWN, Judge
from .markdown import markdown
from .setting import TEACHER, Setting
from .trial import Trial

REFERENCE_STEPS = 40
FEATURES = ("latents", "pixels", "inception")
CELL = 192  # the largest side of the grid's pictures
LEAST = 4  # pictures of which there can be an interval


def evaluate(
    base: str,
    loras: list[Path],
    out: Path,
    *,
    steps: list[int],
    prompts: str | None = None,
    pictures: int = 64,
    seed: int = 0,
    guidance: float | None = None,
    features: list[str] | None = None,
    clip: Path | None = None,
    resolution: int | None = None,
    dtype: str = "fp32",
    merged: Sequence[str] = (),
    say: Callable[[str], None] = print,
    **loading,
) -> dict[str, Any]:
    """Make the report, write it into `out`, and return it.

    steps: the numbers of steps for the LoRAs. guidance: the teacher's CFG; default: see `teacher_guidance`.
    features: names or folders (see `find_features`); default: `FEATURES`, and a bundled base's own. clip: folder for
    the CLIP score. merged: style LoRAs that are of the base, as in `base.loras`. loading: keywords of
    `load_for_sample`. say: called with each line of progress. Raises ValueError or FileNotFoundError for bad
    input, before anything is loaded where it can be seen by then.
    """
    if pictures < LEAST:
        raise ValueError(f"--pictures is {pictures}; a report compares sets, so make it at least {LEAST}, 64 is usual.")
    if guidance is not None and guidance < 1:
        raise ValueError(f"--guidance is {guidance:g}; the teacher's CFG scale is 1 (none) or more, 7.5 is usual.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is {out}, which is a file. Give a folder.")

    # All that reads small files comes before the base is loaded, so that a wrong name is told in a second.
    steps = sorted(set(steps))
    contestants = find_contestants(loras, family_of(base, loading.get("family")), steps)
    chosen = choose_prompts(prompts, base, pictures)
    device = best_device()
    spaces, left_out = find_features(features or FEATURES, device)
    if features is None:
        spaces = own_spaces(chosen.language) + spaces
    scorer = _clip_score(clip, device, left_out)

    guidance = teacher_guidance(contestants, base) if guidance is None else guidance
    loaded = load_for_sample(base, dtype, tells_most(contestants).file, **loading)
    for line in merge_into(loaded, merged):
        say(line)
    warnings = [line for c in contestants for line in _fits(c, loaded, guidance)]

    judge = Judge(loaded, spaces, chosen, scorer)
    reference = Setting(TEACHER, REFERENCE_STEPS, guidance)
    trial = Trial.of(loaded, chosen.texts, seed, resolution=resolution)
    contest = Contest(Gauge(loaded, judge, trial, reference), say)
    contest.run(contestants, steps)
    figures = contest.figures()

    report = {
        "base": loaded.path,
        "family": loaded.name,
        "base_hash": loaded.base_hash,
        "base_loras": [Path(place).name for place in merged],
        "loras": [_facts(c) for c in contestants],
        "pictures": pictures,
        "noises": NOISES,
        "resolution": resolution or loaded.default_resolution,
        "seed": seed,
        "prompts": chosen.as_dict(),
        "reference": reference.as_dict(),
        **figures,
        "warnings": warnings,
        "left_out": left_out + contest.left_out,
        "device": device.type,
        "dtype": dtype,
        "versions": {"phased-consistency": package_version()} | {n: version(n) for n in ("torch", "diffusers")},
    }
    _write(out, report, contest, chosen.texts)
    return report


def _clip_score(folder: Path | None, device: torch.device, left_out: list[str]) -> ClipScore | None:
    """The scorer, or None with the reason added to `left_out`."""
    if folder is None:
        left_out.append("CLIP score: no model given. Name the folder of one with --clip.")
        return None
    try:
        return ClipScore(folder, device)
    except Absent as missing:
        left_out.append(f"CLIP score: {missing}")
        return None


def _fits(contestant: Contestant, base: Base, guidance: float) -> list[str]:
    """Try the LoRA in the base before any sampling. Returns sentences that the report's reader must know."""
    with installed(contestant.file, base) as recipe:
        warnings = mismatches(recipe, base) + remarks(read_header(contestant.file))
    if recipe is None:
        warnings.append(
            f"{contestant.name} has no recipe in its header, and is no known file: sampled with DDIM's steps on "
            "trailing levels at CFG 1."
        )
    elif recipe.guidance_mode == "normalcfg" and recipe.guidance != guidance:
        warnings.append(
            f"{contestant.name} is sampled at its own CFG {recipe.guidance:g}, the reference at {guidance:g}: its "
            "errors hold that difference too. The CFG sweep compares like with like, and so does --guidance "
            f"{recipe.guidance:g}."
        )
    return warnings


def _facts(contestant: Contestant) -> dict[str, Any]:
    """The report's entry on a LoRA's file."""
    recipe = contestant.recipe
    facts = {"name": contestant.name, "file": contestant.file.name, "sha256": file_hash(contestant.file)}
    return facts | {"recipe": recipe and asdict(recipe), "use": recipe and recipe.usage_hint()}


def _write(out: Path, report: dict[str, Any], contest: Contest, prompts: list[str]) -> None:
    """Write report.json, report.md, grid.png and the plots.

    The grid leaves out rows that show nothing new: the teacher without guidance, and other solvers than DDIM
    at one step, where they are all the same.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    write_text(out / "report.md", markdown(report))

    reference = contest.gauge.reference
    guidance = reference.guidance
    single = Setting(TEACHER, 1, guidance)
    is_new = lambda s: s.guidance == guidance and (s.steps > 1 or s == single)  # noqa: E731
    order = sorted(contest.samples, key=lambda s: (s != reference, s.evaluations, s.name == TEACHER))
    rows = [(_wrapped(s), contest.samples[s].examples) for s in order if s.name != TEACHER or is_new(s)]
    side = min(CELL, rows[0][1].shape[-1])
    save_image(draw_grid(rows, prompts[:SHOWN], max(96, side)), out / "grid.png")
    plots.draw(report, out)


def _wrapped(setting: Setting) -> str:
    """A setting's label for the grid's narrow margin."""
    who = "\n".join(textwrap.wrap(setting.who, 19, break_on_hyphens=False))
    steps, guidance, evaluations = cost(setting)
    return f"{who}\n{steps}, {guidance}\n{evaluations}"
