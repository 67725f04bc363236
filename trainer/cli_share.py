"""`pcm convert`, `tag`: LoRA files for other programs and other people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, answer

File = Annotated[Path, typer.Argument(help="A LoRA in .safetensors.")]
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
    from .sharing.convert import convert as run

    details = run(source, out, to, family=family, alpha=alpha, overwrite=overwrite)
    answer(details, as_json, details["text"])


def tag(
    file: File,
    changes: Annotated[list[str], typer.Argument(metavar="[KEY=VALUE ...]", help="Entries to set.")] = None,
    remove: Annotated[list[str], typer.Option(help="Entry to remove. Repeat for several.")] = None,
    out: Annotated[Path, typer.Option(help="Write a copy instead of the file itself.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Change the metadata in a LoRA's header. The tensors and their hash (AutoV3) stay as they are.

    Example: pcm tag mine.safetensors modelspec.author=me "modelspec.license=CC BY 4.0" --remove ss_seed
    """
    from .sharing.tag import tag as run

    if wrong := next((text for text in changes or () if not text.partition("=")[1] or text.startswith("=")), None):
        raise ValueError(f"{wrong!r} is no entry; write key=value.")
    details = run(file, dict(text.split("=", 1) for text in changes or ()), remove or (), out, overwrite)
    answer(details, as_json, details["text"])


VERBS = (convert, tag)
