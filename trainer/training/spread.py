"""How a LoRA that matches distributions is measured in its run: its set of pictures against the teacher's, and whether
the pictures of one prompt become alike.

Nothing is paired: such a LoRA need not draw what the teacher draws from the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...samplers.phases import count_steps
from ..evaluation.distances import SCALE, kernel_distance, precision_and_recall
from ..evaluation.metrics import diversities
from ..reporting.log import DISTANCE, DIVERSITY, RECALL, LogLine

NOISES = 2  # pictures of each prompt
ALIKE = 0.85  # of the teacher's diversity, below which a falling one is told


def distance_at(steps: int) -> str:
    """The name of the distance at this number of steps."""
    return f"{DISTANCE} at {count_steps(steps)}"


def compared(pictures: Tensor, teacher: Tensor, steps: int) -> dict[str, float]:
    """Figures of latents (N * NOISES, ...), those of one prompt in a row, against the teacher's from other noise.

    The kernel distance (times `SCALE`), how much pictures of a prompt differ as a share of the teacher's, and the share
    of the teacher's that lie among them.
    """
    samples, reference = (x.flatten(1).unflatten(0, (-1, NOISES)) for x in (pictures, teacher))
    within, usual = diversities(samples).mean(), diversities(reference).mean()
    _, recall = precision_and_recall(samples, reference)
    return {
        distance_at(steps): kernel_distance(samples, reference).value * SCALE,
        f"{DIVERSITY} at {count_steps(steps)}": (within / usual).item(),
        f"{RECALL} at {count_steps(steps)}": recall.value,
    }


def collapse(measured: Sequence[LogLine], steps: int) -> str:
    """A sentence where the pictures of one prompt have become alike since they differed most, "" elsewhere.

    measured: lines of the log, in their order. steps: the LoRA's own number.
    """
    name = f"{DIVERSITY} at {count_steps(steps)}"
    shares = [(line["figures"][name], line["step"]) for line in measured if name in line["figures"]]
    if not shares:
        return ""
    (now, _), (most, then) = shares[-1], max(shares)
    if now >= ALIKE or now >= most:
        return ""
    return (
        f"Its pictures of one prompt become alike: they differ {now:.2f} times as much as the teacher's, and did so "
        f"{most:.2f} times after update {then}. The critic is too slow for it: raise objective.critic_updates or "
        "objective.critic_lr, or lower train.lr."
    )
