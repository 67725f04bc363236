"""`pcm evaluate`: LoRAs and the teacher's solvers on the same prompts and noises, as report.json, report.md, pictures.

Every figure is against the reference, the teacher at many steps. Sets are compared in each space of features.
Beside them stands the distance of the reference to itself from other noise: the least for sets that share no
noise.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...samplers import Recipe
from ...samplers.lora_file import file_hash, read_header
from ...samplers.phases import count_steps
from ..families import Base, family_of
from ..lora.install import installed, left_out, load_for_sample, mismatches
from ..pictures import draw_grid, save_image
from ..system.files import write_text
from ..system.machine import package_version
from ..tiny.scenes import follows_prompt
from . import plots
from .contestants import (
    Contestant,
    Prompts,
    choose_prompts,
    find_contestants,
    teacher_guidance,
    teacher_settings,
    tells_most,
)
from .features import Absent, ClipScore, Features, find_features
from .guidance import GuidanceTrial
from .markdown import markdown
from .metrics import consistency, diversity, frechet_distance, paired_error, sliced_wasserstein
from .setting import TEACHER, Setting
from .trial import Trial

REFERENCE_STEPS = 40
SWEEP = (1.0, 2.0, 4.0, 8.0)
FEATURES = ("latents", "pixels", "inception")
FEWER = 32  # pictures of the guidance figures, whose references cost the most
SHOWN, CELL = 6, 192  # columns of the grid, and the largest side of its pictures
DECODED = 8  # pictures that are decoded and measured together


@dataclass(frozen=True)
class Look:
    """One setting's pictures as the metrics see them.

    features: (N, D) by space. facts: figures of how they follow their prompts. examples: (n, 3, H, W), the first few.
    """

    features: dict[str, Tensor]
    facts: dict[str, float]
    examples: Tensor


class Judge:
    """Looks at latents in every space, and at how pictures follow their prompts where there is a way to tell."""

    def __init__(self, base: Base, spaces: list[Features], clip: ClipScore | None, prompts: Prompts):
        self.base, self.spaces, self.clip, self.prompts = base, spaces, clip, prompts

    @torch.no_grad()
    def look(self, latents: Tensor) -> Look:
        """Decode latents (N, C, h, w), one for each prompt, a few at a time, and measure them."""
        features: dict[str, list[Tensor]] = {space.name: [] for space in self.spaces}
        scores, followed, examples = [], [], []
        for at in range(0, len(latents), DECODED):
            part = slice(at, at + DECODED)
            pixels = self.base.decode(latents[part])
            for space in self.spaces:
                features[space.name].append(space.of(latents[part], pixels))
            if self.clip:
                scores.append(self.clip(pixels, self.prompts.texts[part]))
            if self.prompts.scenes:
                followed += [follows_prompt(s, p) for s, p in zip(self.prompts.scenes[part], pixels, strict=True)]
            examples.append(pixels[: max(0, SHOWN - at)])

        facts = {"clip_score": torch.cat(scores).mean().item()} if scores else {}
        if followed:
            facts["prompt_followed"] = sum(followed) / len(followed)
        return Look({name: torch.cat(x) for name, x in features.items()}, facts, torch.cat(examples))


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
    say: Callable[[str], None] = print,
    **loading,
) -> dict[str, Any]:
    """Make the report, write it into `out`, and return it.

    steps: the numbers of steps for the LoRAs. guidance: the teacher's CFG; default: see `teacher_guidance`.
    features: names or folders (see `find_features`). clip: folder for the CLIP score. loading: keywords of
    `load_for_sample`. say: called with each line of progress. Raises ValueError or FileNotFoundError for bad
    input, before anything is loaded where it can be seen by then.
    """
    if pictures < 2:
        raise ValueError(f"--pictures is {pictures}; a report compares sets, so make it at least 2, 64 is usual.")
    if guidance is not None and guidance < 1:
        raise ValueError(f"--guidance is {guidance:g}; the teacher's CFG scale is 1 (none) or more, 7.5 is usual.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is {out}, which is a file. Give a folder.")

    # All that reads small files comes before the base is loaded, so that a wrong name is told in a second.
    steps = sorted(set(steps))
    contestants = find_contestants(loras, family_of(base, loading.get("family")), steps)
    chosen = choose_prompts(prompts, base, pictures)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spaces, left_out = find_features(features or FEATURES, device)
    scorer = _clip_score(clip, device, left_out)

    guidance = teacher_guidance(contestants, base) if guidance is None else guidance
    loaded = load_for_sample(base, dtype, tells_most(contestants).file, **loading)
    warnings = [line for c in contestants for line in _fits(c, loaded, guidance)]

    judge = Judge(loaded, spaces, scorer, chosen)
    reference = Setting(TEACHER, REFERENCE_STEPS, guidance)
    trial = Trial.of(loaded, chosen.texts, seed, resolution=resolution)
    contest = Contest(loaded, judge, trial, reference, say)
    contest.run(contestants, steps)

    report = {
        "base": loaded.path,
        "family": loaded.name,
        "base_hash": loaded.base_hash,
        "loras": [_facts(c) for c in contestants],
        "pictures": pictures,
        "resolution": resolution or loaded.default_resolution,
        "seed": seed,
        "prompts": chosen.as_dict(),
        "reference": _setting(reference),
        **contest.figures(),
        "warnings": warnings,
        "left_out": left_out + contest.left_out,
        "device": device.type,
        "dtype": dtype,
        "versions": {"phased-consistency": package_version()} | {n: version(n) for n in ("torch", "diffusers")},
    }
    _write(out, report, contest, chosen.texts)
    return report


class Contest:
    """Every setting's pictures on one trial, and the figures over them.

    reference: the setting that all others are measured against.
    """

    def __init__(self, base: Base, judge: Judge, trial: Trial, reference: Setting, say: Callable[[str], None]):
        self.base, self.judge, self.say = base, judge, say
        self.trial, self.reference = trial, reference
        self.other_noise = trial.with_noise(trial.seed + 1)
        self.latents: dict[Setting, Tensor] = {}
        self.looks: dict[Setting, Look] = {}
        self.other_looks: dict[Setting, Look] = {}  # at the pictures from other noise
        self.guidance: list[dict] = []
        self.left_out: list[str] = []  # sentences

    def run(self, contestants: list[Contestant], steps: list[int]) -> None:
        """Make and look at everything: the reference, each LoRA, and the teacher at as many evaluations."""
        self._make(self.reference)
        self._make_again(self.reference)

        texts = self.judge.prompts.texts[:FEWER]
        negatives = len(set(texts)) > 1
        if not negatives:
            self.left_out.append("Negative prompts: they need two different prompts or more.")
        latents = self.latents[self.reference][:FEWER]
        guided = GuidanceTrial(self.trial.first(FEWER), self.base, texts, self.reference, latents)
        for contestant in contestants:
            recipe = contestant.recipe_on(self.base)
            with installed(contestant.file, self.base, recipe.strength):
                for n in steps:
                    setting = Setting(contestant.name, n, recipe.guidance)
                    self._make(setting, recipe)
                    self._make_again(setting, recipe)
                self.say(f"{contestant.name}, CFG sweep and negative prompts")
                self.guidance.append(guidance_of(contestant.name, recipe, guided, negatives))

        # the teacher last, since the LoRAs' evaluations are its budgets
        budgets = {s.evaluations for s in self.latents if s.name != TEACHER}
        for setting in teacher_settings(budgets, self.reference.guidance):
            if setting not in self.latents:
                self._make(setting)

    def _make(self, setting: Setting, recipe: Recipe | None = None) -> None:
        """Make and look at the pictures of a setting; recipe: that of the LoRA, which is installed."""
        self.say(", ".join((setting.who, *_cost(setting))))
        self.latents[setting] = self.trial.latents(setting, self.base, recipe)
        self.looks[setting] = self.judge.look(self.latents[setting])

    def _make_again(self, setting: Setting, recipe: Recipe | None = None) -> None:
        """Make and look at pictures of the same setting and prompts from other noise."""
        self.say("  the same with other noise, for the diversity")
        self.other_looks[setting] = self.judge.look(self.other_noise.latents(setting, self.base, recipe))

    def figures(self) -> dict[str, Any]:
        """The report's figures, JSON-ready."""
        return {
            "features": {name: x.shape[1] for name, x in self.looks[self.reference].features.items()},
            "rows": [self._row(setting) for setting in self.latents],
            "other_noise": self._distances(self.other_looks[self.reference]),
            "consistency": {who: _json_keys(consistency(x)) for who, x in self._by_steps().items() if len(x) > 1},
            "guidance": self.guidance,
            "guidance_pictures": min(FEWER, len(self.trial.noise)),
        }

    def _row(self, setting: Setting) -> dict[str, Any]:
        """All figures of one setting."""
        look = self.looks[setting]
        row = _setting(setting)
        row["paired_error"] = paired_error(self.latents[setting], self.latents[self.reference])
        row |= {"distances": self._distances(look)} | look.facts
        if setting in self.other_looks:
            row["diversity"] = self._diversity(setting)
        return row

    def _distances(self, look: Look) -> dict[str, dict[str, float]]:
        """Space -> both distances of these pictures to the reference's."""
        distances = {}
        for name, target in self.looks[self.reference].features.items():
            features = look.features[name]
            distances[name] = {
                "sliced_wasserstein": sliced_wasserstein(features, target),
                "frechet": frechet_distance(features, target),
            }
        return distances

    def _diversity(self, setting: Setting) -> dict[str, float]:
        """Space -> how much the pictures from both noises differ."""
        pairs = {n: (x, self.other_looks[setting].features[n]) for n, x in self.looks[setting].features.items()}
        return {name: diversity(torch.stack(pair, dim=1)) for name, pair in pairs.items()}

    def _by_steps(self) -> dict[str, dict[int, Tensor]]:
        """Who -> steps -> latents: each LoRA, and the teacher's DDIM with its guidance, short of the reference."""
        series: dict[str, dict[int, Tensor]] = {}
        for setting, latents in self.latents.items():
            usual = setting.name != TEACHER or (setting.solver, setting.guidance) == ("ddim", self.reference.guidance)
            if usual and setting != self.reference:
                series.setdefault(setting.who, {})[setting.steps] = latents
        return series


def guidance_of(name: str, recipe: Recipe, guided: GuidanceTrial, negatives: bool) -> dict[str, Any]:
    """The report's entry on the guidance of the installed LoRA: the CFG sweep at the recipe's steps, and,
    where `negatives`, negative prompts at its CFG, or at its highest where that is 1."""
    cfg = recipe.guidance if recipe.guidance != 1 else recipe.guidance_max
    setting = Setting(name, recipe.steps, cfg)
    swept = guided.sweep(setting, recipe, tuple(sorted({*SWEEP, recipe.guidance, cfg})))
    errors, target = guided.errors(swept), guided.reference(guided.setting.guidance)
    entry: dict[str, Any] = {"name": name, "steps": recipe.steps}
    entry["sweep"] = [
        {"guidance": g, "error_same_cfg": errors[f"{g:g}"], "error": paired_error(x, target)} for g, x in swept.items()
    ]

    if negatives:
        avoided = guided.avoiding.latents(setting, guided.base, recipe)
        expected = paired_error(guided.reference(cfg, avoiding=True), guided.reference(cfg))
        response = guided.response(cfg, swept[cfg], avoided)
        entry["negative_prompt"] = {"guidance": cfg} | response | {"change_of_teacher": expected}
    return entry


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
        warnings = mismatches(recipe, base) + left_out(read_header(contestant.file))
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


def _json_keys(errors: dict[int, dict[int, float]]) -> dict[str, dict[str, float]]:
    return {str(n): {str(m): error for m, error in row.items()} for n, row in errors.items()}


def _setting(setting: Setting) -> dict[str, Any]:
    """A setting in the report."""
    return {"who": setting.who} | asdict(setting) | {"evaluations": setting.evaluations}


def _write(out: Path, report: dict[str, Any], contest: Contest, prompts: list[str]) -> None:
    """Write report.json, report.md, grid.png and the plots.

    The grid leaves out rows that show nothing new: the teacher without guidance, and other solvers than DDIM
    at one step, where they are all the same.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    write_text(out / "report.md", markdown(report))

    guidance = contest.reference.guidance
    single = Setting(TEACHER, 1, guidance)
    is_new = lambda s: s.guidance == guidance and (s.steps > 1 or s == single)  # noqa: E731
    order = sorted(contest.latents, key=lambda s: (s != contest.reference, s.evaluations, s.name == TEACHER))
    rows = [(_wrapped(s), contest.looks[s].examples) for s in order if s.name != TEACHER or is_new(s)]
    side = min(CELL, rows[0][1].shape[-1])
    save_image(draw_grid(rows, prompts[:SHOWN], max(96, side)), out / "grid.png")
    plots.draw(report, out)


def _wrapped(setting: Setting) -> str:
    """A setting's label for the grid's narrow margin."""
    who = "\n".join(textwrap.wrap(setting.who, 19, break_on_hyphens=False))
    steps, guidance, evaluations = _cost(setting)
    return f"{who}\n{steps}, {guidance}\n{evaluations}"


def _cost(setting: Setting) -> tuple[str, str, str]:
    """The steps, the CFG and the evaluations of a setting, in words."""
    evaluations = f"{setting.evaluations} evaluation{'s' * (setting.evaluations > 1)}"
    return count_steps(setting.steps), f"CFG {setting.guidance:g}", evaluations
