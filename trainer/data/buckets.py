"""Aspect-ratio buckets: the sizes that pictures are cut to, each to the one nearest its own shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

# `Base.latent_shape`: side in pixels -> (C, h, w); ValueError for a side that the network cannot take
LatentShape = Callable[[int], tuple[int, int, int]]
# Sides are multiples of so many pixels, where the network and the resolution allow it.
STEP = 64
# The widest and the tallest bucket: width by height, and the other way round.
WIDEST = 2.0


class Buckets(NamedTuple):
    """(width, height) in pixels of each bucket."""

    sizes: tuple[tuple[int, int], ...]

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """The bucket of nearest aspect ratio; of equal ones the largest."""
        return min(self.sizes, key=lambda s: (round(_apart(width / height, s), 9), -s[0] * s[1]))

    def check_filled(self, aspects: Iterable[float]) -> None:
        """Raise ValueError for buckets to which no picture of these aspect ratios (width by height) goes."""
        aspects = np.unique(np.fromiter(aspects, float))
        taken = {self.nearest(aspect, 1) for aspect in aspects}
        empty = [size for size in self.sizes if size not in taken]
        if not empty or not len(aspects):
            return
        lines = []
        for size in empty:
            near = aspects[np.argsort([_apart(aspect, size) for aspect in aspects])[:3]]
            lines.append(
                f"data.buckets lists {name_of(size)} (aspect ratio {size[0] / size[1]:.3f}), which is nearest to no "
                f"picture; the nearest aspect ratios there are: {', '.join(f'{a:.3f}' for a in near)}."
            )
        raise ValueError("\n".join(lines) + "\nTake it off the list, or add pictures of its shape.")


def name_of(size: tuple[int, int]) -> str:
    """Width x height, as in `data.buckets`."""
    return f"{size[0]}x{size[1]}"


def buckets_for(asked: bool | tuple[str, ...], resolution: int, latent_shape: LatentShape) -> Buckets:
    """Those that `data.buckets` lists ("768x512"), or those with about the area of a square of this side.

    Raises ValueError for a listed side that the network cannot take.
    """
    if isinstance(asked, tuple):
        sizes = tuple(tuple(int(side) for side in name.split("x")) for name in asked)
        for name, size in zip(asked, sizes, strict=True):
            try:
                latent_size(latent_shape, size)
            except ValueError as error:
                raise ValueError(f"data.buckets lists {name}: {str(error).replace('resolution', 'side', 1)}") from None
        return Buckets(sizes)
    least = next(side for side in range(1, resolution + 1) if _takes(latent_shape, side))
    return standard_buckets(resolution, max(least, min(STEP, resolution // 8) // least * least))


def standard_buckets(resolution: int, step: int) -> Buckets:
    """Every size from 1:2 to 2:1 whose sides are multiples of `step` pixels and whose area is about resolution^2."""
    sizes = {(resolution, resolution)}
    for side in range(step, round(WIDEST * resolution), step):
        other = round(resolution**2 / side / step) * step
        if max(side, other) <= WIDEST * min(side, other):
            sizes |= {(side, other), (other, side)}
    return Buckets(tuple(sorted(sizes, key=lambda s: s[0] / s[1])))


def latent_size(latent_shape: LatentShape, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a latent for (width, height) in pixels; ValueError for what the network cannot take."""
    width, height = size
    return latent_shape(height)[1], latent_shape(width)[2]


def bucket_notes(sizes: np.ndarray) -> list[str]:
    """Sentences on what buckets do to pictures of these sizes (N, 6), as `load_picture` gives them."""
    original, frame = sizes[:, :2].astype(float), sizes[:, 4:].astype(float)
    kinds, counts = np.unique(sizes[:, 4:], axis=0, return_counts=True)
    by_shape = sorted(zip(kinds, counts, strict=True), key=lambda k: k[0][1] / k[0][0])
    notes = ["Buckets: " + ", ".join(f"{name_of((w, h))}: {count}" for (h, w), count in by_shape)]
    scale = (frame / original).max(1)
    covering = np.maximum(frame, np.round(original * scale[:, None]))
    lost = 1 - frame.prod(1) / covering.prod(1)
    outside = (original.max(1) / original.min(1)) > WIDEST
    if outside.any():
        notes.append(
            f"{_pictures(outside.sum())} wider than 2:1 or taller than 1:2, cropped to the nearest bucket, which cuts "
            f"off {lost[outside].min():.0%} to {lost[outside].max():.0%} of each"
        )
    if (scale > 1).any():
        small = _pictures((scale > 1).sum())
        notes.append(f"{small} smaller than the bucket and enlarged, {scale.max():.1f} times at most")
    return notes


def _pictures(count: int) -> str:
    return f"{count} picture{' is' if count == 1 else 's are'}"


def _apart(aspect: float, size: tuple[int, int]) -> float:
    return abs(math.log(aspect * size[1] / size[0]))


def _takes(latent_shape: LatentShape, side: int) -> bool:
    try:
        latent_shape(side)
    except ValueError:
        return False
    return True
