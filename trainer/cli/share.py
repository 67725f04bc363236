"""`pcm convert`, `tag`, `merge`, `resize`, `extract`, `sidecars`, `panels`: LoRA files for other programs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .options import BasePath, Json, LoraFile, answer, check_files, place_option

Out = Annotated[Path, typer.Option(help="The .safetensors to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
OfFamily = Annotated[str, typer.Option(help="sd15, sdxl or sd3, for a file that does not tell.")]


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A LoRA of any key style, in .safetensors.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors to write.")],
    to: Annotated[str, typer.Option(help="kohya (ComfyUI, A1111, Forge, diffusers) or diffusers.")],
    alpha: Annotated[float, typer.Option(help="For a file without; PCM's training scripts have 8.")] = None,
    family: OfFamily = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a LoRA under kohya's or diffusers' names. Weights, alpha, recipe and metadata stay; hashes are made anew.

    Example: pcm convert adapter_model.safetensors mine.safetensors --to kohya --alpha 8
    """
    check_files(source)

    from ..sharing.convert import convert as run

    details = run(source, out, to, family=family, alpha=alpha, overwrite=overwrite)
    answer(details, as_json, details["text"])


def tag(
    file: LoraFile,
    changes: Annotated[list[str], typer.Argument(metavar="[KEY=VALUE ...]", help="Entries to set.")] = None,
    remove: Annotated[list[str], typer.Option(help="Entry to remove. Repeat for several.")] = None,
    thumbnail: Annotated[Path, typer.Option(help="A picture for ComfyUI's model library and SwarmUI.")] = None,
    out: Annotated[Path, typer.Option(help="Write a copy instead of the file itself.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Change the metadata in a LoRA's header. The tensors and their hash (AutoV3) stay as they are.

    Example: pcm tag mine.safetensors modelspec.author=me "modelspec.license=CC BY 4.0" --thumbnail grid.png
    """
    from ..sharing.tag import tag as run
    from ..sharing.tag import thumbnail as entry_of

    if wrong := next((text for text in changes or () if not text.partition("=")[1] or text.startswith("=")), None):
        raise ValueError(f"{wrong!r} is no entry; write key=value.")
    entries = dict(text.split("=", 1) for text in changes or ()) | (entry_of(thumbnail) if thumbnail else {})
    details = run(file, entries, remove or (), out, overwrite)
    answer(details, as_json, details["text"])


def merge(
    files: Annotated[list[str], typer.Argument(metavar="FILE[:STRENGTH] ...", help="LoRAs of one family.")],
    out: Out,
    rank: Annotated[int, typer.Option(help="At most this, by SVD; default: exact, the ranks side by side.")] = None,
    family: OfFamily = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge LoRAs into one that adds their sum at strength 1. Without a strength, each has what its recipe wants, or 1.

    Example: pcm merge pcm-4step.safetensors style.safetensors:0.7 --out fast-style.safetensors
    """
    strengths = [_with_strength(text) for text in files]
    check_files(*(file for file, _ in strengths))

    from ..sharing.merge import merge as run

    details = run(strengths, out, rank=rank, family=family, overwrite=overwrite)
    answer(details, as_json, details["text"])


def resize(
    file: LoraFile,
    out: Out,
    rank: Annotated[int, typer.Option(help="At most this in every module.")] = None,
    error: Annotated[float, typer.Option(help="Instead: the least ranks with at most this error, as 0.1.")] = None,
    family: OfFamily = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Lower a LoRA's ranks by SVD, and say how far what it adds is from what it added (Frobenius norm).

    Example: pcm resize mine.safetensors --rank 16 --out mine-16.safetensors
    """
    check_files(file)

    from ..sharing.resize import resize as run

    details = run(file, out, rank=rank, error=error, family=family, overwrite=overwrite)
    answer(details, as_json, details["text"])


def extract(
    base: BasePath,
    tuned: Annotated[str, place_option(help="What it was tuned to, likewise.")],
    out: Out,
    rank: Annotated[int, typer.Option(help="Of every module.")] = 64,
    dtype: Annotated[str, typer.Option(help="Of the file: fp32, bf16 or fp16.")] = "fp16",
    family: Annotated[str, typer.Option(help="sd15, sdxl or sd3; default: found from the base.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make a LoRA of what one checkpoint's network changed in another's, by SVD, and say what it does not hold.

    Example: pcm extract --base base.safetensors --tuned tuned.safetensors --rank 64 --out tuned-lora.safetensors
    """
    from ..sharing.extract import extract as run

    details = run(base, tuned, out, rank=rank, dtype=dtype, family=family, overwrite=overwrite)
    answer(details, as_json, details["text"])


def sidecars(
    file: LoraFile,
    preview: Annotated[Path, typer.Option(help="A picture, to be FILE's .preview.png.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write what A1111 (.json) and Lora-Manager (.metadata.json) read beside a LoRA, and its preview picture.

    Example: pcm sidecars mine.safetensors --preview grid.png
    """
    from ..sharing.sidecars import sidecars as run

    details = run(file, preview, overwrite)
    answer(details, as_json, details["text"])


def panels(
    file: LoraFile,
    out: Annotated[Path, typer.Option(help="The .html to write.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Draw what A1111, Lora-Manager, ComfyUI and SwarmUI show of a LoRA, where it comes from, and what is missing.

    Example: pcm panels mine.safetensors --out mine.html
    """
    from ..sharing.panels import write_page

    details = write_page(file, out, overwrite)
    problems = [f"{panel['program']}: {problem}" for panel in details["panels"] for problem in panel["problems"]]
    answer(details, as_json, "\n".join([details["text"], *problems]))


def _with_strength(text: str) -> tuple[Path, float | None]:
    """ "a.safetensors:0.7" -> its path and strength; a drive's colon is none."""
    text = os.path.expanduser(text)
    path, colon, number = text.rpartition(":")
    if not colon or number.lower().endswith((".safetensors", ".sft")):
        return Path(text), None
    try:
        return Path(path), float(number)
    except ValueError:
        raise ValueError(f"The strength of {path} is {number!r}; expected a number, such as {path}:0.7.") from None


VERBS = (convert, tag, merge, resize, extract, sidecars, panels)
