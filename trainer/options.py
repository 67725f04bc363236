"""What the verbs of `pcm` share: options with their help, and how an answer is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

SAMPLING, READING = "How it is sampled", "How the base is read"

Base = Annotated[
    str,
    typer.Option(help="Diffusers folder, single .safetensors checkpoint, hub id, or tiny-sd15, tiny-sdxl, tiny-sd3."),
]
Lora = Annotated[Path, typer.Option(help="LoRA to sample with.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Resolution = Annotated[int, typer.Option(help="Side in pixels; default: the base's own.")]

Guidance = Annotated[
    float,
    typer.Option(help="CFG scale, 1 is none; default: what the LoRA wants, or 7.5.", rich_help_panel=SAMPLING),
]
Negative = Annotated[
    str,
    typer.Option(help="For guidance above 1; default: what the base has for none.", rich_help_panel=SAMPLING),
]
Strength = Annotated[float, typer.Option(help="Of the LoRA; default: what it wants, else 1.", rich_help_panel=SAMPLING)]
Gamma = Annotated[
    float,
    typer.Option(help="0 deterministic, 1 all noise fresh; default: the LoRA's.", rich_help_panel=SAMPLING),
]
Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Of the noise.", rich_help_panel=SAMPLING)]

Dtype = Annotated[str, typer.Option(help="Precision of the base: fp32, bf16 or fp16.", rich_help_panel=READING)]
Family = Annotated[str, typer.Option(help="sd15, sdxl or sd3; default: found from the base.", rich_help_panel=READING)]
Tokenizer = Annotated[
    str, typer.Option(help="Folder with vocab.json and merges.txt, for single files.", rich_help_panel=READING)
]
Configs = Annotated[
    str, typer.Option(help="Folder of component configs, for an unusual single file.", rich_help_panel=READING)
]
Parts = Annotated[
    str, typer.Option(help="Diffusers folder that supplies what a single file lacks.", rich_help_panel=READING)
]
T5 = Annotated[bool, typer.Option(help="SD3 only; default: with T5 where the base has it.", rich_help_panel=READING)]


def answer(details: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a verb's result: for programs, or in words."""
    typer.echo(json.dumps(details, indent=2, default=str) if as_json else text)
