"""Zero-shot editing: the parts of one loop, with the VAE in it (arXiv 2303.01469, Alg. 4, on latents).

    operator          what is known of the picture (`operators`)
    z = begin(...)    its start, encoded; noised to the first level by `noised`, or by the host
    sample_phased(..., project=Projected(...))    x0 is decoded, projected and encoded at every step, or every n-th
    finish(...)       the last latent decoded once, projected, composited

With an identity for a VAE and gamma 1 this is Algorithm 4. Latents are in the model's units, pictures in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import Inpaint, Operator, size_text
from .phases import LevelPlan, PhaseGrid, count_steps
from .schedule import Schedule

CELL = 8  # pixels a latent cell, in every family
PROJECTIONS = (
    "picture",
    "latent",
    "none",
)  # what a step is made to agree with: `Projected`, `ProjectedLatent`, nothing
STROKE_RATIO = 0.416  # of the stroke schedule's two noise levels: 2.24 / 5.38, arXiv 2303.01469, App. D
NOISIEST = 14.6  # noise-to-signal ratio that is pure noise to the eye: the last of SD's; a flow model's is infinite


class Codec(Protocol):
    """A VAE."""

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> the mean latents (B, C, H / 8, W / 8)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> (B, 3, H, W)."""


def canvas(size: tuple[int, int], multiple: int = CELL, least: int = 64) -> tuple[int, int]:
    """Height and width that a model can work on, for a picture of this height and width: no smaller."""
    return tuple(max(least, -(-side // multiple) * multiple) for side in size)


def extended(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The picture (B, C, H, W) on a canvas of this height and width, its last rows and columns repeated."""
    below, right = (there - here for there, here in zip(size, image.shape[-2:], strict=True))
    return F.pad(image, (0, right, 0, below), mode="replicate")


def check_latents(operator: Operator, latents: Tensor) -> None:
    """Raise ValueError for latents (B, C, h, w) that are not of this edit: of another canvas, or number."""
    height, width = (CELL * side for side in latents.shape[-2:])
    expected = canvas(operator.size)
    if (height, width) != expected:
        raise ValueError(
            f"The latent is of a picture of {width}x{height}, and the edit works on {expected[1]}x{expected[0]}: "
            "sample from the operator's own picture, encoded."
        )
    if len(operator.start) not in (1, len(latents)):
        raise ValueError(
            f"{len(latents)} latents for an edit of {len(operator.start)} pictures: there must be as many, or one "
            "picture."
        )


def begin(operator: Operator, codec: Codec, multiple: int = CELL) -> Tensor:
    """The latent of where an edit starts."""
    return checked(codec.encode(extended(operator.start, canvas(operator.size, multiple))), operator.start)


def finish(operator: Operator, codec: Codec, latents: Tensor) -> Tensor:
    """(B, 3 or 4, H, W) in [0, 1]: the result of an edit, which keeps exactly what the operator knows."""
    height, width = operator.size
    return operator.finish(checked(codec.decode(latents), operator.start)[..., :height, :width].float())


@dataclass(frozen=True)
class Projected:
    """x0 through the pixels: decoded, projected, encoded again. The `project` of `sample_phased`.

    residual: x0 + encode(projected) - encode(decoded), which leaves x0 alone where the projection changes nothing and
    takes the VAE's own error out to first order; else encode(projected), as it is. every: project each n-th step,
    counted back from the last that is (`Operator.to_the_end`).
    Raises ValueError for every < 1, and for a VAE that gives numbers that are not finite.
    """

    operator: Operator
    codec: Codec
    every: int = 1
    residual: bool = True

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every is {self.every}; 1 projects at each step, 2 at every second.")

    def __call__(self, x0: Tensor, steps_left: int) -> Tensor:
        due = steps_left - (not self.operator.to_the_end)
        if due < 0 or due % self.every:
            return x0
        height, width = self.operator.size
        seen = checked(self.codec.decode(x0), self.operator.start).float().clamp(0, 1)
        right = seen.clone()
        right[..., :height, :width] = self.operator.project(seen[..., :height, :width])
        if not self.residual:
            return checked(self.codec.encode(right), right).to(x0)
        there, here = checked(self.codec.encode(torch.cat([right, seen])), right).to(x0).chunk(2)
        return x0 + (there - here)


@dataclass(frozen=True)
class ProjectedLatent:
    """Inpainting without the VAE: x0's cells outside the hole are those of the picture. Cheap; the host's way. The
    last x0 too: no edge runs through a cell.

    known: latents (B, C, h, w) of the picture. cells: (B, 1, h, w), 1 where to draw.
    """

    known: Tensor
    cells: Tensor

    @classmethod
    def of(cls, operator: Operator, known: Tensor) -> ProjectedLatent:
        """From the operator and what `begin` gave; ValueError for an edit whose knowledge is no set of cells."""
        if not isinstance(operator, Inpaint):
            raise ValueError(
                f"{type(operator).__name__} keeps sums of pixels, which no cell of a latent holds: "
                "project through the picture. In latents alone only inpainting and outpainting work."
            )
        height, width = (CELL * side for side in known.shape[-2:])
        return cls(known, operator.cells(CELL, (height, width)))

    def __call__(self, x0: Tensor, steps_left: int) -> Tensor:
        return torch.where(self.cells.to(x0.device) > 0, x0, self.known.to(x0))


def noised(latents: Tensor, noise: Tensor, sigma: Tensor, schedule: Schedule) -> Tensor:
    """Clean latents at level sigma of the host's convention, noised as the host does it.

    At the noisiest level a VP network is given all of the noise, and what signal its schedule leaves besides.
    """
    sigma = sigma.cpu()
    noisiest = sigma >= schedule.k_sigma(schedule.ticks) * (1 - 1e-5)
    added = noise / schedule.k_scale(sigma).to(noise) if noisiest else sigma.to(noise) * noise
    return schedule.k_alpha(sigma).to(noise) * latents + added


def stroke_plan(grid: PhaseGrid, schedule: Schedule, strength: float) -> LevelPlan:
    """Levels for a picture drawn after strokes. strength: the first level, as a share of all ticks.

    One phase: two levels (arXiv 2303.01469, App. D), whose noise-to-signal ratios are as 1 to `STROKE_RATIO`. More
    phases: their edges, from the one that is nearest to the strength.
    """
    if grid.phases > 1:
        return grid.plan(denoise=strength)
    start = grid.plan(grid.points, strength).ticks[0]
    ratios = noise_to_signal(schedule).clamp(max=NOISIEST)
    second = grid.nearest(int((ratios - STROKE_RATIO * ratios[start]).abs().argmin()))
    ticks = tuple(dict.fromkeys((start, second, 0)))
    return LevelPlan(ticks, start / grid.ticks)


def denoise_plan(grid: PhaseGrid, schedule: Schedule, ratio: float, steps: int | None = None) -> LevelPlan:
    """Levels that take a latent of this noise-to-signal ratio to a clean one; none for a ratio of 0.

    It starts at the first level that is at least as noisy, on a solver point or not, since the noise that a solver
    point has more would have to be put in first. The phases' edges below follow; a single phase is gone through in
    `steps` equal parts (default: 1).
    """
    if ratio <= 0:
        return LevelPlan((0,), 0.0)
    start = min(int((noise_to_signal(schedule) < ratio).sum()), grid.ticks)
    below = grid.edges if grid.phases > 1 else [round(start * j / (steps or 1)) for j in range(steps or 1)]
    ticks = (start, *sorted({tick for tick in below if tick < start}, reverse=True))
    taken = len(ticks) - 1
    there = f"From the level of this noise on there {'is' if taken == 1 else 'are'} {count_steps(taken)}, not {steps}."
    return LevelPlan(ticks, start / grid.ticks, () if steps in (None, taken) else (there,))


def denoising(
    codec: Codec,
    picture: Tensor,
    std: float,
    grid: PhaseGrid,
    schedule: Schedule,
    steps: int | None = None,
    seed: int = 0,
    multiple: int = CELL,
) -> tuple[LevelPlan, float]:
    """How to take white noise of this standard deviation out of pictures (B, 3, H, W): levels, and a share of noise.

    The share of a unit noise is what the latent, whose own noise is measured, lacks at the first level.
    """
    ratio = latent_noise(codec, picture, std, seed, multiple)
    plan = denoise_plan(grid, schedule, ratio, steps)
    level = noise_to_signal(schedule)[plan.ticks[0]].item()
    return plan, max(0.0, 1 - (ratio / level) ** 2) ** 0.5 if plan.steps else 0.0


def noise_to_signal(schedule: Schedule) -> Tensor:
    """(T + 1,) sigma / alpha of every tick."""
    sigma = schedule.k_sigma(torch.arange(schedule.ticks + 1))
    return sigma / schedule.k_alpha(sigma)


def latent_noise(codec: Codec, picture: Tensor, std: float, seed: int = 0, multiple: int = CELL) -> float:
    """How much noise of this standard deviation in a picture is in its latent, measured: what more of it changes."""
    image = extended(picture, canvas(tuple(picture.shape[-2:]), multiple))
    noise = std * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed)).to(image)
    return (codec.encode((image + noise).clamp(0, 1)) - codec.encode(image)).float().std().item()


def estimated_noise(picture: Tensor) -> float:
    """Standard deviation of the white noise in a picture (B, 3, H, W), from its second differences.

    Immerkaer, Fast noise variance estimation (1996), by the median, which fine structure moves less than the mean. 0
    for a picture too small to have any.
    """
    if min(picture.shape[-2:]) < 3:
        return 0.0
    kernel = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]]).to(picture).expand(picture.shape[1], 1, 3, 3)
    differences = F.conv2d(picture, kernel, groups=picture.shape[1])
    return (differences.abs().median() / 0.6745 / 6).item()


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Between two noises (B, ...) on the great circle, the unit variance kept; share 0 is a and 1 is b, bit for bit."""
    first, second = a.flatten(1).cpu().double(), b.flatten(1).cpu().double()  # not every device has float64
    cosine = F.cosine_similarity(first, second).clamp(-1, 1)
    angle = cosine.acos()
    same = angle.sin() < 1e-6
    sine = torch.where(same, 1.0, angle.sin())
    weights = (
        torch.where(same, 1 - share, ((1 - share) * angle).sin() / sine),
        torch.where(same, share, (share * angle).sin() / sine),
    )
    mixed = weights[0][:, None] * first + weights[1][:, None] * second
    return mixed.view_as(a).to(a)


def slerped(a: Callable[..., Tensor], b: Callable[..., Tensor], share: float) -> Callable[..., Tensor]:
    """The noise sampler between two."""
    return lambda sigma, sigma_next: slerp(a(sigma, sigma_next), b(sigma, sigma_next), share)


def checked(values: Tensor, picture: Tensor) -> Tensor:
    """What a VAE gave, if it is finite; else ValueError."""
    if not values.isfinite().all():
        raise ValueError(
            f"The VAE gave numbers that are not finite for a picture of {size_text(picture)}. SDXL's does so in fp16: "
            "run it in fp32 or bf16 (in ComfyUI: --fp32-vae or --bf16-vae), or take a VAE that is mended for fp16."
        )
    return values
