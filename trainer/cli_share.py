"""`pcm convert`: a LoRA file in the form that another program wants."""

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


VERBS = (convert,)
