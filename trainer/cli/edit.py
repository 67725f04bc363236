"""`pcm edit`: a verb for each zero-shot edit, from picture files to picture files (samplers/editing.py)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .edit_options import EditRequest, KeepingOptions, OutputOptions, PictureOptions
from .options import BaseOptions, Resolution, SamplingOptions, verb

if TYPE_CHECKING:
    from ..families import Condition
    from ..inference.edit import Edited, Editor

edit = typer.Typer(
    no_args_is_help=True,
    help="Edit pictures with any few-step LoRA, or with none: nothing is trained for it. What an edit keeps it keeps "
    "exactly.",
)
Grow = Annotated[int, typer.Option(help="Width of the rim around the mask, in pixels, that is blended.")]
Denoise = Annotated[
    float,
    typer.Option(help="How far to go from where it starts: 1 all the way; less snaps to the edges of a LoRA's phases."),
]
Side = Annotated[int, typer.Option(help="Pixels to add there.")]


@verb(edit)
def inpaint(
    base: BaseOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    source: PictureOptions,
    keeping: KeepingOptions,
    mask: Annotated[
        list[Path],
        typer.Option(
            help="White where to draw, black to keep, grey to blend; default: the transparent parts of the picture."
        ),
    ] = None,
    grow: Grow = 8,
    denoise: Denoise = 1.0,
) -> None:
    """Draw where the mask is white. All other pixels stay as they are, but for a rim that is blended.

    Without --mask the transparent parts of the picture are drawn, and the result has none. Repeat --mask for one of
    each picture.

    Example: pcm edit inpaint --base base.safetensors --lora pcm.safetensors --image photo.png --mask mask.png
    --prompt "a fox on a blue background" --out out.png
    """
    from ...samplers.operators import Inpaint
    from ..pictures import hole_notes, with_mask

    request = EditRequest("inpaint", base, sampling, output, source, keeping)
    pictures = request.read_pictures()
    operator = Inpaint(*with_mask(pictures, mask), grow)
    request.keep(operator, denoise, pictures, hole_notes(operator.hole))


@verb(edit)
def outpaint(
    base: BaseOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    source: PictureOptions,
    keeping: KeepingOptions,
    left: Side = 0,
    top: Side = 0,
    right: Side = 0,
    bottom: Side = 0,
    grow: Annotated[int, typer.Option(help="Width of the picture's rim, in pixels, that is blended.")] = 24,
    denoise: Denoise = 1.0,
) -> None:
    """Draw what is beyond the picture's sides. Its pixels stay as they are, but for a rim that is blended.

    Example: pcm edit outpaint --base base.safetensors --lora pcm.safetensors --image photo.png --left 64 --right 64
    --prompt "a wide beach" --out out.png
    """
    from ...samplers import operators
    from ..pictures import hole_notes

    request = EditRequest("outpaint", base, sampling, output, source, keeping)
    pictures = request.read_pictures()
    operator = operators.outpaint(pictures.pixels, left, top, right, bottom, grow)
    request.keep(operator, denoise, pictures, hole_notes(operator.hole))


@verb(edit)
def colorize(
    base: BaseOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    source: PictureOptions,
    keeping: KeepingOptions,
    denoise: Denoise = 1.0,
) -> None:
    """Draw the colours of a grey picture. The luminance of every pixel stays as it is; colours it has are not used.

    Example: pcm edit colorize --base base.safetensors --lora pcm.safetensors --image old.jpg
    --prompt "a colour photo of a harbour" --out out.png
    """
    from ...samplers.operators import Colorize

    request = EditRequest("colorize", base, sampling, output, source, keeping)
    pictures = request.read_pictures()
    request.keep(Colorize(pictures.pixels), denoise, pictures)


@verb(edit)
def upscale(
    base: BaseOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    source: PictureOptions,
    keeping: KeepingOptions,
    factor: Annotated[int, typer.Option(help="How many times as wide and high.")] = 2,
    denoise: Denoise = 0.75,
) -> None:
    """Make a picture larger, with detail that is drawn. The mean of the pixels that one becomes is that pixel.

    Example: pcm edit upscale --base base.safetensors --lora pcm.safetensors --image small.png --factor 4
    --prompt "a sharp photo of a cat" --out out.png
    """
    from ...samplers.operators import SuperResolution

    request = EditRequest("upscale", base, sampling, output, source, keeping)
    pictures = request.read_pictures()
    notes = ["--factor 1 keeps every pixel: the result is the picture itself."] if factor == 1 else []
    request.keep(SuperResolution(pictures.pixels, factor), denoise, pictures, notes)


@verb(edit)
def stroke(
    base: BaseOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    source: PictureOptions,
    denoise: Denoise = 0.75,
) -> None:
    """Paint a picture after rough strokes of colour, or vary one. Nothing of it is kept but what the noise leaves.

    Example: pcm edit stroke --base base.safetensors --lora pcm.safetensors --image strokes.png --denoise 0.75
    --prompt "a castle on a hill" --out out.png
    """
    request = EditRequest("stroke", base, sampling, output, source)
    pictures = request.read_pictures()

    def draw(editor: Editor, prompts: Condition) -> Edited:
        return editor.stroke(pictures.pixels, prompts, sampling.seed, denoise)

    request.draw(draw, pictures)


@verb(edit)
def denoise(
    base: BaseOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    source: PictureOptions,
    noise: Annotated[
        float,
        typer.Option(help="Standard deviation of the noise, in levels of 255; default: estimated, and said."),
    ] = None,
) -> None:
    """Take white noise out of a picture. It is drawn anew from the level of its noise; several are taken to have one.

    Example: pcm edit denoise --base base.safetensors --lora pcm.safetensors --image noisy.png --out out.png
    """
    from ...samplers.editing import estimated_noise

    if noise is not None and not 0 <= noise <= 255:
        raise ValueError(f"--noise is {noise:g}; a standard deviation of 0 to 255 levels.")
    request = EditRequest("denoise", base, sampling, output, source)
    pictures = request.read_pictures()

    notes = []
    if noise is None:
        noise = 255 * estimated_noise(pictures.pixels[:, :3])
        notes.append(f"The noise is estimated at {noise:.1f} of 255 levels; --noise says another.")
    if noise == 0:
        notes.append("There is no noise to take out: the result is the picture itself.")

    def draw(editor: Editor, prompts: Condition) -> Edited:
        return editor.denoise(pictures.pixels, prompts, sampling.seed, noise / 255)

    request.draw(draw, pictures, notes, facts={"noise": noise})


@verb(edit)
def interpolate(
    base: BaseOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    prompt: Annotated[str, typer.Option(help="Of the first frame.")],
    to_prompt: Annotated[str, typer.Option(help="Of the last frame; default: the same.")] = None,
    to_seed: Annotated[int, typer.Option(help="Of the last frame's noise; default: the same.")] = None,
    frames: Annotated[int, typer.Option(help="How many, the two ends among them.")] = 8,
    resolution: Resolution = None,
) -> None:
    """Go from one prompt to another, from one seed to another, or both, in so many frames.

    The first and the last are the pictures of their prompt and seed alone. --out gets all side by side, and
    NAME_1.png, NAME_2.png, ... one each.

    Example: pcm edit interpolate --base base.safetensors --lora pcm.safetensors --prompt "a castle by day"
    --to-prompt "a castle by night" --frames 8 --out frames.png
    """
    from ...samplers.editing import CELL
    from ..pictures import numbered, sheet, write_pictures

    request = EditRequest("interpolate", base, sampling, output)
    request.check()
    prompts = (prompt, prompt if to_prompt is None else to_prompt)
    seeds = (sampling.seed, sampling.seed if to_seed is None else to_seed)
    if prompts[0] == prompts[1] and seeds[0] == seeds[1]:
        raise ValueError("Both ends have one prompt and one seed: give another --to-prompt, --to-seed, or both.")
    if frames < 2:
        raise ValueError(f"--frames is {frames}; at least 2, the two ends.")

    editor = request.open_editor()
    _, height, width = editor.base.latent_shape(resolution or editor.base.default_resolution)
    ends = tuple(editor.base.encode_prompts([words]) for words in prompts)
    drawn = editor.interpolate((CELL * height, CELL * width), ends, seeds, frames)

    files = numbered(output.out, frames)
    write_pictures(drawn.image, files)
    write_pictures(sheet(drawn.image), [output.out])
    request.tell(editor, drawn, [output.out, *files], [], {"to_seed": seeds[1], "frames": frames})
