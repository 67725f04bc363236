"""Aspect-ratio buckets: the sizes that pictures are cut to, each to the one nearest its own shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

# `Base.latent_shape`: side in pixels -> (C, h, w); ValueError for a side that the network cannot take
LatentShape = Callable[[int], tuple[int, int, int]]
# Sides are multiples of this many pixels, where the network and the resolution allow it.
STEP = 64
# Longer by shorter side of the widest and of the tallest bucket.
WIDEST = 2.0


class Buckets(NamedTuple):
    """The sizes that pictures are cut to: (width, height) of each in pixels."""

    sizes: tuple[tuple[int, int], ...]

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """The bucket of nearest aspect ratio for a picture of this size; among equally near ones the largest."""
        return min(self.sizes, key=lambda s: (round(_apart(width / height, s), 9), -s[0] * s[1]))

    def check_filled(self, aspects: Iterable[float]) -> None:
        """Raise ValueError for buckets to which no picture of these aspect ratios (width by height) goes."""
        aspects = np.unique(np.fromiter(aspects, float))
        filled = {self.nearest(aspect, 1) for aspect in aspects}
        empty = [size for size in self.sizes if size not in filled]
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


def buckets_for(listed: bool | tuple[str, ...], resolution: int, latent_shape: LatentShape) -> Buckets:
    """The buckets of a run. listed: the setting `data.buckets`, a list of sizes ("768x512"), or True for the
    standard sizes that have about the area of a square with sides of `resolution` pixels.

    Raises ValueError for a listed side that the network cannot take.
    """
    if isinstance(listed, tuple):
        sizes = tuple(tuple(int(side) for side in name.split("x")) for name in listed)
        for name, size in zip(listed, sizes, strict=True):
            try:
                latent_size(latent_shape, size)
            except ValueError as error:
                raise ValueError(f"data.buckets lists {name}: {str(error).replace('resolution', 'side', 1)}") from None
        return Buckets(sizes)

    # Steps are multiples of the smallest side that the network takes. Where the resolution is small they are
    # an eighth of it, or there would be few buckets.
    smallest = next(side for side in range(1, resolution + 1) if _takes(latent_shape, side))
    return standard_buckets(resolution, max(smallest, min(STEP, resolution // 8) // smallest * smallest))


def standard_buckets(resolution: int, step: int) -> Buckets:
    """Every size from 1:2 to 2:1 whose sides are multiples of `step` pixels and whose area is about resolution^2."""
    sizes = {(resolution, resolution)}
    for side in range(step, round(WIDEST * resolution), step):
        other = round(resolution**2 / side / step) * step
        if max(side, other) <= WIDEST * min(side, other):
            sizes |= {(side, other), (other, side)}
    return Buckets(tuple(sorted(sizes, key=lambda s: s[0] / s[1])))


def latent_size(latent_shape: LatentShape, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the latent of a picture of (width, height) pixels.

    Raises ValueError for a side that the network cannot take.
    """
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
    cut_off = 1 - frame.prod(1) / covering.prod(1)
    outside = (original.max(1) / original.min(1)) > WIDEST
    if outside.any():
        notes.append(
            f"{_pictures(outside.sum())} wider than 2:1 or taller than 1:2, cropped to the nearest bucket, which cuts "
            f"off {cut_off[outside].min():.0%} to {cut_off[outside].max():.0%} of each"
        )

    if (scale > 1).any():
        small = _pictures((scale > 1).sum())
        notes.append(f"{small} smaller than the bucket and enlarged, {scale.max():.1f} times at most")
    return notes


def _pictures(count: int) -> str:
    """ "1 picture is", "2 pictures are"."""
    return f"{count} picture{' is' if count == 1 else 's are'}"


def _apart(aspect: float, size: tuple[int, int]) -> float:
    """How far an aspect ratio is from that of a size: 0 for the same, and as far for half as for twice of it."""
    return abs(math.log(aspect * size[1] / size[0]))


def _takes(latent_shape: LatentShape, side: int) -> bool:
    """Whether the network takes pictures with a side of this many pixels."""
    try:
        latent_shape(side)
    except ValueError:
        return False
    return True
