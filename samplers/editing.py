"""Zero-shot editing: the parts of one loop, with the VAE in it (arXiv 2303.01469, Alg. 4, on latents).

    operator             what is known of the picture (see `operators`)
    z = begin(...)       its start, encoded; noised to the first level by `noised`, or by the host
    sample_phased(..., project=Projected(...))
                         at every step, or every n-th, x0 is decoded, projected and encoded
    finish(...)          the last latent decoded once, projected, composited

With an identity for a VAE and gamma 1 this is Algorithm 4. Latents are in the model's units, pictures in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import Inpaint, Operator, size_text
from .phases import LevelPlan, PhaseGrid, count_steps
from .sampling import NoiseSampler
from .schedule import Schedule

CELL = 8  # pixels a latent cell, in every family
# What a step is made to agree with: `Projected`, `ProjectedLatent`, or nothing.
PROJECTIONS = ("picture", "latent", "none")
STROKE_RATIO = 0.416  # the second noise level of strokes by their first, 2.24 / 5.38 (arXiv 2303.01469, App. D)
NOISIEST = 14.6  # noise by signal that is pure noise to the eye: the most in SD; a flow model's is infinite
MEDIAN_OF_UNIT_NOISE = 0.6745  # the median absolute value of a standard normal variable


class Codec(Protocol):
    """A VAE, in the model's units of latents."""

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> the mean latents (B, C, H / 8, W / 8)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> (B, 3, H, W)."""


def canvas(size: tuple[int, int], multiple: int = CELL, least: int = 64) -> tuple[int, int]:
    """Height and width that a model can work on, no smaller than a picture's, in multiples of so many pixels."""
    return tuple(max(least, -(-side // multiple) * multiple) for side in size)


def extended(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The picture (B, C, H, W) on a canvas of this height and width, its last rows and columns repeated."""
    height, width = size
    below = height - image.shape[-2]
    right = width - image.shape[-1]
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
    """The latent (B, C, h, w) that an edit starts from; ValueError for a VAE that gives what is not finite."""
    return checked(codec.encode(extended(operator.start, canvas(operator.size, multiple))), operator.start)


def finish(operator: Operator, codec: Codec, latents: Tensor) -> Tensor:
    """The result of an edit from its last latents: (B, 3 or 4, H, W) in [0, 1].

    It keeps exactly what the operator knows, which the VAE alone would not: the
    projection is the last thing done.
    Raises ValueError for a VAE that gives what is not finite.
    """
    height, width = operator.size
    image = checked(codec.decode(latents), operator.start)[..., :height, :width]
    return operator.finish(image.float())


@dataclass(frozen=True)
class Projected:
    """The `project` of `sample_phased` through the pixels: x0 is decoded, projected and encoded again.

    residual: whether the result is x0 + encode(projected) - encode(decoded), which leaves x0 alone where the
    projection changes nothing and takes the VAE's own error out to first order; else it is encode(projected).
    every: project each n-th step, counted back from the last that is projected (`Operator.to_the_end`).
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
        # Counted from the end, so that the last projection, which the result shows most, is never left out.
        projections_left = steps_left - (not self.operator.to_the_end)
        if projections_left < 0 or projections_left % self.every:
            return x0

        height, width = self.operator.size
        decoded = checked(self.codec.decode(x0), self.operator.start).float().clamp(0, 1)
        projected = decoded.clone()
        projected[..., :height, :width] = self.operator.project(decoded[..., :height, :width])
        if not self.residual:
            return checked(self.codec.encode(projected), projected).to(x0)

        both = checked(self.codec.encode(torch.cat([projected, decoded])), projected)
        z_projected, z_decoded = both.to(x0).chunk(2)
        return x0 + (z_projected - z_decoded)


@dataclass(frozen=True)
class ProjectedLatent:
    """The `project` of `sample_phased` without the VAE: x0's cells outside the hole are those of the picture.

    It costs nothing and is how the host masks. It holds for the last x0 too,
    since no edge runs through a cell.
    known: latents (B, C, h, w) of the picture. cells: (B, 1, h, w), 1 where to draw.
    """

    known: Tensor
    cells: Tensor

    @classmethod
    def of(cls, operator: Operator, known: Tensor) -> ProjectedLatent:
        """The projection of an operator whose start is encoded in `known`.

        Raises ValueError for an edit whose knowledge is no set of cells.
        """
        if not isinstance(operator, Inpaint):
            raise ValueError(
                f"{type(operator).__name__} keeps sums of pixels, which no cell of a latent holds: "
                "project through the picture. In latents alone only inpainting and outpainting work."
            )
        height, width = (CELL * side for side in known.shape[-2:])
        cells = operator.cells(CELL, (height, width))
        between = [1] * (known.ndim - cells.ndim)  # time, in the latents of models for video
        return cls(known, cells.view(*cells.shape[:2], *between, *cells.shape[2:]))

    def __call__(self, x0: Tensor, steps_left: int) -> Tensor:
        return torch.where(self.cells.to(x0.device) > 0, x0, self.known.to(x0))


def noised(latents: Tensor, noise: Tensor, sigma: Tensor, schedule: Schedule) -> Tensor:
    """Clean latents (B, C, h, w) at level sigma of the host's convention, noised as the host does it."""
    sigma = sigma.cpu()
    noisiest = sigma >= schedule.k_sigma(schedule.ticks) * (1 - 1e-5)
    # At the noisiest level the host takes sqrt(1 + sigma^2) of noise instead of sigma: in the network's units
    # all of it, and the signal that a VP schedule leaves there besides.
    amount = schedule.k_scale(sigma).reciprocal() if noisiest else sigma
    added = amount.to(noise) * noise
    return schedule.k_alpha(sigma).to(noise) * latents + added


def stroke_plan(grid: PhaseGrid, schedule: Schedule, strength: float) -> LevelPlan:
    """Levels for a picture drawn after strokes. strength: the first level, as a share of all ticks.

    With one phase they are two (arXiv 2303.01469, App. D), whose noise-to-signal ratios are as 1 to
    `STROKE_RATIO`; with more phases, the phases' edges from the one that is nearest to the strength.
    """
    if grid.phases > 1:
        return grid.plan(denoise=strength)
    start = grid.plan(grid.points, strength).ticks[0]
    ratios = k_noise_to_signal(schedule).clamp(max=NOISIEST)  # a share of infinity would be infinite too
    second = grid.nearest(int((ratios - STROKE_RATIO * ratios[start]).abs().argmin()))
    ticks = tuple(dict.fromkeys((start, second, 0)))
    return LevelPlan(ticks, start / grid.ticks)


def denoise_plan(grid: PhaseGrid, schedule: Schedule, ratio: float, steps: int | None = None) -> LevelPlan:
    """Levels that take a latent of this noise-to-signal ratio to a clean one; none for a ratio of 0.

    It starts at the first level that is at least as noisy, on a solver point or not, since the noise that a
    solver point has more would have to be put in first. The phases' edges below follow; a single phase is
    gone through in `steps` equal parts (default: 1).
    """
    if ratio <= 0:
        return LevelPlan((0,), 0.0)
    start = min(int((k_noise_to_signal(schedule) < ratio).sum()), grid.ticks)
    parts = steps or 1
    landings = grid.edges if grid.phases > 1 else [round(start * j / parts) for j in range(parts)]
    ticks = (start, *sorted({tick for tick in landings if tick < start}, reverse=True))

    count = len(ticks) - 1
    if steps in (None, count):
        return LevelPlan(ticks, start / grid.ticks)
    verb = "is" if count == 1 else "are"
    note = f"From the level of this noise on there {verb} {count_steps(count)}, not {steps}."
    return LevelPlan(ticks, start / grid.ticks, (note,))


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
    """The levels that take white noise of standard deviation `std` out of pictures, and noise to add.

    picture: (B, 3, H, W) in [0, 1]. The second result is a share, 0 to 1, of the first level's unit noise:
    that level is the first whole tick at least as noisy as the encoded picture, and the noise that the
    picture lacks of it has to be put in. Independent noises add by their variances, hence the squares.
    """
    ratio = latent_noise(codec, picture, std, seed, multiple)
    plan = denoise_plan(grid, schedule, ratio, steps)
    if not plan.steps:
        return plan, 0.0
    level = k_noise_to_signal(schedule)[plan.ticks[0]].item()
    return plan, max(0.0, 1 - (ratio / level) ** 2) ** 0.5


def k_noise_to_signal(schedule: Schedule) -> Tensor:
    """(T + 1,) sigma / alpha of every tick, for the points that the host samples.

    It goes through the host's table, which stays finite at the end of a zero-terminal-SNR schedule: the
    levels of a training objective (`objectives.distances`) do not, and differ in the last bit.
    """
    sigma = schedule.k_sigma(torch.arange(schedule.ticks + 1))
    return sigma / schedule.k_alpha(sigma)


def latent_noise(codec: Codec, picture: Tensor, std: float, seed: int = 0, multiple: int = CELL) -> float:
    """The standard deviation that pixel noise of standard deviation `std` has in a picture's latent.

    Measured by encoding the picture with so much more of it: encoders average
    noise away, each in its own measure.
    """
    image = extended(picture, canvas(tuple(picture.shape[-2:]), multiple))
    noise = std * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed)).to(image)
    return (codec.encode((image + noise).clamp(0, 1)) - codec.encode(image)).float().std().item()


def estimated_noise(picture: Tensor) -> float:
    """Standard deviation of the white noise in a picture (B, 3, H, W), from its second differences.

    Immerkaer, Fast noise variance estimation (1996), but by the median, which fine structure moves less than
    the mean. 0 for a picture too small to have any.
    """
    if min(picture.shape[-2:]) < 3:
        return 0.0
    kernel = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]]).to(picture).expand(picture.shape[1], 1, 3, 3)
    differences = F.conv2d(picture, kernel, groups=picture.shape[1])
    # The kernel's norm is 6: unit noise comes out of it with standard deviation 6.
    return (differences.abs().median() / MEDIAN_OF_UNIT_NOISE / 6).item()


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The noise a share of the way from `a` to `b` (B, ...) on the great circle; 0 is a, 1 is b, bit for bit.

    A straight line would lose variance on the way, and with it the level of noise that the network expects.
    """
    # On the CPU, since not every device has float64.
    first = a.flatten(1).cpu().double()
    second = b.flatten(1).cpu().double()
    cosine = F.cosine_similarity(first, second).clamp(-1, 1)
    angle = cosine.acos()

    # Noises (nearly) on one line have no great circle of their own: they are mixed linearly.
    same = angle.sin() < 1e-6
    sine = torch.where(same, 1.0, angle.sin())
    weight_a = torch.where(same, 1 - share, ((1 - share) * angle).sin() / sine)
    weight_b = torch.where(same, share, (share * angle).sin() / sine)
    mixed = weight_a[:, None] * first + weight_b[:, None] * second
    return mixed.view_as(a).to(a)


def slerped(a: NoiseSampler, b: NoiseSampler, share: float) -> NoiseSampler:
    """The noise sampler whose noise is `slerp` of that of two others."""
    return lambda sigma, sigma_next: slerp(a(sigma, sigma_next), b(sigma, sigma_next), share)


def checked(values: Tensor, picture: Tensor) -> Tensor:
    """The values that a VAE gave for a picture; ValueError where they are not finite."""
    if not values.isfinite().all():
        raise ValueError(
            f"The VAE gave numbers that are not finite for a picture of {size_text(picture)}. SDXL's does so in fp16: "
            "run it in fp32 or bf16 (in ComfyUI: --fp32-vae or --bf16-vae), or take a VAE that is mended for fp16."
        )
    return values
