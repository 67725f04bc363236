"""Pictures in rows and columns, with words above, beside and under them, as one IMAGE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALLEST = 14  # pixels: the least height of the labels' letters
PAPER = 0.1  # the grey behind them, 0 to 1


@dataclass(frozen=True)
class Row:
    """A row of a grid.

    label: lines of text at its left. pictures: (B, h, w, C) for each column, None where there is none.
    captions: lines of text under each.
    """

    label: list[str]
    pictures: list[Tensor | None]
    captions: list[list[str]]


def labelled_grid(columns: list[str], rows: Sequence[Row]) -> Tensor:
    """One IMAGE (1, H, W, C) of rows of pictures, unscaled, under the columns' names.

    The pictures of a batch stand side by side in their cell. The letters grow with the pictures; beside small ones
    they keep a size that can be read, and the cells grow.
    """
    example = next(picture for row in rows for picture in row.pictures if picture is not None)
    batch, height, width, channels = example.shape
    size = max(SMALLEST, height // 20)
    gap = size // 2

    names = [label_strip([name], size) for name in columns]
    labels = [label_strip(row.label, size) for row in rows]
    captions = [[label_strip(lines, size) for lines in row.captions] for row in rows]

    texts = [*names, *(strip for strips in captions for strip in strips)]
    cell_width = max(batch * (width + gap) - gap, *(strip.shape[1] for strip in texts))
    caption_height = max(strip.shape[0] for strips in captions for strip in strips)
    row_height = max(height + caption_height, *(strip.shape[0] for strip in labels))
    left = 2 * gap + max(strip.shape[1] for strip in labels)
    top = 2 * gap + names[0].shape[0]

    grid_height = top + len(rows) * (row_height + gap)
    grid_width = left + len(columns) * (cell_width + gap)
    grid = example.new_full((grid_height, grid_width, channels), PAPER)
    xs = [left + i * (cell_width + gap) for i in range(len(columns))]
    for x, name in zip(xs, names, strict=True):
        paste(grid, name[..., None], gap, x)
    for i, row in enumerate(rows):
        y = top + i * (row_height + gap)
        paste(grid, labels[i][..., None], y, gap)
        for x, picture, caption in zip(xs, row.pictures, captions[i], strict=True):
            for j, single in enumerate(() if picture is None else picture):
                paste(grid, single, y, x + j * (width + gap))
            paste(grid, caption[..., None], y + height, x)
    return grid[None]


def paste(grid: Tensor, picture: Tensor, top: int, left: int) -> None:
    """Put a picture (h, w, C or 1) into a grid (H, W, C), its corner at this row and column."""
    height, width = picture.shape[:2]
    grid[top : top + height, left : left + width] = picture


def label_strip(lines: list[str], size: int) -> Tensor:
    """Lines of text in letters of this size, as (h, w) in [0, 1]: white on `PAPER`."""
    from PIL import Image, ImageDraw

    font = label_font(size)
    line_height = round(1.3 * size)
    width = math.ceil(max(font.getlength(text) for text in lines))
    strip = Image.new("L", (width, line_height * len(lines)))
    for i, text in enumerate(lines):
        ImageDraw.Draw(strip).text((0, i * line_height), text, fill=255, font=font)
    ink = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8).view(strip.height, strip.width) / 255
    return PAPER + (1 - PAPER) * ink


def label_font(size: int) -> Any:
    """Pillow's own letters of this size. Before 10.1, and without FreeType, it has small ones alone."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError):
        return ImageFont.load_default()
