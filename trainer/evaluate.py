"""How close few-step pictures come to the teacher's many-step ones, from the same prompts and the same noise."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..samplers import PhaseGrid, Recipe
from .adapter import bare
from .families import Base, Condition
from .generate import generate

BATCH = 64
TEACHER_GRID = PhaseGrid(points=1000, phases=1, from_noise=True)


@dataclass(frozen=True)
class Setting:
    """A way to make pictures: the teacher (adapter off, first order, trailing levels), or the LoRA by its recipe."""

    name: str
    steps: int
    guidance: float

    @property
    def evaluations(self) -> int:
        return self.steps * (1 if self.guidance == 1 else 2)

    @property
    def label(self) -> str:
        who = "teacher" if self.name == "teacher" else "LoRA"
        return f"{who}\n{self.steps} step{'s' * (self.steps > 1)}, CFG {self.guidance:g}"


@dataclass(frozen=True)
class Row:
    """One setting's figures against the reference (see `paired_error` and `sliced_wasserstein`)."""

    name: str
    steps: int
    guidance: float
    evaluations: int
    paired_error: float
    distance: float

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Trial:
    """The prompts and noises that settings are compared on: encodings (N, ...), noise (N, C, h, w).

    null: what guidance subtracts, (1, ...) for all or (N, ...) for each its own.
    """

    condition: Condition
    null: Condition
    noise: Tensor

    @classmethod
    def of(cls, base: Base, prompts: list[str], seed: int, negative: str | None = None) -> Trial:
        """Noise from `seed` for these prompts; a negative prompt stands in for the base's own null condition."""
        empty = base.encode_prompts([negative or ""])
        noise = torch.randn(
            len(prompts), *base.latent_shape(base.default_resolution), generator=torch.Generator().manual_seed(seed)
        )
        return cls(base.encode_prompts(prompts), empty if negative else base.null_condition(empty), noise)

    def latents(self, setting: Setting, base: Base, recipe: Recipe) -> Tensor:
        """Latents (N, C, h, w) made with this setting. The LoRA must be installed in the base."""
        teacher = setting.name == "teacher"
        grid, using = (TEACHER_GRID, bare(base.network)) if teacher else (recipe.grid(), nullcontext())
        how = {} if teacher else {"gamma": recipe.gamma, "min_alpha": recipe.min_alpha}
        ticks, made = grid.plan(setting.steps).ticks, []
        with using:
            for at in range(0, len(self.noise), BATCH):
                part = slice(at, at + BATCH)
                rows = {k: v[part] for k, v in self.condition.items()}
                null = {k: v[part] if len(v) > 1 else v for k, v in self.null.items()}
                made.append(generate(base, rows, null, self.noise[part], ticks, setting.guidance, seed=at, **how))
        return torch.cat(made)


def paired_error(made: Tensor, reference: Tensor) -> float:
    """Mean over samples of |made - reference| / |reference|, norms over a whole latent; 0 is the same picture."""
    return ((made - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)).mean().item()


def sliced_wasserstein(made: Tensor, reference: Tensor, directions: int = 512) -> float:
    """Sliced 2-Wasserstein distance of two sets of N latents, on fixed random unit directions; 0 is the same set.

    Root of the mean, over directions and quantiles, of the squared difference of the sorted projections (Bonneel et
    al. 2015, Sec. 3). In the units of one latent element.
    """
    a, b = made.flatten(1), reference.flatten(1)
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(a.shape[1], directions, generator=generator), dim=0).to(a)
    return ((a @ unit).sort(0).values - (b @ unit).sort(0).values).square().mean().sqrt().item()


def figures(setting: Setting, made: Tensor, reference: Tensor) -> Row:
    """One setting's row against the reference latents."""
    distances = paired_error(made, reference), sliced_wasserstein(made, reference)
    return Row(setting.name, setting.steps, setting.guidance, setting.evaluations, *distances)


def compare(settings: list[Setting], base: Base, recipe: Recipe, trial: Trial) -> tuple[list[Row], list[Tensor]]:
    """Rows of figures for each setting, and their latents. The first setting is the reference."""
    made = [trial.latents(s, base, recipe) for s in settings]
    return [figures(s, x, made[0]) for s, x in zip(settings, made, strict=True)], made
