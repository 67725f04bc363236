"""A configuration as TOML: what `load_config` reads back as the same one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..system.files import write_text
from .config import Config


def config_text(config: Config, described: bool = False) -> str:
    """The TOML of every setting that has a value, and of the preset that they began from.

    described: with what each setting does beside it, and those without a value as comments.
    """
    lines = ["# Every setting: pcm settings, docs/config.md"]
    if config.preset:
        lines.append(f"preset = {toml_value(config.preset)}")
    sections = {name: value for name, value in config if isinstance(value, BaseModel)}
    top = {name: value for name, value in config if name not in sections}
    lines += _lines(Config, top, described)
    for name, section in sections.items():
        lines += ["", f"[{name}]", *_lines(type(section), dict(section), described)]
    return "\n".join(lines) + "\n"


def _lines(model: type[BaseModel], values: dict[str, Any], described: bool) -> Iterator[str]:
    """A line for each setting of a section."""
    for key, value in values.items():
        about = f"  # {model.model_fields[key].description}" if described else ""
        if value is not None:
            yield f"{key} = {toml_value(value)}{about}"
        elif described:
            yield f"# {key} ={about}"


def toml_value(value: Any) -> str:
    """A setting's value as TOML has it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, str):  # JSON escapes as TOML does, but for one control character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def write_config(config: Config, path: Path) -> None:
    """Write a configuration to begin from, with what each setting does. Raises ValueError for a file that is there."""
    if path.exists():
        raise ValueError(f"{path} is there already. Choose another name for the config, or delete it.")
    write_text(path, config_text(config, described=True))
