"""The node that draws one picture at several settings, side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import comfy.sample
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..samplers import LevelPlan, Recipe
from ..samplers.phases import count_steps
from . import inputs
from .edit_kinds import image_of
from .guidance import schedule_in
from .host import fit_to_model, menu_of, show, speaking
from .lora_on_model import pixels_of, recipe_at, recipe_for
from .sampling import advice, draw, shifted
from .vae import check_family, decode_last

SMALLEST = 14  # pixels: the least height of the labels' letters
CLIP_FRAMES = 3  # of a clip, that the grid shows
PAPER = 0.1  # the grey behind them, 0 to 1


class PCMCompare(io.ComfyNode):
    """PCM Compare: the same seed and prompt at several step counts and modes, as a labelled grid."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return speaking(
            node_id="PCMCompare",
            display_name="PCM Compare",
            category=menu_of("KSampler"),
            description="Draws the same seed and prompt at several step counts and modes, and puts the pictures side "
            "by side with what each of them cost.",
            search_aliases=["pcm", "phased consistency", "compare steps", "xy plot", "grid", "contact sheet"],
            inputs=[
                inputs.model(),
                inputs.recipe(),
                inputs.vae(),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent for text to image, an encoded picture for image to image. Each of a batch "
                    "is a column.",
                ),
                *inputs.prompts(),
                inputs.seed(tooltip="The same for all rows."),
                io.String.Input(
                    "step_counts",
                    default="1, 2, 4, 8",
                    tooltip="Numbers of steps, with commas between them. 0: as the recipe recommends.",
                ),
                io.String.Input(
                    "modes",
                    default="from recipe",
                    tooltip="With commas between them: from recipe, deterministic, stochastic, or gamma and a number, "
                    "such as gamma 0.3. Each is drawn at every step count.",
                ),
                inputs.cfg(),
                inputs.denoise(),
                inputs.last_decode(),
                inputs.low_noise_model(),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="A row for each setting, with its name and its cost."),
                io.Image.Output(display_name="images", tooltip="The single pictures, row after row, as a batch."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        latent_image: dict[str, Any],
        positive: list,
        negative: list,
        seed: int,
        step_counts: str,
        modes: str,
        cfg: float,
        denoise: float,
        last_decode: str = inputs.LAST_DECODES[0],
        recipe: Recipe | None = None,
        low_noise_model=None,
    ) -> io.NodeOutput:
        check_family(vae, model)
        latent = fit_to_model(model, latent_image)
        model, recipe = recipe_at(model, recipe_for(model, recipe), *pixels_of(model, latent["samples"]))
        cfg = cfg or recipe.guidance
        rows = rows_of(recipe, read_step_counts(step_counts), modes, denoise)

        # Faults before anything is drawn. Each row's own settings, the last
        # sentence, stand beside its picture.
        warnings = [advice(cls, model, recipe, recipe.steps, cfg, plan, positive)[:-1] for _, _, plan in rows]
        lines = list(dict.fromkeys(line for of_row in warnings for line in of_row))
        show(cls, lines or [f"{len(rows)} settings to draw."])

        noise = comfy.sample.prepare_noise(latent["samples"], seed, latent.get("batch_index"))
        schedule = schedule_in(model)
        cfg_text = schedule.text if schedule else f"CFG {cfg:g}"
        evaluations: list[int] = []
        model = counted(model, evaluations)
        second = {"low_noise_model": low_noise_model and counted(low_noise_model, evaluations)}

        total = sum(plan.steps for _, _, plan in rows)
        show_step = latent_preview.prepare_callback(model, total)
        steps_done = 0
        drawn = []  # latents, row after row
        labels = []
        costs = []
        for steps, variant, plan in rows:
            evaluations.clear()
            progress = shifted(show_step, steps_done, total)
            prompts = (positive, negative)
            drawn.append(draw(model, variant, plan, cfg, *prompts, latent, noise, seed, callback=progress, **second))
            steps_done += plan.steps

            setting = (steps_text(steps, plan), variant.mode_text)
            cost = cost_text(sum(evaluations))
            labels.append([*setting, *cfg_text.replace(" on ", "\non ").splitlines(), cost])
            costs.append(f"{', '.join(setting)}, {cfg_text}: {cost}.")

        # All decoded in one go: where memory runs out, every picture is tiled,
        # so that none differs by its decode.
        pixels, notes = decode_last(vae, last_decode, lambda codec: torch.cat([codec.decode(z) for z in drawn]))
        images = image_of(pixels)
        grid = labelled_grid([columns(strip, drawn[0]) for strip in images.chunk(len(rows))], labels)
        return io.NodeOutput(grid, images, ui=show(cls, [*notes, *lines, *costs]))


def counted(model: Any, evaluations: list[int]) -> Any:
    """A clone of a host MODEL at each of whose steps the list grows by the number of prompts evaluated, 1 or 2.

    Counted where the host hands prompts to the network, so that a CFG schedule
    and a negative prompt left out show.
    """
    model = model.clone()

    def count(executor: Callable[..., Any], network: Any, conds: list, *rest: Any, **more: Any) -> Any:
        evaluations.append(sum(cond is not None for cond in conds))
        return executor(network, conds, *rest, **more)

    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "pcm_compare", count)
    return model


def columns(images: Tensor, latent: Tensor) -> Tensor:
    """The pictures of a row that the grid shows: all, but of each clip no more than its first, middle and last frame.

    images: (B or B * T, H, W, C). latent: what they were decoded from, (B, C, t, h, w) for clips.
    """
    frames = len(images) // len(latent)
    if frames <= CLIP_FRAMES:
        return images
    shown = sorted({0, frames // 2, frames - 1})
    return images.unflatten(0, (len(latent), frames))[:, shown].flatten(0, 1)


def read_step_counts(text: str) -> list[int]:
    """Numbers of steps from text such as "1, 2, 4", each once. Raises ValueError for any other text."""
    words = [word for word in re.split(r"[\s,;]+", text) if word]
    odd = [word for word in words if not re.fullmatch(r"[0-9]{1,4}", word)]
    if odd or not words:
        fault = f"of which {odd[0]!r} is no number of steps" if odd else "in which there is no number"
        raise ValueError(f"step_counts is {text!r}, {fault}. Write whole numbers, such as 1, 2, 4, 8.")
    return list(dict.fromkeys(map(int, words)))


def read_modes(text: str, recipe: Recipe) -> list[Recipe]:
    """The recipe in each mode of text such as "deterministic, gamma 0.3". Raises ValueError for other text."""
    variants = []
    for word in filter(None, (" ".join(part.lower().split()) for part in re.split(r"[,;\n]", text))):
        gamma = re.fullmatch(r"gamma (0|1|[01]?\.[0-9]+)", word)
        if word == "from recipe":
            variants.append(recipe)
        elif word in inputs.MODES[1:3]:
            variants.append(replace(recipe, mode=word, gamma=None))
        elif gamma and float(gamma[1]) <= 1:
            share = float(gamma[1])
            variants.append(replace(recipe, mode="stochastic" if share else "deterministic", gamma=share))
        else:
            raise ValueError(
                f"modes is {text!r}, of which {word!r} is none. Write from recipe, deterministic, stochastic, or gamma "
                "and a number from 0 to 1, such as: deterministic, stochastic, gamma 0.3."
            )
    if not variants:
        raise ValueError(f"modes is {text!r}, in which there is none. Write one or more, such as from recipe.")
    return variants


def rows_of(recipe: Recipe, counts: list[int], modes: str, denoise: float) -> list[tuple[int, Recipe, LevelPlan]]:
    """Rows of the grid: number of steps (0 is the recipe's), the recipe in its mode, and the levels."""
    step_counts = dict.fromkeys(steps or recipe.steps for steps in counts)
    variants = read_modes(modes, recipe)
    return [(steps, variant, recipe.grid().plan(steps, denoise)) for variant in variants for steps in step_counts]


def steps_text(steps: int, plan: LevelPlan) -> str:
    """The steps of a row in words: those that are run, and of how many where denoise leaves some out."""
    return count_steps(steps) if plan.steps == steps else f"{plan.steps} of {count_steps(steps)}"


def cost_text(evaluations: int) -> str:
    return f"{evaluations} evaluation{'s' * (evaluations != 1)}"


def labelled_grid(rows: Sequence[Tensor], labels: list[list[str]]) -> Tensor:
    """One IMAGE (1, H, W, C) of rows of pictures (B, h, w, C), unscaled, each with its label at the left.

    The letters grow with the pictures; beside small ones they keep a size
    that can be read, and the rows grow.
    """
    batch, height, width, channels = rows[0].shape
    size = max(SMALLEST, height // 20)
    gap = size // 2
    strips = [label_strip(lines, size, gap) for lines in labels]
    label_width = max(strip.shape[1] for strip in strips)
    row_height = max(height, *(strip.shape[0] for strip in strips))

    grid_height = gap + len(rows) * (row_height + gap)
    grid_width = label_width + batch * (width + gap)
    grid = rows[0].new_full((grid_height, grid_width, channels), PAPER)
    for i, (pictures, strip) in enumerate(zip(rows, strips, strict=True)):
        top = gap + i * (row_height + gap)
        grid[top : top + strip.shape[0], : strip.shape[1]] = strip[..., None]
        for j, picture in enumerate(pictures):
            left = label_width + j * (width + gap)
            grid[top : top + height, left : left + width] = picture
    return grid[None]


def label_strip(lines: list[str], size: int, gap: int) -> Tensor:
    """Lines of text in letters of this size, as (h, w) in [0, 1]: white on `PAPER`, with a gap at both sides."""
    from PIL import Image, ImageDraw

    font = label_font(size)
    line_height = round(1.3 * size)
    width = math.ceil(max(font.getlength(text) for text in lines))
    strip = Image.new("L", (gap + width + gap, line_height * len(lines)))
    for i, text in enumerate(lines):
        ImageDraw.Draw(strip).text((gap, i * line_height), text, fill=255, font=font)
    ink = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8).view(strip.height, strip.width) / 255
    return PAPER + (1 - PAPER) * ink


def label_font(size: int) -> Any:
    """Pillow's own letters of this size. Before 10.1, and without FreeType, it has small ones alone."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError):
        return ImageFont.load_default()
