"""Labelled picture grids: rows are settings, columns are prompts; and the one that a run draws as it goes."""

from __future__ import annotations

import textwrap
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..samplers.writing import written_whole
from .config import Config
from .data.cache import LatentCache
from .export import recipe_for
from .families import Base, Condition
from .generate import generate

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
    """(3, or 4 with transparency, H, W) in [0, 1] -> picture."""
    return Image.fromarray(pixels.mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def check_png(out: Path) -> None:
    """Raise ValueError for a name that is no PNG's."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out is {str(out)!r}; write a name that ends in .png.")


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all, in the format that its name says, making its folder.

    Raises ValueError for a name of no format.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path} is no picture's name: end it in .png.")
    with written_whole(path) as part:
        image.save(part, kind)


def preview_grid(config: Config, base: Base, cache: LatentCache, null: Condition, captions: bool) -> Image.Image:
    """The fixed prompts and seed of `preview` at each of its steps, with the adapter as it stands."""
    settings = config.preview
    prompts = list(settings.prompts) or list(islice(cache.prompts, 1, 5))  # the first is the empty one
    shape = base.latent_shape(config.data.resolution)
    noise = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(settings.seed))
    condition = {k: v.to(base.device) for k, v in cache.encoding(prompts).items()}
    recipe = base.alone if base.whole else recipe_for(config, base)
    how = {"gamma": recipe.gamma, "min_alpha": recipe.min_alpha, "seed": settings.seed}
    how["target_time"] = config.objective.target_time
    rows = []
    for steps in settings.steps:
        ticks = recipe.grid().plan(steps).ticks
        latents = generate(base, condition, null, noise, ticks, settings.guidance or recipe.guidance, **how)
        rows.append((f"{steps} step{'s' * (steps > 1)}", base.decode(latents)))
    return draw_grid(rows, prompts if captions else [""] * len(prompts))
