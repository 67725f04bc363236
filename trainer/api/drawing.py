"""Pictures from Python: drawn and edited with a base and a LoRA, as `pcm sample` and `pcm edit` do."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ...samplers import operators
from ..families import Base, Condition
from ..inference.edit import STEPS_ALONE, Edited, Editor
from ..inference.sample import draw_rows
from ..lora.install import Installed, install_for_sample, load_for_sample, null_of, uninstall
from ..lora.merged import merge_into
from ..pictures import Pictures, hole_notes, read_pictures, to_image, with_mask

Picture = Image | str | Path  # Pillow's, or a file
Draw = Callable[[Editor, Condition, int, float], Edited]  # the prompt's encoding, the seed, how far to go


def load_base(
    base: str | Path,
    *,
    lora: str | Path | None = None,
    loras: Sequence[str] = (),
    dtype: str = "fp32",
    **reading: Any,
) -> Base:
    """A base on the best device: a diffusers folder, a single .safetensors file, a hub id, or a bundled tiny one.

    lora: that it is to be sampled with, whose recipe may say how the base is read. loras: style LoRAs to merge into it,
    as in `base.loras`. dtype: "fp32", "bf16" or "fp16".
    reading: those of `pcm sample` by name: family, tokenizer, config, parts, t5.
    Raises ValueError or FileNotFoundError for what cannot be read.
    """
    loaded = load_for_sample(os.path.expanduser(base), dtype, _file(lora), **reading)
    merge_into(loaded, loras)
    return loaded


def sample(
    base: Base | str | Path,
    prompts: str | Sequence[str],
    *,
    lora: str | Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    strength: float | None = None,
    gamma: float | None = None,
    seed: int = 0,
    resolution: int | None = None,
) -> list[Image]:
    """Pictures of prompts, one each, by the samplers that run in ComfyUI.

    base: loaded, or what `load_base` takes; one that was loaded is left as it was. What is None is as the LoRA's recipe
    says; without a LoRA 8 steps are taken. What does not suit the LoRA is a warning (`warnings.warn`).
    Raises ValueError or FileNotFoundError for bad input.
    """
    prompts = [prompts] if isinstance(prompts, str) else [*prompts]
    with _installed(base, lora, strength) as (loaded, put):
        count = steps or (put.recipe.steps if put.recipe else STEPS_ALONE)
        drawn = draw_rows(loaded, put, prompts, [count], guidance, negative, gamma, seed, resolution)
    _warn(drawn.warnings)
    return [to_image(picture) for picture in drawn.rows[0].pixels]


def edit(
    kind: str,
    base: Base | str | Path,
    image: Picture,
    prompt: str = "",
    *,
    lora: str | Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    strength: float | None = None,
    gamma: float | None = None,
    seed: int = 0,
    denoise: float | None = None,
    **options: Any,
) -> Image:
    """A picture edited with a few-step LoRA, or with none; what the edit keeps it keeps exactly (docs/editing.md).

    kind: "inpaint" (options: mask, grow), "outpaint" (left, top, right, bottom, grow), "colorize", "upscale" (factor),
    "stroke" or "denoise" (noise, in levels of 255). base, and what is None: as in `sample`. denoise: how far to go from
    where the edit starts, in (0, 1]; the edit of that name takes none.
    Raises ValueError or FileNotFoundError for bad input, before the base is loaded where it can be seen by then.
    """
    if kind not in EDITS:
        raise ValueError(f"There is no edit {kind!r}; available: {', '.join(EDITS)}.")
    prepare, usual_denoise = EDITS[kind]
    known = list(inspect.signature(prepare).parameters)[1:]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"{kind} takes no {unknown[0]}; its options: {', '.join(known) or 'none'}.")
    if denoise is not None and usual_denoise is None:
        raise ValueError(f"{kind} starts where the picture's noise is, and takes no denoise: give the noise.")
    draw = prepare(read_pictures([_picture(image)]), **options)

    with _installed(base, lora, strength) as (loaded, put):
        settings = {"steps": steps, "guidance": guidance, "gamma": gamma, "notes": put.notes}
        editor = Editor(loaded, put.recipe or loaded.alone, null_of(loaded, negative), **settings)
        edited = draw(editor, loaded.encode_prompts([prompt]), seed, usual_denoise if denoise is None else denoise)
    _warn(editor.warnings(edited.plan))
    return to_image(edited.image[0])


# --- edits


def _inpaint(pictures: Pictures, *, mask: Picture | None = None, grow: int = 8) -> Draw:
    """mask: white where to draw; None: where the picture is transparent."""
    masks = None if mask is None else [_picture(mask)]
    return _keeping(operators.Inpaint(*with_mask(pictures, masks), grow))


def _outpaint(
    pictures: Pictures, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0, grow: int = 24
) -> Draw:
    return _keeping(operators.outpaint(pictures.pixels, left, top, right, bottom, grow))


def _colorize(pictures: Pictures) -> Draw:
    return _keeping(operators.Colorize(pictures.pixels))


def _upscale(pictures: Pictures, *, factor: int = 2) -> Draw:
    return _keeping(operators.SuperResolution(pictures.pixels, factor))


def _stroke(pictures: Pictures) -> Draw:
    return lambda editor, prompts, seed, denoise: editor.stroke(pictures.pixels, prompts, seed, denoise)


def _denoise(pictures: Pictures, *, noise: float | None = None) -> Draw:
    """noise: its standard deviation in levels of 255; None: estimated."""
    if noise is not None and not 0 <= noise <= 255:
        raise ValueError(f"noise is {noise:g}; a standard deviation of 0 to 255 levels.")
    share = None if noise is None else noise / 255
    return lambda editor, prompts, seed, denoise: editor.denoise(pictures.pixels, prompts, seed, share)


def _keeping(operator: operators.Operator) -> Draw:
    if isinstance(operator, operators.Inpaint):
        _warn(hole_notes(operator.hole))
    return lambda editor, prompts, seed, denoise: editor.edit(operator, prompts, seed, denoise)


# An edit's name -> what prepares it from the pictures and its options, and how far it goes by default.
EDITS: dict[str, tuple[Callable[..., Draw], float | None]] = {
    "inpaint": (_inpaint, 1.0),
    "outpaint": (_outpaint, 1.0),
    "colorize": (_colorize, 1.0),
    "upscale": (_upscale, 0.75),
    "stroke": (_stroke, 0.75),
    "denoise": (_denoise, None),
}


# --- what both share


@contextmanager
def _installed(
    base: Base | str | Path, lora: str | Path | None, strength: float | None
) -> Iterator[tuple[Base, Installed]]:
    """The base, loaded, with the LoRA in it for this block alone."""
    if strength is not None and lora is None:
        raise ValueError(f"strength is {strength:g}, and there is no lora that it could be of.")
    loaded = base if isinstance(base, Base) else load_base(base, lora=lora)
    try:
        yield loaded, install_for_sample(_file(lora), loaded, strength)
    finally:
        uninstall(loaded)


def _file(file: str | Path | None) -> Path | None:
    return None if file is None else Path(file).expanduser()


def _picture(picture: Picture) -> Path | Image:
    return picture if isinstance(picture, Image) else Path(picture).expanduser()


def _warn(sentences: Iterable[str]) -> None:
    """Warn whoever has called `sample` or `edit`, once of each."""
    for sentence in dict.fromkeys(sentences):
        warnings.warn(sentence, UserWarning, stacklevel=3)
