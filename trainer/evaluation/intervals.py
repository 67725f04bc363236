"""95 % confidence intervals of a report's figures: what other prompts and other noise would have given.

The unit that is drawn anew is a prompt with all of its pictures, since pictures of one prompt are alike. Draws are
fixed, and the same for every figure of as many prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch import Tensor

CONFIDENCE = 0.95
NORMAL = 1.96  # standard errors on each side of a normal figure
RESAMPLES = 1000
GROUPS, STUDENT = 20, 2.09  # a jackknife's groups, and the standard errors on each side, by Student's t of 19


@dataclass(frozen=True)
class Figure:
    """A measured number, and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        """Such as "0.120 [0.108, 0.135]"; form: of each number."""
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def __mul__(self, factor: float) -> Figure:
        """The figure in other units; factor: above 0."""
        return Figure(self.value * factor, self.low * factor, self.high * factor)

    @property
    def half_width(self) -> float:
        """Half of the interval."""
        return (self.high - self.low) / 2

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


@cache
def counts(number: int) -> Tensor:
    """(RESAMPLES, number) how often each of so many prompts is in each bootstrap sample of them."""
    drawn = torch.randint(number, (RESAMPLES, number), generator=torch.Generator().manual_seed(0))
    return torch.zeros(RESAMPLES, number, dtype=torch.double).scatter_add_(1, drawn, torch.ones(drawn.shape).double())


def mean_of(values: Tensor) -> Figure:
    """The mean of values (N, ...), one row for each prompt; of bool, their share.

    A bootstrap, whose spread is made as wide as that of N - 1 degrees of freedom. A share's interval is Wilson's, for
    as many pictures as would have its spread: a bootstrap of a share of 100 % would be sure of it.
    """
    rows = values.double().flatten(1).mean(1) if values.dim() > 1 else values.double()
    if values.dtype == torch.bool:
        return _share(rows, values.numel())
    middle = rows.mean()
    resampled = counts(len(rows)) @ rows / len(rows)
    wider = (len(rows) / max(1, len(rows) - 1)) ** 0.5
    return _between(middle, middle + wider * (resampled - middle))


def _share(rows: Tensor, pictures: int) -> Figure:
    """A share with Wilson's interval, from that of each prompt (N,)."""
    share, n = rows.mean().item(), len(rows)
    variance = rows.var().item() / n if n > 1 else 0.0
    effective = min(max(share * (1 - share) / variance, n), pictures) if variance else n
    middle = (share + NORMAL**2 / (2 * effective)) / (1 + NORMAL**2 / effective)
    root = (share * (1 - share) / effective + NORMAL**2 / (4 * effective**2)) ** 0.5
    half = NORMAL * root / (1 + NORMAL**2 / effective)
    return Figure(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))


def ratio_of(values: Tensor, reference: Tensor) -> Figure:
    """The mean of values (N,) over that of a reference (N,), where both are drawn anew together."""
    drawn = counts(len(values))
    value = values.double().mean() / reference.double().mean()
    return _between(value, (drawn @ values.double()) / (drawn @ reference.double()))


def mean_over_pairs(pairs: Tensor) -> Figure:
    """The mean of a symmetric (N, N) over pairs of different prompts: a U-statistic of second order.

    In a bootstrap sample a prompt may be drawn twice; a pair of it and itself is left out as well, else every sample
    would be biased by them. Where nothing but the pairs differs, as between two equal sets, the interval is up to 1.7
    times as wide as it had to be, since a bootstrap adds its own spread to that of the sums over a prompt's pairs.
    """
    pairs = pairs.double() - torch.diag(pairs.double().diagonal())
    drawn, number = counts(len(pairs)), len(pairs)
    value = pairs.sum() / (number * (number - 1))
    weight = (number**2 - drawn.square().sum(1)).clamp(min=1)  # 0 where one prompt is all that was drawn
    return _between(value, ((drawn @ pairs) * drawn).sum(1) / weight)


def jackknife(number: int, figure: Callable[[Tensor], float]) -> Figure:
    """`figure` of all of so many prompts (their indices), with an interval by leaving out a group of them at a time.

    For figures that a prompt drawn twice would change by itself, such as those of nearest neighbours. The interval is
    around what sets of this size give: a bias of the figure is not in it.
    """
    everyone = torch.arange(number)
    groups = min(GROUPS, number)
    left = torch.tensor([figure(everyone[everyone % groups != g]) for g in range(groups)], dtype=torch.double)
    value = figure(everyone)
    half = STUDENT * ((groups - 1) / groups * (left - left.mean()).square().sum()).sqrt().item()
    return Figure(value, value - half, value + half)


def _between(value: Tensor, resampled: Tensor) -> Figure:
    """A value with the middle 95 % of its bootstrap."""
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(resampled, torch.tensor([tail, 1 - tail], dtype=resampled.dtype)).tolist()
    return Figure(value.item(), min(low, value.item()), max(high, value.item()))
