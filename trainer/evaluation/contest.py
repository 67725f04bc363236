"""Every setting of a report on one gauge: the LoRAs, the base without them, and the teacher at as many evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...samplers import Recipe
from ...samplers.phases import count_steps
from ..lora.install import installed
from .contestants import Contestant, teacher_settings
from .distances import SCALE
from .gauge import Gauge, pictures_needed
from .guidance import GuidanceTrial
from .intervals import Figure, mean_of
from .judge import Look
from .metrics import consistency, paired_errors
from .setting import TEACHER, Setting

SWEEP = (1.0, 2.0, 4.0, 8.0)
FEWER = 32  # pictures of the guidance figures, whose references cost the most


class Contest:
    """Every setting's pictures, and the figures over them. say: called with each line of progress."""

    def __init__(self, gauge: Gauge, say: Callable[[str], None]):
        self.gauge, self.say = gauge, say
        self.samples: dict[Setting, Look] = {}
        self.untrained: dict[Setting, Setting] = {}  # a LoRA's setting -> that of the base without it
        self.guidance: list[dict] = []
        self.left_out: list[str] = []  # sentences

    def run(self, contestants: list[Contestant], steps: list[int]) -> None:
        """Make and look at everything: the reference, each LoRA and the base without it, and the teacher at as many
        evaluations."""
        gauge, reference = self.gauge, self.gauge.reference
        self.say(f"{', '.join((reference.who, *cost(reference)))}, from all noises")
        self.samples[reference] = gauge.floor
        gauge.target  # noqa: B018  made now, since it takes as long

        texts = gauge.judge.prompts.texts[:FEWER]
        negatives = len(set(texts)) > 1
        if not negatives:
            self.left_out.append("Negative prompts: they need two different prompts or more.")
        latents = gauge.floor.latents[:FEWER, 0]
        guided = GuidanceTrial(gauge.trials[0].first(FEWER), gauge.base, texts, reference, latents)
        for contestant in contestants:
            recipe = contestant.recipe_on(gauge.base)
            with installed(contestant.file, gauge.base, recipe.strength):
                for n in steps:
                    setting = Setting(contestant.name, n, recipe.guidance)
                    self._make(setting, recipe)
                    self.untrained[setting] = gauge.without(setting, recipe)
                    self._make(self.untrained[setting], recipe)
                self.say(f"{contestant.name}, CFG sweep and negative prompts")
                self.guidance.append(guidance_of(contestant.name, recipe, guided, negatives))

        # the teacher last, since the LoRAs' evaluations are its budgets
        budgets = {setting.evaluations for setting in self.untrained}
        for setting in teacher_settings(budgets, reference.guidance):
            if not gauge.is_untrained(setting):
                self._make(setting)

    def _make(self, setting: Setting, recipe: Recipe | None = None) -> None:
        """Make and look at the pictures of a setting, if there are none; recipe: the installed LoRA's."""
        if setting not in self.samples:
            self.say(", ".join((setting.who, *cost(setting))))
            self.samples[setting] = self.gauge.sample(setting, recipe)

    def figures(self) -> dict[str, Any]:
        """The report's figures, JSON-ready."""
        spaces = self.gauge.target
        learnt = [
            {"who": setting.who, "steps": setting.steps, "space": space, "untrained": bare.who}
            | {"gain": self.gauge.gain(self.samples[setting], self.samples[bare], space).as_dict()}
            for space in spaces
            for setting, bare in self.untrained.items()
        ]
        rows = [setting.as_dict() | self.gauge.figures(sample) for setting, sample in self.samples.items()]
        return {
            "features": {name: features.shape[2] for name, features in spaces.items()},
            "rows": rows,
            "learnt": learnt,
            "too_few": too_few(rows[0], learnt, len(self.gauge.floor.latents)),
            "consistency": {who: _json_keys(consistency(x)) for who, x in self._by_steps().items() if len(x) > 1},
            "guidance": self.guidance,
            "guidance_pictures": min(FEWER, len(self.gauge.floor.latents)),
        }

    def _by_steps(self) -> dict[str, dict[int, Tensor]]:
        """Who -> steps -> latents from the first noise: each LoRA, and the teacher's DDIM with its guidance, short of
        the reference."""
        series: dict[str, dict[int, Tensor]] = {}
        reference = self.gauge.reference
        for setting, sample in self.samples.items():
            teacher = (setting.solver, setting.guidance) == ("ddim", reference.guidance) and setting != reference
            if setting in self.untrained or (setting.name == TEACHER and teacher):
                series.setdefault(setting.who, {})[setting.steps] = sample.latents[:, 0]
        return series


def too_few(reference: dict[str, Any], learnt: list[dict[str, Any]], number: int) -> list[str]:
    """Sentences where `number` pictures are too few: the kernel distance of two equal sets comes to more than a tenth
    of what lies between a LoRA and the base without it, or chance to all of it.

    reference: the reference's row, whose distances are those of equal sets.
    """
    sentences = []
    for space, figures in reference["spaces"].items():
        floor = Figure(**figures["kernel"])
        gains = {f"{e['who']} at {count_steps(e['steps'])}": Figure(**e["gain"]) for e in learnt if e["space"] == space}
        chance = [name for name, gain in gains.items() if gain.low <= 0 <= gain.high]
        needed = {name: pictures_needed(number, floor, gain) for name, gain in gains.items() if name not in chance}
        if chance:
            sentences.append(
                f"{space}: {number} pictures show no difference in kernel distance between {_listed(chance)} and the "
                "untrained base."
            )
        if short := {name: n for name, n in needed.items() if n > number}:
            sentences.append(
                f"{space}: with {number} pictures, the kernel distance of two equal sets is uncertain by "
                f"{SCALE * floor.half_width:.3g}, more than a tenth of what lies between the untrained base and "
                f"{_listed(list(short))}. Make it --pictures {max(short.values())}."
            )
    return sentences


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def guidance_of(name: str, recipe: Recipe, guided: GuidanceTrial, negatives: bool) -> dict[str, Any]:
    """The report's entry on the guidance of the installed LoRA: the CFG sweep at the recipe's steps, and,
    where `negatives`, negative prompts at its CFG, or at its highest where that is 1."""
    cfg = recipe.guidance if recipe.guidance != 1 else recipe.guidance_max
    setting = Setting(name, recipe.steps, cfg)
    swept = guided.sweep(setting, recipe, tuple(sorted({*SWEEP, recipe.guidance, cfg})))
    errors, target = guided.errors(swept), guided.reference(guided.setting.guidance)
    entry: dict[str, Any] = {"name": name, "steps": recipe.steps}
    entry["sweep"] = [
        {"guidance": g, "error_same_cfg": errors[f"{g:g}"].as_dict()}
        | {"error": mean_of(paired_errors(latents, target)).as_dict()}
        for g, latents in swept.items()
    ]

    if negatives:
        avoided = guided.avoiding.latents(setting, guided.base, recipe)
        changes = guided.response(cfg, swept[cfg], avoided)
        changes["change_of_teacher"] = mean_of(
            paired_errors(guided.reference(cfg, avoiding=True), guided.reference(cfg))
        )
        entry["negative_prompt"] = {"guidance": cfg} | {key: figure.as_dict() for key, figure in changes.items()}
    return entry


def cost(setting: Setting) -> tuple[str, str, str]:
    """The steps, the CFG and the evaluations of a setting, in words."""
    evaluations = f"{setting.evaluations} evaluation{'s' * (setting.evaluations > 1)}"
    return count_steps(setting.steps), f"CFG {setting.guidance:g}", evaluations


def _json_keys(errors: dict[int, dict[int, Tensor]]) -> dict[str, dict[str, dict[str, float]]]:
    return {str(n): {str(m): mean_of(error).as_dict() for m, error in row.items()} for n, row in errors.items()}
