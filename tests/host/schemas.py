"""The record of every node's public schema, which saved graphs rely on. In tests/, with a ComfyUI that has this pack:

    python -m host.schemas http://127.0.0.1:8188

records what the pack has now; test_schemas.py compares. Inputs and outputs are only ever added last, inputs with a
default: widget values and links of saved graphs go by position.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

from host.workflows import specs_of, written

RECORD = Path(__file__).with_name("schemas.json")
FIELDS = ("default", "min", "max", "step", "options", "multiline", "control_after_generate", "advanced")
COSMETIC = ("step", "multiline", "advanced")
ON_PURPOSE = "If that is meant, record it in tests/: python -m host.schemas URL"
RECORD_IT = "Saved graphs stay as they are: record it in tests/: python -m host.schemas URL"
Entries = list[dict[str, Any]]
Schemas = dict[str, dict[str, Any]]


def object_info(url: str) -> dict[str, Any]:
    """What a running host says of this pack's nodes, by id."""
    with urllib.request.urlopen(f"{url.rstrip('/')}/object_info") as answer:
        return ours(json.load(answer))


def ours(kinds: dict[str, Any]) -> dict[str, Any]:
    return {node: kind for node, kind in sorted(kinds.items()) if node.startswith("PCM")}


def schemas(kinds: dict[str, Any]) -> Schemas:
    """The public part of each node: its name, and its inputs and outputs in their order."""
    return {node: _schema(kind) for node, kind in kinds.items()}


def _schema(kind: dict[str, Any]) -> dict[str, Any]:
    optional = kind["input"].get("optional", {})
    outputs = zip(kind["output_name"], kind["output"], strict=True)
    return {
        "display_name": kind["display_name"],
        "inputs": [_input(name, *spec, optional=name in optional) for name, spec in specs_of(kind).items()],
        "outputs": [{"name": name, "type": type_} for name, type_ in outputs],
    }


def _input(name: str, type_: str, options: dict[str, Any], optional: bool) -> dict[str, Any]:
    """One input, without flags that are off, and without choices that are the user's own files."""
    fields = {key: options[key] for key in FIELDS if key in options and (options[key] is not False or key == "default")}
    if name == "lora":
        fields.pop("options")
    return {"name": name, "type": type_, **fields, **({"optional": True} if optional else {})}


def differences(recorded: Schemas, found: Schemas) -> list[str]:
    """A sentence for each difference: what it breaks in saved graphs, or that it has only to be recorded."""
    gone, new = recorded.keys() - found.keys(), found.keys() - recorded.keys()
    lines = [f"{node} is gone or renamed: graphs with it no longer load. Keep it. {ON_PURPOSE}" for node in gone]
    lines += [f"{node} is new. {RECORD_IT}" for node in new]
    for node in recorded.keys() & found.keys():
        was, now = recorded[node], found[node]
        if was["display_name"] != now["display_name"]:
            lines.append(f"{node}: is called {now['display_name']!r} now. {RECORD_IT}")
        for part in ("input", "output"):
            lines += [f"{node}: {line}" for line in _changes(part, was[f"{part}s"], now[f"{part}s"])]
    return sorted(lines)


def _changes(part: str, was: Entries, now: Entries) -> list[str]:
    """The sentences on one node's inputs or outputs."""
    old, new = ({entry["name"]: entry for entry in entries} for entries in (was, now))
    gone = [name for name in old if name not in new]
    lines = [f"{part} {name} is gone or renamed: what graphs give it is lost. Keep it. {ON_PURPOSE}" for name in gone]
    kept = [name for name in new if name in old]
    if kept != [name for name in old if name in new]:
        lines.append(f"the {part}s are in another order: saved values and links go to the wrong ones. {ON_PURPOSE}")
    for place, (name, entry) in enumerate(new.items()):
        if name in old:
            lines += _field_changes(f"{part} {name}", old[name], entry)
        elif any(later in old for later in list(new)[place:]):
            lines.append(f"the new {part} {name} is not last: saved values go to the wrong ones. Put it last.")
        elif part == "input" and not entry.keys() & {"default", "optional"}:
            lines.append(f"the new input {name} has no default: saved graphs no longer run. Give it one.")
        else:
            lines.append(f"{part} {name} is new, and last. {RECORD_IT}")
    return lines


def _field_changes(what: str, was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    changed = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    return [
        f"{what}: {key} was {json.dumps(was.get(key))} and is {json.dumps(now.get(key))}. "
        + (RECORD_IT if _is_harmless(key, was.get(key), now.get(key)) else f"Graphs may not do the same. {ON_PURPOSE}")
        for key in changed
    ]


def _is_harmless(key: str, was: Any, now: Any) -> bool:
    """Whether every value that a graph may hold is still allowed, and means the same."""
    if key == "options":
        return set(was or ()) <= set(now or ())
    if key in ("min", "max"):
        return now is None or was is not None and (now < was if key == "min" else now > was)
    return key in COSMETIC or (key == "optional" and now is True)


def file_text(record: Schemas) -> str:
    """The record as a file, with a line for each input and output."""
    nodes = (f"{json.dumps(node)}: {written(schema).rstrip()}" for node, schema in record.items())
    return "{\n" + ",\n".join(nodes) + "\n}\n"


def read() -> Schemas:
    """The record as it stands."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


if __name__ == "__main__":
    RECORD.write_text(file_text(schemas(object_info(sys.argv[1]))), encoding="utf-8")
