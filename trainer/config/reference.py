"""What there is to set: a row for each setting and each preset, for docs/config.md, docs/presets.md, `pcm settings`,
`pcm presets` and the shell's completion. Names and values stand between backticks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ..objectives import OBJECTIVES
from . import LARGEST_SEED
from .config import Config
from .load import load_config
from .presets import PRESETS
from .sections import TrainConfig
from .write import toml_value

OF_THIS_MACHINE = {"data.workers": "the cores, 8 at most"}  # defaults that are computed
BOUNDS = {
    "ge": "at least {}",
    "gt": "above {}",
    "le": "at most {}",
    "lt": "below {}",
    "multiple_of": "a multiple of {}",
    "pattern": "like `{}`",
}
KINDS = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}


@dataclass(frozen=True)
class SettingRow:
    """One setting. key: dotted. objectives: those that have it in this form, None outside `objective`. The rest is
    for people."""

    key: str
    objectives: tuple[str, ...] | None
    type: str
    default: str
    bounds: str
    description: str


@dataclass(frozen=True)
class PresetRow:
    """What a preset sets, and where that comes from, for people."""

    weights: str
    lr: str
    batch: str
    teacher: str
    cost: str
    source: str


def sections() -> dict[str, type[BaseModel]]:
    """The sections of a configuration besides the objective's, by name; "" for what stands above them."""
    inner = {name: field.annotation for name, field in Config.model_fields.items() if _is_section(field.annotation)}
    return {"": Config, **inner}


def settings() -> Iterator[SettingRow]:
    """Every setting, section by section; the objectives' after the LoRA's."""
    for name, model in sections().items():
        for key, field in model.model_fields.items():
            if key != "objective" and not _is_section(field.annotation):
                dotted = f"{name}.{key}" if name else key
                yield SettingRow(dotted, None, *_cells(dotted, field))
        if name == "lora":
            yield from _objectives_settings()


def _objectives_settings() -> Iterator[SettingRow]:
    """The settings of all objectives: one for those that share a key's type, default, bounds and text."""
    names = tuple(OBJECTIVES)
    choices = ", ".join(f"`{name}`" for name in names)
    yield SettingRow("objective.name", names, "text", "`pcm`", choices, "what is trained")
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, kind in OBJECTIVES.items():
        for key, field in kind.model_fields.items():
            if key != "name":
                groups.setdefault((key, *_cells(f"objective.{key}", field)), []).append(name)
    order = {key: i for i, key in enumerate(dict.fromkeys(group[0] for group in groups))}
    for (key, *cells), having in sorted(groups.items(), key=lambda group: order[group[0][0]]):
        yield SettingRow(f"objective.{key}", tuple(having), *cells)


def presets() -> dict[str, PresetRow]:
    """Every preset by name."""
    rows = {}
    for name, preset in PRESETS.items():
        config = load_config(preset=name)
        rows[name] = PresetRow(_weights(config), *_learning(config.train), _teacher(config), preset.cost, preset.source)
    return rows


def _is_section(annotation: Any) -> bool:
    # for Python 3.10 a list[int] is a class, too
    return get_origin(annotation) is None and inspect.isclass(annotation) and issubclass(annotation, BaseModel)


def _cells(key: str, field: FieldInfo) -> tuple[str, str, str, str]:
    """Type, default, bounds and description of a setting."""
    default = OF_THIS_MACHINE.get(key) or _default(field)
    return _type(field.annotation), default, _bounds(field.metadata), field.description or ""


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    return "" if field.default is None else f"`{toml_value(field.default)}`"


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in KINDS:
        return KINDS[annotation]
    if origin is Literal:
        return ", ".join(f"`{toml_value(choice)}`" for choice in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type(kind) for kind in arguments if kind is not NoneType)
    if origin is tuple:
        kind = _type(arguments[0])
        return f"list: {kind}" if Ellipsis in arguments else f"list of {len(arguments)}: {kind}"
    kind, *rules = arguments  # Annotated
    metadata = [part for rule in rules for part in getattr(rule, "metadata", ())]
    return f"{_type(kind)} {_bounds(metadata)}".rstrip()


def _bounds(metadata: list[Any]) -> str:
    """What pydantic checks of a value, in words."""
    limits = [(words, getattr(rule, name, None)) for rule in metadata for name, words in BOUNDS.items()]
    return ", ".join(words.format(_limit(value)) for words, value in limits if value is not None)


def _limit(value: Any) -> str:
    if value == LARGEST_SEED:
        return "2^64 - 1"
    return value if isinstance(value, str) else f"{value:g}"


def _weights(config: Config) -> str:
    return "no LoRA: all weights" if config.base.path == "digits" else f"{config.lora.rank} / {config.lora.alpha:g}"


def _learning(train: TrainConfig) -> tuple[str, str]:
    batch = f"{train.batch_size}" + (f" x {train.accumulation}" if train.accumulation > 1 else "")
    return f"{train.lr:g}", f"{batch}, {train.steps}"


def _teacher(config: Config) -> str:
    objective, adversarial = config.objective, config.adversarial
    teacher = "unguided" if objective.needs_teacher else "none: pictures"
    if objective.guided():
        teacher = "CFG " + "-".join(f"{scale:g}" for scale in sorted(set(objective.guidance)))
    return teacher + (f", adversarial {adversarial.weight:g}, lr {adversarial.lr:g}" if adversarial.weight else "")
