"""How close few-step pictures come to the teacher's many-step ones, from the same prompts and the same noise."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..samplers import PhaseGrid
from .adapter import bare
from .families import Base, Condition
from .generate import generate

BATCH = 64


@dataclass(frozen=True)
class Setting:
    """A way to make pictures: the teacher (adapter off, DDIM, trailing levels) or the LoRA on its phase grid."""

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


def latents_for(
    setting: Setting, base: Base, grid: PhaseGrid, condition: Condition, null: Condition, noise: Tensor
) -> Tensor:
    """Latents (B, C, h, w) made from this noise with this setting. The LoRA must be installed in the base."""
    if setting.name == "teacher":
        grid, using = PhaseGrid(points=1000, phases=1, from_noise=True), bare(base.network)
    else:
        using = nullcontext()
    ticks = grid.plan(setting.steps).ticks
    made = []
    with using:
        for at in range(0, len(noise), BATCH):
            rows = {k: v[at : at + BATCH] for k, v in condition.items()}
            made.append(generate(base, rows, null, noise[at : at + BATCH], ticks, setting.guidance))
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


def compare(
    settings: list[Setting], base: Base, grid: PhaseGrid, prompts: list[str], seed: int
) -> tuple[list[Row], list[Tensor]]:
    """Rows of figures for each setting, and their latents. The first setting is the reference."""
    condition, null = base.encode_prompts(prompts), base.encode_prompts([""])
    shape = base.latent_shape(base.default_resolution)
    noise = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(seed))
    made = [latents_for(s, base, grid, condition, null, noise) for s in settings]
    rows = [
        Row(s.name, s.steps, s.guidance, s.evaluations, paired_error(x, made[0]), sliced_wasserstein(x, made[0]))
        for s, x in zip(settings, made, strict=True)
    ]
    return rows, made
