"""The recipe of a few-step LoRA, which says how to sample it, and its form in a LoRA header."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace

from .families import family_problem, family_title
from .field_kinds import Numbers, Pairs, frozen, wrong_kind
from .given_levels import level_problems, mu_at, ticks_of
from .phases import PhaseGrid, count_steps
from .schedule import PREDICTIONS, TICKS, FlowSchedule, RatioFlowSchedule, Schedule, VPSchedule

HEADER_KEY = "pcm.recipe"
VERSION = 2  # of the header: those who know an earlier one alone would sample at other levels
SINCE_2 = ("timesteps", "sigmas", "mu_by_size", "boundary", "expert", "embedded_guidance")
OUTSIDE_HEADER = {"noisiest", "source"}
MODES = ("deterministic", "stochastic")
EXPERTS = ("", "high", "low")
GUIDANCE_MODES = ("smallcfg", "normalcfg")
# phases of a normalcfg LoRA -> CFG (best, low, high), after the model card of wangfuyun/PCM_Weights
NORMALCFG = {4: (3.0, 2.5, 3.5), 8: (4.5, 3.0, 6.0), 16: (5.0, 2.0, 9.0)}
# objective -> the method as people write it; those that are not here in capitals
METHODS = {
    "hyper": "Hyper-SD",
    "lightning": "Lightning",
    "flash": "Flash Diffusion",
    "turbo": "Turbo",
    "ufogen": "UFOGen",
    "progressive": "progressive distillation",
    "distilled": "distilled",
    "schnell": "schnell",
    "klein": "klein",
    "dscd": "dsCD",
    "causvid": "CausVid",
    "unknown": "LoRA",
}
# where a recipe came from (`Recipe.source`), as people read it
SOURCES = {
    "header": "the file's header",
    "known file": "the table of known files",
    "known title": "the table of known files, by the title in its header",
    "method": "the method that was chosen",
    "method in a name": "the method in the file's name",
    "settings": "the widgets",
}
# (is any noise fresh, is it flow) -> sampler and scheduler in ComfyUI, scheduler in diffusers
SOFTWARE = {
    (False, False): ("euler + simple", "DDIM with trailing spacing"),
    (False, True): ("euler + simple", "FlowMatchEulerDiscrete"),
    (True, False): ("lcm + simple", "LCM"),
    (True, True): ("lcm + simple", "FlowMatchLCM"),
}
BARE = "bare"  # the objective of a recipe for a model without a few-step LoRA
DISTILLED_POINTS = 50  # of the DDIM grid that LCM and TCD are trained and sampled on
MOST_FRESH = 8  # steps that re-noise all, above which pictures only become plainer
SAME_SHIFT = 0.005  # share by which two shifts may differ: mu 1.1 is 3.004
SLACK = 3  # ticks of 1000 by which a scheduler's rounding moves its levels: sgm_uniform's by 1, at shift 3 by up to 3


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The facts of a LoRA that sampling needs: how it was trained, and how it is sampled best.

    family: base model family, a key of `families.FAMILIES`, or any other for a flow model.
    objective: the training objective: "pcm", "lcm", "tcd", "hyper", "lightning", "dmd2", "flash", "turbo" or
        another; "unknown" where the settings are the user's, `BARE` for a model without a few-step LoRA.
    mode: "deterministic" (phase jumps, a step for each phase) or "stochastic"
        (fresh noise in between, any few steps).
    gamma: how much of the noise between steps is fresh, in [0, 1] (`sample_phased`): 0 where deterministic,
        which is also its default there; 1 by default where stochastic (LCM's way; TCD takes 0.3).
    points, phases: the grid it was trained on (`PhaseGrid`); for a known file whose training has no such
        grid, or an unpublished one, the grid that it is sampled on.
    steps: recommended number of steps.
    prediction: what the base predicts: "epsilon", "v_prediction" or "flow".
    zero_terminal_snr: whether the base's schedule ends in pure noise.
    shift: flow time shift; None for VP. Where it is given as mu, this is exp(mu).
    mu_by_size: mu by the size of the picture: pairs of (positions of 16 x 16 pixels, mu) on a broken line, whose
        outermost pieces go on beyond its ends; `shift` is then that of the usual size (`at_size`).
    timesteps, sigmas: the levels to sample at where they are given one by one, from noisy to clean without the clean
        end: as the network's time before any shift, or as noise levels in the host's convention after it. At most
        one of them; each level is a phase, and `phases` is how many there are.
    boundary: of two experts, the noise level at and above which the high-noise one is in charge (Wan 2.2).
    expert: which of them the LoRA is for, "high" or "low"; "" for models of one network.
    embedded_guidance: the guidance that the network takes as an input (FluxGuidance in ComfyUI); None for others.
    min_alpha: eps-prediction's divisor is at least this, for one-phase models (arXiv 2405.18407, Eq. 39); 0
        leaves it alpha.
    guidance_mode: "smallcfg" (guidance distilled in) or "normalcfg" (CFG and negative prompts work as usual).
    guidance: recommended CFG scale (1 = none); guidance_min, guidance_max: the range it was made for.
    negative_prompts: whether a negative prompt has the usual effect within that range.
    strength: recommended LoRA strength.
    sampling_points, sampling_from_noise: the grid that the file's authors sample
        on, where it is not the trained one.
    base_name, base_hash: the checkpoint it was distilled from (SHA-256 of the file, where it is one file).
    noisiest: of flow models whose levels the host counts as sigma / alpha, its level for pure noise
        (`RatioFlowSchedule`); None for others. A fact of the model that is sampled, and not part of the header.
    source: where this recipe came from, a key of `SOURCES`; not part of the header.
    """

    family: str
    objective: str = "pcm"
    mode: str = "deterministic"
    gamma: float | None = None
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
    timesteps: Numbers | None = None
    sigmas: Numbers | None = None
    mu_by_size: Pairs | None = None
    boundary: float | None = None
    expert: str = ""
    embedded_guidance: float | None = None
    base_name: str = ""
    base_hash: str = ""
    noisiest: float | None = None
    source: str = "settings"

    def __post_init__(self):
        for name in ("timesteps", "sigmas", "mu_by_size"):
            object.__setattr__(self, name, frozen(getattr(self, name)))
        # Types first: the comparisons of `_problems` need them to be right.
        kinds = (wrong_kind(f.name, getattr(self, f.name), f.type) for f in fields(self))
        if wrong_kinds := [clause for clause in kinds if clause]:
            raise ValueError(f"Not a usable recipe: {'; '.join(wrong_kinds)}.")
        if self.levels_given:
            object.__setattr__(self, "phases", len(self.levels_given))
        if problems := self._problems():
            raise ValueError(f"Not a usable recipe: {'; '.join(dict.fromkeys(problems))}.")

        # Defaults that hang on other fields. A header may hold null for them, as a caller may None.
        if self.steps is None:
            object.__setattr__(self, "steps", self.phases if self.has_own_steps else 4)
        if self.gamma is None:
            object.__setattr__(self, "gamma", 0.0 if self.mode == "deterministic" else 1.0)

    def _problems(self) -> list[str]:
        """Faults in the values of the fields, each as a clause of an error's sentence."""
        problems = [clause] if (clause := family_problem(self.family, self.prediction)) else []
        problems += [
            f"{name} is {value!r}; available: {', '.join(filter(None, allowed))}"
            for name, value, allowed in (
                ("mode", self.mode, MODES),
                ("prediction", self.prediction, PREDICTIONS),
                ("guidance_mode", self.guidance_mode, GUIDANCE_MODES),
                ("expert", self.expert, EXPERTS),
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
        if self.gamma is not None and not 0 <= self.gamma <= 1:
            problems.append(f"gamma is {self.gamma:g}; between 0 (no noise is fresh) and 1 (all of it)")
        elif self.gamma and self.mode == "deterministic":
            problems.append(f"gamma is {self.gamma:g} with mode 'deterministic', which takes no fresh noise: 0 there")

        if not self.guidance_min <= self.guidance <= self.guidance_max:
            problems.append(
                f"guidance {self.guidance:g} is outside its own range {self.guidance_min:g} to {self.guidance_max:g}"
            )
        if not self.strength > 0:
            problems.append(f"strength is {self.strength:g}; above 0, 1 for most files")
        if self.steps is not None and not 1 <= self.steps <= (self.sampling_points or self.points):
            most = self.sampling_points or self.points
            problems.append(f"steps is {self.steps}; at least 1, and at most {most}, the number of points")

        # The schedule and the grids know what they can be: each is made once, for its own sentence.
        wrong_levels = level_problems(self)
        problems += wrong_levels
        grids = () if wrong_levels else (self.grid, lambda: self.grid(trained=True))
        for make_part in (lambda: self.shift is None or FlowSchedule(self.shift), *grids):
            try:
                make_part()
            except ValueError as error:
                problems.append(str(error).rstrip("."))
        return problems

    @property
    def levels_given(self) -> Numbers | None:
        """The levels that are given one by one, in whichever way."""
        return self.timesteps or self.sigmas

    @property
    def has_own_steps(self) -> bool:
        """Whether it was made for one number of steps, that of its phases."""
        return (self.mode == "deterministic" and self.objective != BARE) or bool(self.levels_given)

    def at_size(self, width: int, height: int) -> Recipe:
        """The recipe with the shift for pictures of this size in pixels, where it hangs on that."""
        if self.mu_by_size is None:
            return self
        positions = (width // 16) * (height // 16)
        return replace(self, shift=math.exp(mu_at(positions, self.mu_by_size)), mu_by_size=None)

    def grid(self, trained: bool = False) -> PhaseGrid:
        """The levels to sample at; with `trained`, the edges of training even where the authors sample elsewhere."""
        if self.levels_given:
            return PhaseGrid(self.points, self.phases, at=ticks_of(self))
        if trained or self.sampling_points is None:
            return PhaseGrid(self.points, self.phases)
        return PhaseGrid(self.sampling_points, self.phases, from_noise=self.sampling_from_noise)

    def schedule(self) -> Schedule:
        """The noise schedule of the base."""
        if self.prediction == "flow":
            return RatioFlowSchedule(self.shift, self.noisiest) if self.noisiest else FlowSchedule(self.shift)
        return VPSchedule.from_betas(zero_terminal_snr=self.zero_terminal_snr)

    @property
    def distilled(self) -> bool:
        """Whether it is sampled on LCM's and TCD's grid, which other schedulers have only on demand."""
        return (self.sampling_points, self.sampling_from_noise) == (DISTILLED_POINTS, True)

    @property
    def method(self) -> str:
        """The objective as people write it."""
        return METHODS.get(self.objective, self.objective.upper())

    @property
    def mode_text(self) -> str:
        """The mode, with gamma where the mode alone does not tell it."""
        return f"{self.mode}, gamma {self.gamma:g}" if 0 < self.gamma < 1 else self.mode

    @property
    def guidance_text(self) -> str:
        """CFG, with the range that it was made for."""
        return f"CFG {self.guidance:g} ({self.guidance_min:g} to {self.guidance_max:g})"

    def warnings(self, steps: int, guidance: float, family: str | None = None, shift: float | None = None) -> list[str]:
        """Faults of these settings for this LoRA, each as one sentence that says what to change.

        family, shift: of the model that is to be sampled, where they are known.
        """
        warnings = []
        if sentence := self.family_warning(family):
            warnings.append(sentence)
        if shift is not None and self.shift is not None and not same_shift(shift, self.shift):
            warnings.append(
                f"Shift {shift:.4g} is not used, the LoRA's is {self.shift:.4g}: remove the node that sets it."
            )
        warnings += self.step_warnings(steps)
        if guidance > self.guidance_max:
            warnings.append(
                f"CFG {guidance:g} is above {self.guidance_max:g} and burns the image: set CFG to {self.guidance:g}."
            )
        elif guidance < self.guidance_min:
            unused = " and leaves the negative prompt unused" if guidance == 1 and self.negative_prompts else ""
            warnings.append(f"CFG {guidance:g} is below {self.guidance_min:g}{unused}: set CFG to {self.guidance:g}.")
        return warnings

    def family_warning(self, family: str | None) -> str | None:
        """The sentence for a model of another family; None for the right one, or one that is not known."""
        if family in (None, self.family):
            return None
        return (
            f"This LoRA is for {family_title(self.family)}, the model is {family_title(family)}: load a matching one."
        )

    def step_warnings(self, steps: int) -> list[str]:
        """Faults of this number of steps alone, as in `warnings`."""
        if self.has_own_steps and steps != self.phases:
            return [f"This LoRA was made for {count_steps(self.phases)}, not {steps}: set steps to {self.phases}."]
        if self.gamma == 1 and steps > MOST_FRESH and not self.has_own_steps:
            return [f"More than {MOST_FRESH} steps make this LoRA's pictures plainer: set steps to {self.steps}."]
        return []

    def has_levels(self, ticks: Sequence[float]) -> bool:
        """Whether these levels, ticks of 1000 from noisy to clean, are some that this LoRA can be sampled at.

        All the way from pure noise to the clean end, they have to be its plan for as many steps or, at
        another number of steps than its own, evenly spaced. A part of the way has to be part of the plan for
        its own number of steps, or for any number where it takes any. A one-phase LoRA was trained at all of
        its points: its levels may be off by as much as these are apart, and a part to the clean end may be
        evenly spaced from wherever it starts.
        """
        slack = max(SLACK, TICKS / self.points) if self.phases == 1 else SLACK
        return any(
            len(part) == len(ticks) and all(abs(a - b) <= slack for a, b in zip(part, ticks, strict=True))
            for plan in self._plans(ticks)
            for part in (plan[i : i + len(ticks)] for i in range(len(plan) - len(ticks) + 1))
        )

    def _plans(self, ticks: Sequence[float]) -> Iterator[tuple[float, ...]]:
        """All sequences of levels that these could be, or be a part of, if they are right."""
        grids = {self.grid(), self.grid(trained=True)}
        steps = len(ticks) - 1
        whole = is_whole(ticks)
        counts: Sequence[int] = (self.steps,) if self.has_own_steps else range(1, DISTILLED_POINTS + 1)
        if whole:
            counts = (steps,)
        if ticks[-1] == 0 and (self.phases == 1 or (whole and steps != self.steps)):
            yield tuple(ticks[0] * j / steps for j in range(steps, -1, -1))
        for grid in grids:
            yield from (grid.plan(n).ticks for n in counts if 1 <= n <= grid.points)

    def usage_hint(self) -> str:
        """The settings in one sentence, for people and for `modelspec.usage_hint`."""
        any_number = "" if self.has_own_steps else " (any small number works)"
        shift = "" if self.shift is None else f", shift {self.shift:.4g}"
        if self.mu_by_size:
            shift += " at 1024 x 1024"
        if self.embedded_guidance is not None:
            shift += f", FluxGuidance {self.embedded_guidance:g}"
        if self.boundary is not None:
            shift += f", high-noise model down to sigma {self.boundary:g}"
        return (
            f"{count_steps(self.steps)}{any_number}, {self.guidance_text}, LoRA strength {self.strength:g}{shift}; "
            f"{self._software()}. {family_title(self.family)} only."
        )

    def _software(self) -> str:
        """The programs that sample such a LoRA, and their settings for it, as a clause."""
        if self.min_alpha:
            return f"only with the PCM nodes, which divide by at least {self.min_alpha:g} where others do by alpha"
        flow = self.prediction == "flow"
        # those of other programs' schedulers: evenly spaced
        fits = self.has_levels([TICKS * j / self.steps for j in range(self.steps, -1, -1)])
        ticks = self.grid().plan(self.steps).ticks[:-1]
        if 0 < self.gamma < 1:
            if flow:
                return "only with the PCM nodes"
            host = ""
            scheduler = f"TCD with eta {self.gamma:g}"
        else:
            if not fits and not flow and not self.gamma:
                return "only with the PCM nodes, as the levels of other programs are evenly spaced"
            host, scheduler = SOFTWARE[self.gamma > 0, flow]
            host = host if fits else ""
        if self.zero_terminal_snr:
            scheduler += " (rescale_betas_zero_snr)"
        if self.sigmas and flow:
            scheduler += f" with shift 1 at sigmas=[{', '.join(f'{sigma:.5g}' for sigma in self.sigmas)}]"
        elif flow:  # left to itself, diffusers takes other levels
            scheduler += f" at sigmas=[{', '.join(f'{tick / TICKS:.5g}' for tick in ticks)}]"
        elif self.gamma and not self.distilled:
            scheduler += f" at timesteps=[{', '.join(f'{tick - 1:g}' for tick in ticks)}]"
        elif self.gamma == 1:
            host += " after ModelSamplingDiscrete (lcm)"
        host = host and f"ComfyUI sampler and scheduler {host}, "
        return f"{host}diffusers {scheduler}, or the PCM nodes"

    def to_header(self) -> str:
        """JSON for the `pcm.recipe` header key, of the earliest version whose readers sample it right."""
        values = {name: value for name, value in asdict(self).items() if name not in OUTSIDE_HEADER}
        new = {name: values.pop(name) for name in SINCE_2}
        used = {f.name for f in fields(self) if f.name in new and new[f.name] != f.default}
        return json.dumps({"version": VERSION, **values, **new} if used else {"version": 1, **values})

    @classmethod
    def from_header(cls, text: str) -> Recipe:
        """Read a `pcm.recipe` header of any version. Unknown fields are ignored.

        Raises ValueError if it cannot be read, or is of a version whose fields must not be ignored.
        """
        try:
            values = json.loads(text)
            if (version := values.get("version", 1)) > VERSION:
                raise ValueError(f"its version is {version}, this pack reads up to {VERSION}: update the pack")
            known = {f.name for f in fields(cls)} - OUTSIDE_HEADER
            return cls(**{k: v for k, v in values.items() if k in known}, source="header")
        except (TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"The {HEADER_KEY} header cannot be read ({str(error).rstrip('.')[:500]}); it starts {text[:60]!r}. "
                "Get the file again, or set the steps and mode by hand."
            ) from error


def same_shift(a: float, b: float) -> bool:
    """Whether two flow shifts are one for a sampler, but for their rounding."""
    return math.isclose(a, b, rel_tol=SAME_SHIFT)


def is_whole(ticks: Sequence[float]) -> bool:
    """Whether these levels go all the way from pure noise to the clean end."""
    return ticks[0] >= TICKS - SLACK and ticks[-1] == 0


def normalcfg_guidance(phases: int) -> tuple[float, float, float]:
    """CFG scale (best, low, high) for a normalcfg LoRA of so many phases: the row of `NORMALCFG` at or below."""
    return NORMALCFG[max((row for row in NORMALCFG if row <= phases), default=min(NORMALCFG))]
