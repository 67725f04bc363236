"""Labelled picture grids: rows are settings, columns are prompts."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LABEL_WIDTH, CAPTION_HEIGHT, GAP = 132, 44, 4


def draw_grid(rows: list[tuple[str, Tensor]], captions: list[str], cell: int | None = None) -> Image.Image:
    """One row of pictures a setting: (label, pixels (B, 3, H, W) in [0, 1]); captions: one a column, drawn above.

    cell: side to draw the pictures at; default: their own, but at least 96 so that captions fit.
    """
    side = cell or max(96, rows[0][1].shape[-1])
    columns = len(captions)
    size = (LABEL_WIDTH + columns * (side + GAP), CAPTION_HEIGHT + len(rows) * (side + GAP))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    letters = max(8, side // 6)
    for j, caption in enumerate(captions):
        lines = textwrap.wrap(caption, letters)
        text = "\n".join(lines[:3]) + ("…" if len(lines) > 3 else "")
        place, small = (LABEL_WIDTH + j * (side + GAP), 2), ImageFont.load_default(10)
        pen.multiline_text(place, text, fill="black", font=small, spacing=1)
    for i, (label, pixels) in enumerate(rows):
        top = CAPTION_HEIGHT + i * (side + GAP)
        pen.multiline_text((6, top + side // 2 - 14), label, fill="black", font=font)
        for j, picture in enumerate(pixels[:columns]):
            image = to_image(picture).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(image, (LABEL_WIDTH + j * (side + GAP), top))
    return sheet


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> picture."""
    return Image.fromarray(pixels.mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
