"""A run's configuration from a preset, a TOML file and `key=value` overrides; unknown keys are errors."""

from __future__ import annotations

import codecs
import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ..objectives import OBJECTIVES, PCM, known_to
from .config import Config
from .presets import PRESETS
from .sections import AUTO, TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEEPEST = 6  # levels of sections and lists in a configuration
MOST_PROBLEMS = 50  # that one error lists
LONGEST = 200  # characters of a value or a key in an error


def load_config(
    file: str | None = None, overrides: Sequence[str] | Mapping[str, Any] = (), preset: str | None = None
) -> Config:
    """Read a run's configuration from a preset, then a TOML file, then overrides, each laid over the one before.

    file: path of the TOML file, which may name its preset. overrides: "section.key=value" each, or values by
    "section.key". preset: its
    name, which counts before the file's. Where one of them changes the objective, the settings before stay
    that the new one has too. Raises ValueError that lists every problem at once, with the nearest known key
    for each unknown one.
    """
    values: dict[str, Any] = {}
    document = _read_toml(file) if file else {}

    preset = preset or document.pop("preset", None)
    document.pop("preset", None)
    if preset is not None:
        if str(preset) not in PRESETS:
            near = _nearest(str(preset), PRESETS)
            raise ValueError(f"Unknown preset {_short(repr(preset))}.{near} `pcm presets` lists all {len(PRESETS)}.")
        _lay(values, PRESETS[preset].values)
    _lay(values, document)

    overridden: dict[str, Any] = {}
    for key, value in overrides.items() if isinstance(overrides, Mapping) else map(_parse_override, overrides):
        _set(overridden, key, value)
        _check_depth(overridden, f"The override of {_short(key)}")
    _lay(values, overridden)

    # a missing section would be told as such; with it there, its missing keys are
    values.setdefault("base", {})
    if isinstance(values.get("objective"), dict):
        values["objective"].setdefault("name", PCM.model_fields["name"].default)
    try:
        config = Config.model_validate(values)
        config._preset = preset and str(preset)
        return config
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key: {"train": {"steps": 10}} -> {"train.steps": 10}."""
    settings: dict[str, Any] = {}
    for key, value in values.items():
        settings |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return settings


def _read_toml(file: str) -> dict[str, Any]:
    """The file's settings. Raises ValueError where there is no file, or no valid TOML in it."""
    path = Path(os.path.expanduser(file))
    if not path.is_file():
        if close := difflib.get_close_matches(Path(file).stem, list(PRESETS), n=1, cutoff=0.8):
            raise ValueError(f"No config file at {file}. For the preset of that name use --preset {close[0]}.")
        if path.is_dir():
            raise ValueError(f"{file} is a folder; expected a config file, settings as key=value, or --preset.")
        if file.partition(".")[0] in Config.model_fields and path.suffix != ".toml":
            raise ValueError(f"{file} is a setting without a value. Write {file}=VALUE, without spaces.")
        raise ValueError(
            f"No config file at {file}. Write one (pcm train --preset NAME --write-config {file}), or use --preset; "
            "`pcm presets` lists them."
        )
    data = path.read_bytes()
    # Windows PowerShell writes UTF-16 for `>`
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not valid TOML: it is not UTF-8 ({error}). Save it in UTF-8.") from None
    try:
        document = tomllib.loads(text.replace("\r\n", "\n"))
    except (ValueError, RecursionError) as error:  # TOML's, and Python's of numbers with thousands of digits
        raise ValueError(f"{file} is not valid TOML: {_short(error)}.{_on_backslashes(text)}") from None
    _check_depth(document, file)
    return document


def _on_backslashes(text: str) -> str:
    """A sentence for a file with a backslash between double quotes; "" for any other."""
    line = next((n for n, line in enumerate(text.splitlines(), 1) if re.search(r'"[^"\n]*\\', line)), None)
    if line is None:
        return ""
    return (
        f" Line {line} has a backslash between double quotes, where it begins an escape: write paths with forward "
        "slashes, or in single quotes."
    )


def _check_depth(value: Any, where: str) -> None:
    """Raise ValueError for a value that is nested deeper than any setting, before something walks down it."""
    values = [value]
    for _ in range(DEEPEST):
        values = [
            inner
            for outer in values
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if values:
        raise ValueError(f"{where} nests more than {DEEPEST} levels of sections and lists; settings take fewer.")


def _parse_override(item: str) -> tuple[str, Any]:
    """The key and the value of "section.key=value"; ValueError without a "="."""
    key, equals, text = item.partition("=")
    if not equals:
        words = _short(repr(item))
        raise ValueError(f"Cannot read the override {words}: write key=value, for example train.steps=2000.")
    return key.strip(), _parse_value(text.strip())


def _parse_value(text: str) -> Any:
    """An override's value: what its text is in TOML, else the text itself, so that paths need no quotes."""
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, bool | int | float | str | list | dict) else text  # a date is a name here


def _lay(values: dict[str, Any], new: dict[str, Any]) -> None:
    """Lay one source's settings over those before. A change of the objective keeps the settings that both have, and one
    of train.batch_size to or from "auto" the samples of an update."""
    objective, before = new.get("objective"), values.get("objective")
    if isinstance(objective, dict) and isinstance(before, dict) and objective.get("name") in [*OBJECTIVES]:
        values["objective"] = known_to(objective["name"], before)
    train, known = new.get("train"), values.get("train", {})
    if isinstance(train, dict) and isinstance(known, dict) and "accumulation" not in train and "batch_size" in train:
        train = train | _passes_kept(train["batch_size"], known)
        new = new | {"train": train}
    _merge(values, new)


def _passes_kept(size: Any, before: dict[str, Any]) -> dict[str, int]:
    """The setting of train.accumulation that goes with a new train.batch_size where one of both is "auto": as many
    samples an update as `before`. With "auto" it is these samples.

    Raises ValueError for a size that does not divide them.
    """
    fields = TrainConfig.model_fields
    size_before, passes = (before.get(key, fields[key].default) for key in ("batch_size", "accumulation"))
    if size == AUTO and isinstance(size_before, int) and isinstance(passes, int):
        return {"accumulation": size_before * passes}
    if size_before != AUTO or not isinstance(size, int) or size < 1 or not isinstance(passes, int):
        return {}
    if passes % size:
        raise ValueError(
            f"train.batch_size={size} does not divide the {passes} samples of an update that train.batch_size=auto "
            "had: set train.accumulation too."
        )
    return {"accumulation": passes // size}


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    """Lay new settings over others, section by section."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = deepcopy(value)


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a setting by its dotted key. Raises ValueError where a value stands in place of a section."""
    *sections, key = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"Cannot set {_short(dotted)}: {_short(section)} is a value, not a section.")
    values[key] = value


def _explain(error: ValidationError) -> str:
    """All problems of a configuration, a line each."""
    problems = [*_joined(error.errors())]
    lines = [f"  {_sentence(problem)}" for problem in problems[:MOST_PROBLEMS]]
    rest = [f"  and {len(problems) - len(lines)} more."] if len(problems) > len(lines) else []
    count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    return f"The configuration has {count}:\n" + "\n".join(lines + rest)


def _joined(problems: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The problems; those that one value has with each of the kinds that its setting may be of are one."""
    by_place: dict[tuple, list[dict[str, Any]]] = {}
    for problem in problems:
        loc = problem["loc"]
        if len(loc) > 2 and loc[0] != "objective" and _kinds(loc[:2]) > 1:
            loc = (*loc[:2], *loc[3:])  # without the name of the kind
        by_place.setdefault(loc, []).append(problem)
    for loc, alike in by_place.items():
        kinds = "; or ".join(problem["msg"][0].lower() + problem["msg"][1:] for problem in alike)
        yield alike[0] | {"loc": loc} | ({"msg": kinds} if len(alike) > 1 else {})


def _kinds(loc: tuple) -> int:
    """The number of kinds that a setting takes values of, without None."""
    annotation = _section(loc[:-1]).model_fields[loc[-1]].annotation
    if get_origin(annotation) not in (Union, UnionType):
        return 1
    return sum(kind is not NoneType for kind in get_args(annotation))


def _sentence(problem: dict[str, Any]) -> str:
    """One of pydantic's problems in words."""
    loc = problem["loc"]
    # as a union by name, an objective has its name between "objective" and the key
    of_objective = loc[:1] == ("objective",)
    where = ".".join(_short(p) for p in (loc[:1] + loc[2:] if of_objective else loc))
    if problem["type"] == "extra_forbidden":
        known = list(_section(loc[:-1]).model_fields)
        hint = _nearest(str(loc[-1]), known)
        others = [name for name, kind in OBJECTIVES.items() if of_objective and loc[-1] in kind.model_fields]
        if others:
            hint = f" The objective {loc[1]} takes no such setting ({', '.join(others)} do{_s(others)})."
        return f"{where}: unknown key.{hint} Known here: {', '.join(known)}."
    if problem["type"] == "union_tag_invalid":
        name = problem["ctx"]["tag"]
        near = _nearest(name, OBJECTIVES)
        return f"objective.name = {_short(repr(name))}: available: {', '.join(OBJECTIVES)}.{near}"
    if problem["type"] == "missing":
        return f"{where}: is required; {_field_help(loc)}."
    if problem["type"] == "value_error":
        error = str(problem["ctx"]["error"])
        return f"{where} = {_short(repr(problem['input']))} {error}." if isinstance(problem["input"], str) else error
    return f"{where} = {_short(repr(problem['input']))}: {problem['msg'][0].lower()}{problem['msg'][1:]}."


def _short(text: object) -> str:
    """The beginning of a text, as much as says what it is."""
    text = str(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _s(names: list[str]) -> str:
    """The end of "do" for this many names."""
    return "es" if len(names) == 1 else ""


def _section(loc: tuple) -> type[BaseModel]:
    """The model of the section at this place; an objective's name stands for its class."""
    model: type[BaseModel] = Config
    for part in loc:
        model = OBJECTIVES.get(part) or model.model_fields[part].annotation
    return model


def _field_help(loc: tuple) -> str:
    """A clause on the purpose of a setting or section that is missing."""
    if isinstance(loc[-1], int):
        return f"{'.'.join(map(str, loc[:1] + loc[2:-1] if loc[0] == 'objective' else loc[:-1]))} has more entries"
    field = _section(loc[:-1]).model_fields[loc[-1]]
    if field.description:
        return field.description
    return f"a section with {', '.join(_section(loc).model_fields)}"


def _nearest(name: str, known: Iterable[str]) -> str:
    """A question on the known name that is most like this one; "" where none is."""
    close = difflib.get_close_matches(name[:LONGEST], list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
