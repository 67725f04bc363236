"""The operators of edits: each projects any picture onto those that agree with what is known of one.

Pictures are (B, 3, H, W) in [0, 1], in fp32. `project` is idempotent; what it must keep it keeps exactly,
before the picture is rounded to 8 bits. These are the (A, Omega) of each task in the consistency-models paper
(arXiv 2303.01469, Alg. 4 and App. D) in closed form, with the result pulled back into [0, 1] where plain
clipping would break what was kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Shares of red, green and blue in the luminance (arXiv 2303.01469, App. D), scaled
# to sum to 1: grey keeps its value.
LUMA = torch.tensor([0.2989, 0.5870, 0.1140]) / (0.2989 + 0.5870 + 0.1140)


class Operator(ABC):
    """One edit of one batch of pictures.

    start: (B, 3, H, W) the picture that the edit begins with, as large as its result.
    alpha: (B, 1, H, W) the result's transparency, from pictures that have one; None for others.
    to_the_end: whether the last x0 is projected in its latent too, or the result alone.
    """

    start: Tensor
    alpha: Tensor | None = None
    to_the_end: bool = True

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        return tuple(self.start.shape[-2:])

    def project(self, image: Tensor) -> Tensor:
        """The picture next to `image` (B, 3, H, W) that agrees with what is known.

        Raises ValueError for a picture of another size.
        """
        self._check(image)
        return self._project(image.float())

    @abstractmethod
    def _project(self, image: Tensor) -> Tensor:
        """`project` of a picture of the right size."""

    def finish(self, image: Tensor) -> Tensor:
        """The result from the last decoded picture: it agrees with what is known, transparency included.

        Raises ValueError for a picture of another size.
        """
        self._check(image)
        result = self._result(image.float().clamp(0, 1))
        if self.alpha is None:
            return result
        return torch.cat([result, self.alpha.to(result).expand(len(result), -1, -1, -1)], 1)

    def _result(self, image: Tensor) -> Tensor:
        """The colours of the result, from a picture of the right size in [0, 1]."""
        return self._project(image).clamp(0, 1)

    def _check(self, image: Tensor) -> None:
        if tuple(image.shape[-2:]) != self.size:
            raise ValueError(f"A picture of {size_text(image)} was given to an edit of {size_text(self.start)}.")


class Identity(Operator):
    """Nothing is kept but where the edit starts: strokes, variations."""

    def __init__(self, picture: Tensor):
        self.start, self.alpha = rgb_and_alpha(picture)

    def _project(self, image: Tensor) -> Tensor:
        return image


class Inpaint(Operator):
    """The picture outside the mask is known, and stays pixel for pixel beyond a rim that is blended.

    picture: (B, 1, 3 or 4, H, W). mask: (B, 1, H, W) or (B, H, W) in [0, 1], 1 where to draw; between 0 and 1
    both are blended in the result. grow: width of the rim around the mask, in pixels, over which the drawn
    picture (its version of what is known there) goes over into the given one, so that no seam shows.
    Raises ValueError for a mask of another size or number, and for a negative grow.
    """

    def __init__(self, picture: Tensor, mask: Tensor, grow: int = 8):
        image, self.alpha = rgb_and_alpha(picture)
        mask = (mask[:, None] if mask.ndim == 3 else mask).float().clamp(0, 1)
        if mask.shape[-2:] != image.shape[-2:]:
            raise ValueError(
                f"The mask is {size_text(mask)} and the picture {size_text(image)}: they must be of one size. "
                "Scale the mask to the picture, or draw it on the picture itself."
            )
        if 1 != len(mask) != len(image) != 1:
            raise ValueError(f"{len(mask)} masks for {len(image)} pictures: give one mask, or one for each picture.")
        if grow < 0:
            raise ValueError(f"grow is {grow}; the rim around the mask is 0 or more pixels wide.")
        grow = min(grow, max(image.shape[-2:]))

        # The new picture's share: 1 on the mask, 0 beyond grow. Widened first, so that the blur starts
        # outside the mask and no known pixel shows through where something new was wanted.
        blur = grow // 2
        self.weight = _box_blur(dilate(mask, grow - blur), blur)
        self.hole = (mask > 0).float()

        # With a rim the last x0 is left as drawn: a latent that must hold both sides of the mask's edge would
        # draw that edge into the rim.
        self.to_the_end = not grow
        self.known = image
        self.start = fill(image, self.hole)

    def _project(self, image: Tensor) -> Tensor:
        return torch.where(self.hole.to(image.device) > 0, image, self.known.to(image))

    def _result(self, image: Tensor) -> Tensor:
        return torch.lerp(self.known.to(image), image, self.weight.to(image))  # exact at both ends

    def cells(self, factor: int, canvas: tuple[int, int]) -> Tensor:
        """The latent cells to draw, (B, 1, h, w): 1 for those that hold any pixel of the hole.

        factor: pixels a cell, along a side. canvas: height and width of the encoded picture, of which the
        part beyond this picture is no hole.
        """
        below = canvas[0] - self.size[0]
        right = canvas[1] - self.size[1]
        return F.max_pool2d(F.pad(self.hole, (0, right, 0, below)), factor)


def outpaint(picture: Tensor, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0, grow: int = 8) -> Inpaint:
    """The inpainting of a picture that is so many pixels larger on its sides; those are the hole, and opaque.

    Raises ValueError when there is none to add, or a negative number of them.
    """
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    if min(sides.values()) < 0 or not any(sides.values()):
        raise ValueError(f"Outpainting adds pixels on at least one side; got {sides}.")
    pads = (left, right, top, bottom)
    image, alpha = rgb_and_alpha(picture)
    mask = F.pad(torch.zeros_like(image[:, :1]), pads, value=1.0)
    wider = F.pad(image, pads)
    if alpha is not None:
        wider = torch.cat([wider, F.pad(alpha, pads, value=1.0)], 1)
    return Inpaint(wider, mask, grow)


class Colorize(Operator):
    """The luminance stays: LUMA's weighted sum of red, green, blue. What is drawn brings the colours.

    The difference in luminance is taken off all three channels alike, which keeps the drawn chroma (R - Y and
    B - Y); a pixel that this takes out of [0, 1] is pulled toward its grey,
    which leaves the luminance as it is.
    """

    def __init__(self, picture: Tensor):
        image, self.alpha = rgb_and_alpha(picture)
        self.grey = luminance(image)
        self.start = self.grey.expand(-1, 3, -1, -1)

    def _project(self, image: Tensor) -> Tensor:
        grey = self.grey.to(image)
        shifted = image + (grey - luminance(image))
        return _into_range(shifted, grey.expand_as(shifted), lambda factor: factor.amin(1, keepdim=True))


class SuperResolution(Operator):
    """Every block of factor x factor pixels keeps its mean: the pixel of the small picture.

    picture: the small one, (B, C, h, w); the result is factor times as large. The difference in means is
    added to the whole block; a block that this takes out of [0, 1] is pulled
    toward its mean, a channel at a time.
    Raises ValueError for a factor that is no whole number of at least 1.
    """

    def __init__(self, picture: Tensor, factor: int = 2):
        if factor != int(factor) or factor < 1:
            raise ValueError(f"factor is {factor}; it must be a whole number, 1 or more.")
        self.factor = int(factor)
        self.low, alpha = rgb_and_alpha(picture)
        self.start = self._project(F.interpolate(self.low, scale_factor=float(self.factor), mode="bicubic"))
        self.alpha = None if alpha is None else self._enlarged(alpha)

    def _project(self, image: Tensor) -> Tensor:
        low = self.low.to(image)
        shifted = image + self._enlarged(low - F.avg_pool2d(image, self.factor))
        return _into_range(shifted, self._enlarged(low), self._least_of_block)

    def _least_of_block(self, values: Tensor) -> Tensor:
        """The least value of each block, at every pixel of the block."""
        return self._enlarged(-F.max_pool2d(-values, self.factor))

    def _enlarged(self, small: Tensor) -> Tensor:
        return small.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)


def rgb_and_alpha(picture: Tensor) -> tuple[Tensor, Tensor | None]:
    """RGB (B, 3, H, W) within [0, 1] in fp32, and transparency (B, 1, H, W), or None, of a picture.

    picture: (B, 1, 3 or 4, H, W), or a grey one (B, H, W).
    Raises ValueError for another shape, an empty picture, and numbers that are not finite.
    """
    picture = picture[:, None] if picture.ndim == 3 else picture
    if picture.ndim != 4 or picture.shape[1] not in (1, 3, 4) or not picture.numel():
        raise ValueError(
            f"Pictures must be (batch, 1, 3 or 4 channels, height, width), none of them 0; got {tuple(picture.shape)}."
        )
    if not picture.isfinite().all():
        raise ValueError(f"The picture of {size_text(picture)} holds numbers that are not finite.")
    picture = picture.float().clamp(0, 1)
    rgb = picture[:, :3] if picture.shape[1] > 1 else picture.expand(-1, 3, -1, -1)
    return rgb, picture[:, 3:] if picture.shape[1] == 4 else None


def size_text(picture: Tensor) -> str:
    """The size of a picture (..., H, W) as people write it, width x height."""
    return f"{picture.shape[-1]}x{picture.shape[-2]}"


def luminance(image: Tensor) -> Tensor:
    """The luminance (B, 1, H, W) of a picture (B, 3, H, W): `LUMA`'s weighted sum."""
    return (image * LUMA.to(image).view(3, 1, 1)).sum(1, keepdim=True)


def fill(image: Tensor, hole: Tensor) -> Tensor:
    """The picture with the hole (B, 1, H, W; 1 is unknown) filled by colours that flow in from its rim.

    From coarse to fine: the known pixels are averaged until none is unknown, and handed back down. Grey where
    all are unknown.
    """
    if not hole.any():
        return image.expand(max(len(image), len(hole)), -1, -1, -1)
    if max(image.shape[-2:]) == 1:
        return torch.where(hole > 0, 0.5, image)

    # Averages of the known pixels alone, at half the size. A block that holds none is a hole there, too.
    known = F.avg_pool2d(1 - hole, 2, ceil_mode=True)
    mean = F.avg_pool2d(image * (1 - hole), 2, ceil_mode=True) / known.clamp(min=1e-6)
    coarse = fill(mean, (known == 0).float())
    return torch.where(hole > 0, F.interpolate(coarse, image.shape[-2:], mode="bilinear"), image)


def _into_range(image: Tensor, centre: Tensor, least: Callable[[Tensor], Tensor]) -> Tensor:
    """The picture pulled toward a centre in [0, 1] by as little as brings it into [0, 1].

    least: from the factor that each value may keep of its distance, the least among the values that have to
    share one (a pixel's channels, a block's pixels), at each of them. Sharing
    it is what keeps their weighted sum.
    """
    distance = image - centre
    factor = torch.where(distance > 0, 1 - centre, centre) / distance.abs().clamp(min=1e-12)
    return centre + least(factor).clamp(max=1) * distance


def dilate(mask: Tensor, radius: int) -> Tensor:
    """A mask (B, 1, H, W), larger by so many pixels on every side and corner."""
    # Rows and columns in turn: the maximum over a square, in a fraction of the time.
    across = F.max_pool2d(mask, (1, 2 * radius + 1), 1, (0, radius))
    return F.max_pool2d(across, (2 * radius + 1, 1), 1, (radius, 0))


def _box_blur(mask: Tensor, radius: int) -> Tensor:
    """A mask (B, 1, H, W) averaged over the square of this radius around each pixel."""
    padded = F.pad(mask, (radius,) * 4, mode="replicate")
    across = F.avg_pool2d(padded, (1, 2 * radius + 1), 1)
    return F.avg_pool2d(across, (2 * radius + 1, 1), 1)
