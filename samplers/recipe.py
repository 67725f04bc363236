"""How a few-step LoRA must be sampled: the recipe, its form in a LoRA header, and those of known public files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import PurePath

from .phases import PhaseGrid, count_steps
from .schedule import PREDICTIONS, TICKS, FlowSchedule, Schedule, VPSchedule

HEADER_KEY = "pcm.recipe"
FAMILIES = {"sd15": "SD1.5", "sd2": "SD2", "sdxl": "SDXL", "sd3": "SD3"}
MODES = ("deterministic", "stochastic")
GUIDANCE_MODES = ("smallcfg", "normalcfg")
# phases of a normalcfg LoRA -> CFG (best, low, high), after the model card of wangfuyun/PCM_Weights
NORMALCFG = {4: (3.0, 2.5, 3.5), 8: (4.5, 3.0, 6.0), 16: (5.0, 2.0, 9.0)}
DIFFUSERS_SCHEDULERS = {
    ("deterministic", False): "DDIM with trailing spacing",
    ("deterministic", True): "FlowMatchEulerDiscrete",
    ("stochastic", False): "LCM",
    ("stochastic", True): "FlowMatchLCM",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a LoRA was trained, and how it wants to be sampled.

    family: base model family, a key of `FAMILIES`.
    objective: the training objective, "pcm" or a relative.
    mode: "deterministic" (phase jumps) or "stochastic" (to x0 and fresh noise).
    points, phases: the grid it was trained on (`PhaseGrid`).
    steps: recommended number of steps.
    prediction: what the base predicts: "epsilon", "v_prediction" or "flow".
    zero_terminal_snr: whether the base's schedule ends in pure noise.
    shift: flow time shift; None for VP.
    min_alpha: eps-prediction's divisor is at least this, for one-phase models (arXiv 2405.18407, Eq. 39); 0 = alpha.
    guidance_mode: "smallcfg" (guidance distilled in) or "normalcfg" (none distilled; trained with prompt dropout).
    guidance: recommended CFG scale (1 = none); guidance_min, guidance_max: the range it was made for.
    negative_prompts: whether a negative prompt has the usual effect within that range.
    strength: recommended LoRA strength.
    sampling_points, sampling_from_noise: the grid that the file's authors sample on, where it is not the trained one.
    base_name, base_hash: the checkpoint it was distilled from (SHA-256 of the file, where it is one file).
    source: where this recipe came from: "header", "known file" or "settings"; not part of the header.
    """

    family: str
    objective: str = "pcm"
    mode: str = "deterministic"
    points: int = 40
    phases: int = 4
    steps: int | None = None
    prediction: str = "epsilon"
    zero_terminal_snr: bool = False
    shift: float | None = None
    min_alpha: float = 0.0
    guidance_mode: str = "smallcfg"
    guidance: float = 1.0
    guidance_min: float = 1.0
    guidance_max: float = 2.0
    negative_prompts: bool = False
    strength: float = 1.0
    sampling_points: int | None = None
    sampling_from_noise: bool = False
    base_name: str = ""
    base_hash: str = ""
    source: str = "settings"

    def __post_init__(self):
        problems = [
            f"{name} is {value!r}; available: {', '.join(allowed)}"
            for name, value, allowed in (
                ("family", self.family, FAMILIES),
                ("mode", self.mode, MODES),
                ("prediction", self.prediction, PREDICTIONS),
                ("guidance_mode", self.guidance_mode, GUIDANCE_MODES),
            )
            if value not in allowed
        ]
        if (self.prediction == "flow") != (self.shift is not None):
            problems.append(
                f"shift is {self.shift!r} with prediction {self.prediction!r}: flow models have a shift, others none"
            )
        if not 0 <= self.min_alpha < 1:
            problems.append(f"min_alpha is {self.min_alpha:g}; at least 0 (no clamp) and below 1, 0.5 in the paper")
        if self.min_alpha and (self.prediction != "epsilon" or self.phases != 1):
            problems.append(
                f"min_alpha is {self.min_alpha:g} with prediction {self.prediction!r} and {self.phases} phases: "
                "it is for 'epsilon' and 1 phase, else 0"
            )
        if not self.guidance_min <= self.guidance <= self.guidance_max:
            problems.append(
                f"guidance {self.guidance:g} is outside its own range {self.guidance_min:g} to {self.guidance_max:g}"
            )
        if self.steps is not None and self.steps < 1:
            problems.append(f"steps is {self.steps}; at least 1")
        checks = (self.grid, lambda: self.grid(trained=True), lambda: self.shift is None or FlowSchedule(self.shift))
        for check in checks:
            try:
                check()
            except ValueError as error:
                problems.append(str(error).rstrip("."))
        if problems:
            raise ValueError("Not a usable recipe: " + "; ".join(dict.fromkeys(problems)) + ".")
        if self.steps is None:
            object.__setattr__(self, "steps", self.phases if self.mode == "deterministic" else 4)

    def grid(self, trained: bool = False) -> PhaseGrid:
        """The levels to sample at; with `trained`, the edges of training even where the authors sample elsewhere."""
        if trained or self.sampling_points is None:
            return PhaseGrid(self.points, self.phases)
        return PhaseGrid(self.sampling_points, self.phases, from_noise=self.sampling_from_noise)

    def schedule(self) -> Schedule:
        """The noise schedule of the base."""
        if self.prediction == "flow":
            return FlowSchedule(self.shift)
        return VPSchedule.from_betas(zero_terminal_snr=self.zero_terminal_snr)

    @property
    def gamma(self) -> float:
        """What `sample_phased` takes for this mode."""
        return 0.0 if self.mode == "deterministic" else 1.0

    def warnings(self, steps: int, guidance: float, family: str | None = None, shift: float | None = None) -> list[str]:
        """What is wrong with these settings, each as one sentence that says what to change.

        family, shift: those of the model that is to be sampled, where they are known.
        """
        found = []
        if family is not None and family != self.family:
            found.append(
                f"This LoRA is for {FAMILIES[self.family]}, the model is {FAMILIES.get(family, family)}: "
                "load a matching one."
            )
        if shift is not None and self.shift is not None and shift != self.shift:
            found.append(
                f"The model's shift {shift:g} is not used, the levels are those of the LoRA's shift {self.shift:g}: "
                "remove the node that sets it."
            )
        if self.mode == "deterministic" and steps != self.phases:
            found.append(f"This LoRA was made for {count_steps(self.phases)}, not {steps}: set steps to {self.phases}.")
        if guidance > self.guidance_max:
            found.append(
                f"CFG {guidance:g} is above {self.guidance_max:g} and burns the image: set CFG to {self.guidance:g}."
            )
        elif guidance < self.guidance_min:
            unused = " and leaves the negative prompt unused" if guidance == 1 and self.negative_prompts else ""
            found.append(f"CFG {guidance:g} is below {self.guidance_min:g}{unused}: set CFG to {self.guidance:g}.")
        return found

    def usage_hint(self) -> str:
        """The settings in one sentence, for people and for `modelspec.usage_hint`."""
        any_number = "" if self.mode == "deterministic" else " (any small number works)"
        sampler = "euler + simple" if self.mode == "deterministic" else "lcm + simple"
        scheduler = DIFFUSERS_SCHEDULERS[self.mode, self.prediction == "flow"]
        if self.zero_terminal_snr:
            scheduler += " (rescale_betas_zero_snr)"
        if self.prediction == "flow":  # left to itself, diffusers' Euler takes other levels than the phase edges
            unshifted = ", ".join(f"{tick / TICKS:g}" for tick in self.grid().plan(self.steps).ticks[:-1])
            scheduler += f" at sigmas=[{unshifted}]"
        software = f"ComfyUI sampler and scheduler {sampler}, diffusers {scheduler}, or the PCM nodes"
        if self.min_alpha:
            software = f"only with the PCM nodes, which divide by at least {self.min_alpha:g} where others do by alpha"
        shift = "" if self.shift is None else f", shift {self.shift:g}"
        return (
            f"{count_steps(self.steps)}{any_number}, CFG {self.guidance:g} ({self.guidance_min:g} to "
            f"{self.guidance_max:g}), LoRA strength {self.strength:g}{shift}; {software}. {FAMILIES[self.family]} only."
        )

    def to_header(self) -> str:
        """JSON for the `pcm.recipe` header key."""
        values = asdict(self)
        del values["source"]
        return json.dumps({"version": 1, **values})

    @classmethod
    def from_header(cls, text: str) -> Recipe:
        """Read a `pcm.recipe` header. Fields of later versions are ignored; raises ValueError if it cannot be read."""
        try:
            values = json.loads(text)
            known = {f.name for f in fields(cls)} - {"source"}
            return cls(**{k: v for k, v in values.items() if k in known}, source="header")
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"The {HEADER_KEY} header cannot be read ({error}); it starts {text[:60]!r}. "
                "Get the file again, or set the steps and mode by hand."
            ) from error


def normalcfg_guidance(phases: int) -> tuple[float, float, float]:
    """CFG scale (best, low, high) for a normalcfg LoRA of so many phases: the row of `NORMALCFG` at or below."""
    return NORMALCFG[max((row for row in NORMALCFG if row <= phases), default=min(NORMALCFG))]


def _smallcfg(family: str, points: int) -> Callable[[re.Match], Recipe]:
    def recipe(m: re.Match) -> Recipe:
        steps = int(m[1])
        grid = {"points": points, "phases": steps, "sampling_points": _trailing(steps), "sampling_from_noise": True}
        return Recipe(family=family, **grid)

    return recipe


def _normalcfg(family: str, points: int) -> Callable[[re.Match], Recipe]:
    def recipe(m: re.Match) -> Recipe:
        best, low, high = normalcfg_guidance(int(m[1]))
        return replace(
            _smallcfg(family, points)(m),
            guidance_mode="normalcfg",
            guidance=best,
            guidance_min=low,
            guidance_max=high,
            negative_prompts=True,
        )

    return recipe


def _lcmlike(family: str) -> Callable[[re.Match], Recipe]:
    return lambda m: Recipe(
        family=family, mode="stochastic", points=50, phases=1, sampling_points=50, sampling_from_noise=True
    )


def _sd3(m: re.Match) -> Recipe:
    stochastic = m.lastindex == 1
    return Recipe(
        family="sd3",
        mode="stochastic" if stochastic else "deterministic",
        points=100,
        phases=1 if stochastic else int(m[1]),
        prediction="flow",
        shift=float(m[m.lastindex]),
        guidance=1.2,
        sampling_points=50,
        sampling_from_noise=True,
    )


def _trailing(steps: int) -> int:
    """Points of diffusers' trailing grid: exact at 40 for up to 8 steps; 16 steps need every timestep."""
    return 40 if steps <= 8 else 1000


# The files of wangfuyun/PCM_Weights (checked 2026-08): name pattern -> recipe, after the model card and its demo. Their
# training edges (50 points for SD1.5, 40 for SDXL, 100 for SD3) are not always the levels their authors sample at.
KNOWN_FILES: tuple[tuple[str, Callable[[re.Match], Recipe]], ...] = (
    (r"pcm_sd15_smallcfg_(2|4|8|16)step", _smallcfg("sd15", 50)),
    (r"pcm_sd15_normalcfg_(4|8|16)step", _normalcfg("sd15", 50)),
    (r"pcm_sd15_lcmlike_lora", _lcmlike("sd15")),
    (r"pcm_sdxl_smallcfg_(2|4|8|16)step", _smallcfg("sdxl", 40)),
    (r"pcm_sdxl_normalcfg_(4|8|16)step", _normalcfg("sdxl", 40)),
    (r"pcm_sdxl_lcmlike_lora", _lcmlike("sdxl")),
    (r"pcm_deterministic_(2|4)step_shift(1|3)", _sd3),
    (r"p[cd]m_stochastic_shift(3)", _sd3),
)


def recipe_for_file(name: str, metadata: dict[str, str]) -> Recipe | None:
    """The recipe in a LoRA's header, else that of a known public file of this name, else None.

    name: file name or path. metadata: the safetensors `__metadata__`. Raises ValueError for an unreadable header.
    """
    if HEADER_KEY in metadata:
        return Recipe.from_header(metadata[HEADER_KEY])
    stem = PurePath(name.replace("\\", "/")).stem.lower()
    for pattern, recipe in KNOWN_FILES:
        if match := re.search(pattern, stem):
            return replace(recipe(match), source="known file")
    return None
