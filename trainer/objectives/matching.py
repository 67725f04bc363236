"""Distribution matching: the student's own samples are pulled to where the teacher's density outgrows theirs.

There is no data and no target. From noise the student draws its own trajectory of K jumps, from starts u_1 = T > u_2
> ... to landings s_1, s_2, ..., and each landing is re-noised by the exact forward kernel to a level t. There two
networks say what they see (`training/matching.py`):

    real    the teacher's x0, with guidance: uncond + scale (cond - uncond)
    fake    the critic's x0: a second adapter that learns the student's own distribution, and it alone

Their difference is that of two scores, so it is the gradient of a divergence: with q the density of the re-noised
landings and p the teacher's,

    d KL(q_t || p_t) / d x_t = score_q - score_p = alpha_t / sigma_t^2 (fake - real)

and by the chain rule of re-noising and jump it reaches the student's x0 (DMD, arXiv 2311.18828, Eq. 7; TDM, arXiv
2503.06674, Sec. 4). The critic minimises a denoising loss on the same landings, at levels and noise of its own.

Shapes: points (B, C, h, w), levels (B,) ticks; those of a whole trajectory (B, K).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...samplers import Schedule
from ...samplers.schedule import TICKS, rows
from .distances import huber, noise_level
from .objective import Distillation, Jumps, Levels, Solver

# Re-noised points lie so many ticks above their landing at least, where the phase is as wide, and at most at this tick:
# below, nothing is hidden that could be told apart, and above, nothing can be seen (DMD2's 0.02 and 0.98 of T).
LEAST, HIGHEST = 20, 980
NORM_FLOOR = 1e-4  # of the mean distance that a pull is divided by
Region = Literal["phase", "all", "above"]


@dataclass(frozen=True)
class Draws:
    """What chance decides of one batch of trajectories of K jumps, beside their first noise.

    fresh: noise put on between the steps (B, K - 1, C, h, w), None where they are deterministic. tick: (B, K, 1 + N)
    levels that each landing is re-noised to, the first for the student's loss, the others for the critic's N updates;
    noise: (B, K, 1 + N, C, h, w). guided_tick, guided_noise: those of guidance (B, K), (B, K, C, h, w), None where it
    is taken at the student's.
    """

    fresh: Tensor | None
    tick: Tensor
    noise: Tensor
    guided_tick: Tensor | None
    guided_noise: Tensor | None


@dataclass(frozen=True)
class Matched:
    """One jump of a batch as its loss sees it.

    x0: the student's, with gradient, at its start u; s: where it landed; tick: where that was re-noised to. fake, real:
    the critic's and the teacher's x0 there, the latter for the prompt alone. push: cond - uncond of the teacher, None
    without guidance. schedule: of the base.
    """

    x0: Tensor
    u: Tensor
    s: Tensor
    tick: Tensor
    fake: Tensor
    real: Tensor
    push: Tensor | None
    schedule: Schedule


@dataclass(frozen=True)
class Criticised:
    """One landing of a batch as the critic's loss sees it.

    prediction: the critic's x0, with gradient, at the point that the landing at s was re-noised to at `tick`, with this
    noise. x0: the student's.
    """

    prediction: Tensor
    x0: Tensor
    point: Tensor
    noise: Tensor
    s: Tensor
    tick: Tensor
    schedule: Schedule


class Matching(Distillation):
    """Objectives without data, whose student and critic are two adapters of one base."""

    points: int = Field(40, description="points of the grid that its steps lie on; divides 1000")
    guidance: tuple[float, float] = Field(
        (5.0, 6.0),
        description="CFG range of the teacher's own steps: those of an anchor, and what the LoRA is measured against",
    )
    scale: float | None = Field(
        None,
        ge=1,
        description="CFG scale of the teacher that is matched, less than what it is sampled at; default: 2 with "
        "smallcfg, 1 with normalcfg",
    )
    matching_levels: Region | None = Field(
        None,
        description="where landings are re-noised to: phase, up to the jump's start; all, up to the noise; above, from "
        "the start up (in the first phase within it); default: phase for tdm, all for dmd",
    )
    guidance_levels: Region | None = Field(
        None, description="the same for guidance alone, at a pass more; default: at the same point"
    )
    weighting: Literal["distance", "divergence"] = Field(
        "distance",
        description="of the pull. distance: over the mean distance of the student's x0 to the guided teacher's; "
        "divergence: the gradient of the divergence itself",
    )
    anchor: float = Field(
        0.0,
        ge=0,
        description="the first jump keeps to the teacher's guided trajectory with this weight instead of matching; "
        "0: it matches too",
    )
    anchor_steps: int = Field(4, ge=1, le=100, description="the teacher's DDIM steps over the first jump of an anchor")
    beta1: float = Field(0.0, ge=0, lt=1, description="AdamW's first beta, of student and critic")
    critic_rank: int | None = Field(None, ge=1, description="rank of the critic; default: the LoRA's")
    critic_lr: float | None = Field(None, gt=0, description="learning rate of the critic; default: train.lr")
    critic_updates: int = Field(2, ge=1, le=20, description="updates of the critic before each of the student's")
    critic_warmup: int = Field(
        10, ge=0, description="updates of the run in which only the critic learns, before the student's first"
    )
    critic_grad_norm: float | None = Field(
        None, gt=0, description="norm to which a larger gradient of the critic is clipped; default: train.max_grad_norm"
    )
    critic_ema: float = Field(
        0.0, ge=0, lt=1, description="decay of the averaged critic that the student's loss asks; 0: the critic itself"
    )
    min_snr: float = Field(5.0, gt=0, description="the critic's loss of x0 is weighted by the SNR, at most this")

    matching: ClassVar[bool] = True
    target_network: ClassVar[bool] = False
    loss_tells: ClassVar[bool] = False
    usual_levels: ClassVar[Region] = "all"

    @model_validator(mode="after")
    def _check_scale(self):
        self.starts()
        if self.scale not in (None, 1) and not self.guided():
            raise ValueError(
                f"objective.scale = {self.scale:g} distils guidance in, and objective.guidance_mode is normalcfg, "
                "which leaves it to the sampler. Leave objective.scale out, or set objective.guidance_mode=smallcfg"
            )
        if self.guidance_levels and self.matched_scale == 1:
            raise ValueError(
                f"objective.guidance_levels = {self.guidance_levels}: without guidance in the matched teacher (scale "
                "1) there is nothing to take at them. Leave it out, or set objective.scale above 1"
            )
        return self

    @property
    def matched_scale(self) -> float:
        """CFG scale of the teacher that is matched."""
        if self.scale is None:
            return 2.0 if self.guided() else 1.0
        return self.scale

    @property
    def jumps(self) -> int:
        """K, how many jumps a trajectory has."""
        return len(self.starts())

    @abstractmethod
    def starts(self) -> tuple[int, ...]:
        """Ticks at which the jumps of a trajectory start, from T down."""

    @abstractmethod
    def landings(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, K) ticks that the jumps of as many trajectories land on, for the loss."""

    def levels(self, count: int, schedule: Schedule, progress: float, generator: torch.Generator) -> Levels:
        u = torch.tensor(self.starts()).expand(count, -1)
        s = self.landings(count, generator)
        return Levels(u, s, s)

    def draws(self, levels: Levels, shape: tuple[int, ...], generator: torch.Generator) -> Draws:
        """The rest of what chance decides of trajectories at these levels (B, K); shape: of a point (C, h, w)."""
        count, jumps = levels.u.shape

        def noise(*size: int) -> Tensor:
            return torch.randn(count, *size, *shape, generator=generator)

        updates = 1 + self.critic_updates
        guided = self.guidance_levels
        return Draws(
            fresh=noise(jumps - 1) if self.gamma and jumps > 1 else None,
            tick=self._ticks(self.matching_levels or self.usual_levels, levels, updates, generator),
            noise=noise(jumps, updates),
            guided_tick=self._ticks(guided, levels, 1, generator)[..., 0] if guided else None,
            guided_noise=noise(jumps) if guided else None,
        )

    def _ticks(self, region: Region, levels: Levels, count: int, generator: torch.Generator) -> Tensor:
        """(B, K, count) ticks of a region, uniform, each above its landing."""
        u, s = levels.u.unsqueeze(-1), levels.s.unsqueeze(-1)
        high = u if region == "phase" else torch.full_like(u, TICKS)
        high = high.clamp(max=HIGHEST).maximum(s + 1)
        # above the first start there is nothing
        low = torch.where(u < HIGHEST, u, s + LEAST) if region == "above" else s + LEAST
        low = low.minimum(high)
        share = torch.rand(*levels.u.shape, count, generator=generator)
        return low + (share * (high - low + 1)).long()

    def passes(self) -> int:
        """Forward passes of the network that one trajectory takes in an update."""
        matched = 1 + (self.matched_scale > 1) + bool(self.guidance_levels) + 1 + 1  # teacher, critic, student
        anchored = bool(self.anchor)
        anchor = anchored * (1 + self.anchor_steps * (2 if self.guided() else 1))
        return self.jumps * (1 + self.critic_updates) + (self.jumps - anchored) * matched + anchor

    def teacher_solver(self) -> tuple[Solver, int]:
        """An anchor's: DDIM over the whole first jump."""
        return "ddim", self.anchor_steps

    def distance(self, jumps: Jumps) -> Tensor:
        """An anchor's: pseudo-Huber of the student's landing to the teacher's."""
        return self.anchor * huber(jumps.student, jumps.target, 1e-3)

    def loss(self, matched: Matched) -> Tensor:
        """(B,) a loss whose gradient in the student's x0 is the pull, over the number of elements of a sample.

        Its value, half the mean square of the pull, says nothing about progress.
        """
        x0 = matched.x0
        with torch.no_grad():
            target = matched.real
            if matched.push is not None:
                target = target + (self.matched_scale - 1) * matched.push
            pull = self._weight(matched, target) * (matched.fake - target)
        return 0.5 * (x0 - (x0.detach() - pull)).square().flatten(1).mean(1)

    def _weight(self, matched: Matched, target: Tensor) -> Tensor:
        """(B, 1, ...) what the difference of both x0 is multiplied by."""
        if self.weighting == "distance":
            return rows(1 / (matched.x0 - target).abs().flatten(1).mean(1).clamp(min=NORM_FLOOR), target)
        schedule = matched.schedule
        alpha, sigma = schedule.alpha(matched.tick), schedule.sigma(matched.tick)
        kept = alpha / schedule.alpha(matched.s)
        return rows(slope(schedule, matched.u, matched.s) * kept * alpha / sigma**2, target)

    def critic_loss(self, seen: Criticised) -> Tensor:
        """(B,) the critic's denoising loss: squares of x0, weighted by the SNR up to `min_snr`."""
        snr = noise_level(seen.schedule, seen.tick) ** -2
        return snr.clamp(max=self.min_snr) * (seen.prediction - seen.x0).square().flatten(1).mean(1)


def slope(schedule: Schedule, u: Tensor, s: Tensor) -> Tensor:
    """(B,) how far the landing of a jump from ticks u to ticks s (B,) moves with the x0 that it is made with.

    Its point at u stays, so that eps moves against x0: alpha_s - sigma_s alpha_u / sigma_u.
    """
    return schedule.alpha(s) - schedule.sigma(s) * schedule.alpha(u) / schedule.sigma(u)
