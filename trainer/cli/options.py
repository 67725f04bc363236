"""What the verbs of `pcm` share: how a function becomes one, options alone and in groups, how a result is printed."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ..config import LARGEST_SEED
from .completion import preset_names_with, setting_names_with

if TYPE_CHECKING:
    from ..config.config import Config
    from ..families import Base

# the parts of `pcm --help`
TRAINING, DRAWING = "Train", "Draw and measure"
LORA_FILES, MACHINE = "LoRA files", "This machine"
# the parts of a verb's own --help
SAMPLING, READING = "How it is sampled", "How the base is read"

Settings = Annotated[
    list[str],
    typer.Argument(
        metavar="[CONFIG.toml] [key=value ...]",
        help="A TOML file, then overrides.",
        autocompletion=setting_names_with,
    ),
]


def place_option(*names: str, **settings: Any) -> Any:
    """An option that is a path or the name of something elsewhere, with `~` as the home folder.

    Options and arguments of type Path have that from `verb`.
    """
    return typer.Option(*names, parser=os.path.expanduser, metavar="PATH", **settings)


BasePath = Annotated[
    str,
    place_option(
        "--base",
        help="Diffusers folder, single .safetensors checkpoint, hub id, or tiny-sd15, tiny-sdxl, tiny-emoji.",
    ),
]
LoraFile = Annotated[Path, typer.Argument(help="A LoRA in .safetensors.")]
LoraToUse = Annotated[Path, typer.Option(help="LoRA to sample with.")]
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
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the noise.", rich_help_panel=SAMPLING)]

Dtype = Annotated[str, typer.Option(help="Precision of the base: fp32, bf16 or fp16.", rich_help_panel=READING)]
Family = Annotated[str, typer.Option(help="sd15, sdxl or sd3; default: found from the base.", rich_help_panel=READING)]
Tokenizer = Annotated[
    str, place_option(help="Folder with vocab.json and merges.txt, for single files.", rich_help_panel=READING)
]
ConfigsFolder = Annotated[
    str, place_option(help="Folder of component configs, for an unusual single file.", rich_help_panel=READING)
]
PartsFolder = Annotated[
    str, place_option(help="Diffusers folder that supplies what a single file lacks.", rich_help_panel=READING)
]
BaseLoras = Annotated[
    list[str],
    place_option(
        help="Style LoRA merged into the base, as in training: FILE or FILE:STRENGTH. Repeat for several.",
        rich_help_panel=READING,
    ),
]
T5 = Annotated[bool, typer.Option(help="SD3 only; default: with T5 where the base has it.", rich_help_panel=READING)]


def preset_option(help: str) -> Any:
    """The option --preset, which completes the presets' names."""
    return typer.Option(help=help, autocompletion=preset_names_with)


@dataclass(kw_only=True)
class BaseOptions:
    """Which base, and how it is read: a group of options, see `verb`."""

    path: BasePath
    dtype: Dtype = "fp32"
    family: Family = None
    tokenizer: Tokenizer = None
    config: ConfigsFolder = None
    parts: PartsFolder = None
    t5: T5 = None
    base_lora: BaseLoras = None

    def load(self, lora: Path | None) -> Base:
        """The base, as `load_for_sample` reads it for this LoRA, with its style LoRAs merged in."""
        from ..lora.install import load_for_sample
        from ..lora.merged import merge_into

        base = load_for_sample(
            self.path,
            self.dtype,
            lora,
            family=self.family,
            tokenizer=self.tokenizer,
            config=self.config,
            parts=self.parts,
            t5=self.t5,
        )
        merge_into(base, self.base_lora or ())
        return base


@dataclass(kw_only=True)
class SamplingOptions:
    """The LoRA, if any, and how it is sampled: a group of options, see `verb`."""

    lora: LoraToUse = None
    guidance: Guidance = None
    negative: Negative = None
    strength: Strength = None
    gamma: Gamma = None
    seed: Seed = 0


def verb(app: typer.Typer, panel: str | None = None, **settings) -> Callable[[Callable], Callable]:
    """Make a function a verb of `app`, its docstring the help. panel: the part of the help that names it.

    Typer makes an option of each parameter. Options that several verbs share are fields of a dataclass, a group, and a
    verb has a parameter for each group that it takes: `def sample(base: BaseOptions, prompt: Prompt)`. Typer is shown
    the fields in place of the group (--base, --dtype, ..., --prompt), and the verb is called with the group whole.
    settings: of `typer.Typer.command`.
    """

    def register(function: Callable) -> Callable:
        app.command(help=reflowed(function.__doc__), rich_help_panel=panel, **settings)(_ungrouped(function))
        return function

    return register


def _ungrouped(function: Callable) -> Callable:
    """The function that takes each field of its groups by itself."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    groups = {p.name: p.annotation for p in parameters if is_dataclass(p.annotation)}
    shared = [option for group in groups.values() for option in _options(group)]
    others = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.name not in groups]

    @wraps(function)
    def command(**values) -> None:
        filled = {
            name: group(**{field.name: _at_home(values.pop(field.name)) for field in fields(group)})
            for name, group in groups.items()
        }
        function(**filled, **{name: _at_home(value) for name, value in values.items()})

    # the order in --help: what must be given, then the verb's own, then what it shares
    ordered = sorted([*others, *shared], key=lambda p: p.default is not p.empty)
    command.__signature__ = inspect.Signature(ordered)
    command.__annotations__ = {p.name: p.annotation for p in ordered}
    return command


def _at_home(value: Any) -> Any:
    """A path, or each of several, with `~` as the home folder; any other value as it is."""
    if isinstance(value, list):
        return [_at_home(entry) for entry in value]
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def _options(group: type) -> list[inspect.Parameter]:
    """A parameter for each field of a group."""
    hints, keyword = get_type_hints(group, include_extras=True), inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(
            field.name,
            keyword,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


def reflowed(text: str) -> str:
    """A docstring's paragraphs as one line each, for a terminal of any width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text).split("\n\n"))


def configured(settings: list[str] | None, preset: str | None, default: str | None = None) -> Config:
    """The configuration of a TOML file, where the first of the settings is one, of overrides and a preset; `default`
    is the preset where there is neither file nor preset."""
    from ..config.load import load_config

    file, *overrides = settings if settings and "=" not in settings[0] else (None, *(settings or ()))
    return load_config(file, overrides, preset or (None if file else default))


def answer(details: dict[str, Any] | list[Any], as_json: bool, text: str) -> None:
    """Print a verb's result: for programs, or in words."""
    typer.echo(json.dumps(details, indent=2, default=str) if as_json else text)


def check_files(*files: Path | None) -> None:
    """Raise FileNotFoundError or ValueError, as `header_text`, for a name that is no .safetensors file's.

    What a verb runs reads its files anyway. Called before that is imported, with diffusers and its seconds, it says at
    once that a name is mistyped.
    """
    from ...samplers.lora_file import header_text

    for file in files:
        if file is not None:
            header_text(file)
