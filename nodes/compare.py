"""The node that draws one picture at several settings, side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.sample
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..samplers import LevelPlan, Recipe
from ..samplers.phases import count_steps
from . import inputs
from .edit_kinds import image_of
from .grid import Row, labelled_grid
from .guidance import schedule_in
from .host import fit_to_model, menu_of, show, speaking, warned
from .lora_on_model import pixels_of, recipe_at, recipe_for
from .previews import preview_callback
from .sampling import advice, draw, shifted
from .vae import check_family, decode_last

CLIP_FRAMES = 3  # of a clip, that the grid shows
STEP_COUNTS = "Write whole numbers, such as 1, 2, 4, 8."
MODES = (
    "Write from recipe, deterministic, stochastic, or gamma and a number from 0 to 1, such as: deterministic, "
    "stochastic, gamma 0.3."
)


@dataclass(frozen=True)
class Setting:
    """A picture of the grid: its number of steps, the recipe in its mode, and the levels."""

    steps: int
    recipe: Recipe
    plan: LevelPlan

    @property
    def steps_text(self) -> str:
        """The steps in words: those that are run, and of how many where denoise leaves some out."""
        total = count_steps(self.steps)
        return total if self.plan.steps == self.steps else f"{self.plan.steps} of {total}"

    @property
    def text(self) -> str:
        return f"{self.steps_text}, {self.recipe.mode_text}"


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
                    tooltip="An empty latent for text to image, an encoded picture for image to image. The pictures of "
                    "a batch stand side by side.",
                ),
                *inputs.prompts(),
                inputs.seed(tooltip="The same for all pictures."),
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
                io.Image.Output(
                    display_name="grid",
                    tooltip="A row for each mode and a column for each number of steps, with what each picture cost.",
                ),
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
        model, recipe = recipe_at(model, recipe_for(cls, model, recipe), *pixels_of(model, latent["samples"]))
        cfg = cfg or recipe.guidance
        settings, faults = settings_of(recipe, step_counts, modes, denoise)

        # Faults before anything is drawn. Each picture's own settings, the last
        # sentence, stand beside it.
        samples = latent["samples"]
        advices = [
            advice(cls, model, recipe, recipe.steps, cfg, each.plan, positive, samples)[:-1] for each in settings
        ]
        lines = [*warned(faults), *dict.fromkeys(line for each in advices for line in each)]
        show(cls, lines or [f"{len(settings)} settings to draw."])

        noise = comfy.sample.prepare_noise(latent["samples"], seed, latent.get("batch_index"))
        schedule = schedule_in(model)
        cfg_text = schedule.text if schedule else f"CFG {cfg:g}"
        evaluations: list[int] = []
        model = counted(model, evaluations)
        second = {"low_noise_model": low_noise_model and counted(low_noise_model, evaluations)}

        total = sum(each.plan.steps for each in settings)
        show_step = preview_callback(model, total)

        def draw_setting(each: Setting, steps_before: int) -> Tensor:
            progress = shifted(show_step, steps_before, total)
            prompts = (positive, negative)
            return draw(model, each.recipe, each.plan, cfg, *prompts, latent, noise, seed, callback=progress, **second)

        drawn, costs, failures = draw_all(settings, draw_setting, evaluations)

        # All decoded in one go: where memory runs out, every picture is tiled,
        # so that none differs by its decode.
        pixels, notes = decode_last(
            vae, last_decode, lambda codec: torch.cat([codec.decode(z) for z in drawn.values()])
        )
        images = image_of(pixels)
        latents = next(iter(drawn.values()))
        strips = dict(zip(drawn, (columns(strip, latents) for strip in images.chunk(len(drawn))), strict=True))
        grid = labelled_grid(*rows_of(settings, strips, costs, cfg_text))
        lines = [*warned(f"{each.text}: {failure}" for each, failure in failures.items()), *notes, *lines]
        lines += [f"{each.text}, {cfg_text}: {costs[each]}." for each in drawn]
        return io.NodeOutput(grid, images, ui=show(cls, lines))


def draw_all(
    settings: Sequence[Setting], draw_setting: Callable[[Setting, int], Tensor], evaluations: list[int]
) -> tuple[dict[Setting, Tensor], dict[Setting, str], dict[Setting, str]]:
    """The latents of settings, what each cost in words, and why others failed, such as for want of a second expert.

    draw_setting: draws one, after so many steps of those before. evaluations: of `counted`. Raises ValueError where
    none can be drawn.
    """
    drawn = {}
    costs = {}
    failures = {}
    steps_before = 0
    for each in settings:
        evaluations.clear()
        try:
            drawn[each] = draw_setting(each, steps_before)
        except ValueError as error:
            failures[each] = str(error)
        steps_before += each.plan.steps
        costs[each] = cost_text(sum(evaluations))
    if not drawn:
        raise ValueError("\n".join(dict.fromkeys(failures.values())))
    return drawn, costs, failures


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


def read_step_counts(text: str) -> tuple[list[int], list[str]]:
    """Numbers of steps from text such as "1, 2, 4", each once, and a sentence for each word that is none."""
    words = [word for word in re.split(r"[\s,;]+", text) if word]
    counts = dict.fromkeys(word for word in words if re.fullmatch(r"[0-9]{1,4}", word))
    faults = [
        f"step_counts is {text!r}, of which {word!r} is no number of steps. {STEP_COUNTS}"
        for word in dict.fromkeys(words)
        if word not in counts
    ]
    if not words:
        faults = [f"step_counts is {text!r}, in which there is no number. {STEP_COUNTS}"]
    return list(dict.fromkeys(map(int, counts))), faults


def read_modes(text: str, recipe: Recipe) -> tuple[list[Recipe], list[str]]:
    """The recipe in each mode of text such as "deterministic, gamma 0.3", and a sentence for each that is none."""
    variants = []
    faults = []
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
            faults.append(f"modes is {text!r}, of which {word!r} is none. {MODES}")
    if not variants and not faults:
        faults = [f"modes is {text!r}, in which there is none. {MODES}"]
    singles = list(dict.fromkeys(variants))
    if len(singles) < len(variants):
        faults.append(f"modes is {text!r}, of which some are the same for this LoRA: each is drawn once.")
    return singles, faults


def settings_of(recipe: Recipe, step_counts: str, modes: str, denoise: float) -> tuple[list[Setting], list[str]]:
    """What is drawn, all numbers of steps (0 is the recipe's) in the first mode first, and what is wrong with the rest,
    a sentence each.

    Raises ValueError, with these sentences, where nothing is left to draw.
    """
    counts, count_faults = read_step_counts(step_counts)
    variants, mode_faults = read_modes(modes, recipe)
    faults = [*count_faults, *mode_faults]
    settings = []
    for variant in variants:
        for steps in dict.fromkeys(steps or recipe.steps for steps in counts):
            try:
                settings.append(Setting(steps, variant, variant.grid().plan(steps, denoise)))
            except ValueError as error:
                faults.append(f"{steps} of step_counts is left out: {error}")
    if not settings:
        raise ValueError("\n".join(dict.fromkeys(faults)))
    return settings, list(dict.fromkeys(faults))


def rows_of(
    settings: Sequence[Setting], strips: dict[Setting, Tensor], costs: dict[Setting, str], cfg_text: str
) -> tuple[list[str], list[Row]]:
    """The grid of `grid.labelled_grid`: numbers of steps, and a row of pictures (B, h, w, C) for each mode.

    strips: the pictures of the settings that could be drawn. costs: what each took, in words.
    """
    step_counts = list(dict.fromkeys(each.steps for each in settings))
    rows = []
    for recipe in dict.fromkeys(each.recipe for each in settings):
        cells = {each.steps: each for each in settings if each.recipe is recipe}
        in_order = [cells[steps] for steps in step_counts]
        captions = [
            [*([each.steps_text] if each.plan.steps != each.steps else []), costs[each] if each in strips else "failed"]
            for each in in_order
        ]
        label = [*recipe.mode_text.split(", "), *cfg_text.replace(" on ", "\non ").splitlines()]
        rows.append(Row(label, [strips.get(each) for each in in_order], captions))
    return [count_steps(steps) for steps in step_counts], rows


def cost_text(evaluations: int) -> str:
    return f"{evaluations} evaluation{'s' * (evaluations != 1)}"
