"""What the verbs of `pcm` share: options with their help, and how an answer is printed."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from ..config.config import Config
    from ..families import Base as LoadedBase

SAMPLING, READING = "How it is sampled", "How the base is read"

Settings = Annotated[
    list[str], typer.Argument(metavar="[CONFIG.toml] [key=value ...]", help="A TOML file, then overrides.")
]
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


def configured(settings: list[str] | None, preset: str | None, default: str | None = None) -> Config:
    """The configuration of a TOML file, where the first of the settings is one, of overrides and a preset; `default`
    is the preset where there is neither file nor preset."""
    from ..config.load import load_config

    file, *overrides = settings if settings and "=" not in settings[0] else (None, *(settings or ()))
    return load_config(file, overrides, preset or (None if file else default))


def answer(details: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a verb's result: for programs, or in words."""
    typer.echo(json.dumps(details, indent=2, default=str) if as_json else text)


@dataclass(kw_only=True)
class Reading:
    """Of every verb that runs a base: which one, and how it is read."""

    base: Base
    dtype: Dtype = "fp32"
    family: Family = None
    tokenizer: Tokenizer = None
    config: Configs = None
    parts: Parts = None
    t5: T5 = None
    as_json: Json = False

    def how(self) -> dict[str, Any]:
        """What `load_base` is told besides the path and the precision."""
        return {name: getattr(self, name) for name in ("family", "tokenizer", "config", "parts", "t5")}

    def load(self, lora: Path | None) -> LoadedBase:
        """The base, as `load_for_sample` reads it for this LoRA."""
        from ..lora.install import load_for_sample

        return load_for_sample(self.base, self.dtype, lora, **self.how())


@dataclass(kw_only=True)
class Sampling(Reading):
    """Of every verb that draws with a LoRA, or without one."""

    lora: Lora = None
    guidance: Guidance = None
    negative: Negative = None
    strength: Strength = None
    gamma: Gamma = None
    seed: Seed = 0


def with_options(run: Callable) -> Callable:
    """The command of `run(options, own, ...)`: its own options, and one for each field of the dataclass `options`."""
    first, *own = inspect.signature(run, eval_str=True).parameters.values()
    kind = first.annotation
    hints = get_type_hints(kind, include_extras=True)  # each field's in the module of its own class
    shared = {p.name: p.replace(annotation=hints[p.name]) for p in inspect.signature(kind).parameters.values()}

    @wraps(run)
    def command(**values) -> None:
        run(kind(**{name: values.pop(name) for name in shared}), **values)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*shared.values(), *own)]
    # the order in --help: what must be given, then the verb's own, then what it shares
    parameters.sort(key=lambda p: (p.default is not p.empty, p.name in shared))
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command
