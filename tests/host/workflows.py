"""Workflows as the frontend saves them, from short descriptions (`templates`), and as it queues them.

A description names the nodes, their links, and what differs from a widget's default. The order and the types of inputs
and outputs are the host's own (`/object_info`).
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTE, TOP = -440, 90  # where the note begins, and with it every column
ABOVE, BESIDE = 70, 20  # a group's title and frame around its nodes
Kinds = dict[str, dict[str, Any]]


class Out(NamedTuple):
    """An output of a node."""

    node: Node
    slot: int


class Node:
    """A node of this height. inputs: links as `node[slot]`, and values of widgets."""

    def __init__(self, kind: str, height: int, title: str = "", /, **inputs: Any):
        self.kind, self.height, self.title, self.inputs = kind, height, title, inputs
        self.models: tuple[dict[str, str], ...] = ()

    def __getitem__(self, slot: int) -> Out:
        return Out(self, slot)

    def of(self, *models: dict[str, str]) -> Node:
        """The node, which tells where its files are: name, url and directory of each."""
        self.models = models
        return self


class Column:
    """Nodes under one another, in a group."""

    def __init__(self, title: str, *nodes: Node, width: int = 340, gap: int = 50):
        self.title, self.nodes, self.width, self.gap = title, nodes, width, gap

    @property
    def bottom(self) -> int:
        return TOP + sum(node.height for node in self.nodes) + self.gap * (len(self.nodes) - 1)


@dataclass(frozen=True)
class Workflow:
    """A template. name: of its files. note: Markdown, left of the columns."""

    name: str
    note: str
    columns: tuple[Column, ...]

    def graph(self, kinds: Kinds) -> dict[str, Any]:
        """The graph in the form that the frontend saves. Raises ValueError for an input that a node does not have."""
        bottom = max(column.bottom for column in self.columns)
        listed = [node for column in self.columns for node in column.nodes]
        ids = {node: i for i, node in enumerate(listed, 1)}
        links = list(self._links(kinds, ids))
        nodes = [_saved(node, ids[node], place, kinds[node.kind], links) for node, place in self._places()]
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, self.name)),
            "revision": 0,
            "last_node_id": len(nodes) + 1,
            "last_link_id": len(links),
            "nodes": [*nodes, _note(self.note, len(nodes) + 1, bottom - TOP)],
            "links": links,
            "groups": list(self._groups(bottom)),
            "config": {},
            "extra": {"ds": {"scale": 0.75, "offset": [540, 110]}},
            "version": 0.4,
        }

    def _links(self, kinds: Kinds, ids: dict[Node, int]) -> Iterator[list]:
        numbers = count(1)
        for node, i in ids.items():
            sockets = [name for name in specs_of(kinds[node.kind]) if isinstance(node.inputs.get(name), Out)]
            for slot, name in enumerate(sockets):
                source, output = node.inputs[name]
                kind = kinds[source.kind]["output"][output]
                yield [next(numbers), ids[source], output, i, slot, kind]

    def _places(self) -> Iterator[tuple[Node, tuple[int, int, int]]]:
        """Each node with its left, top and width."""
        for column, left in self._lefts():
            top = TOP
            for node in column.nodes:
                yield node, (left, top, column.width)
                top += node.height + column.gap

    def _lefts(self) -> Iterator[tuple[Column, int]]:
        left = 40
        for column in self.columns:
            yield column, left
            left += column.width + 3 * BESIDE

    def _groups(self, bottom: int) -> Iterator[dict[str, Any]]:
        for i, (column, left) in enumerate(self._lefts(), 1):
            bounding = [left - BESIDE, TOP - ABOVE, column.width + 2 * BESIDE, bottom + BESIDE - (TOP - ABOVE)]
            yield {"id": i, "title": column.title, "bounding": bounding, "color": "#3f789e", "flags": {}}


def specs_of(kind: dict[str, Any]) -> dict[str, list]:
    """The inputs of a kind of node in their order: [type or choices, options]."""
    return {**kind["input"]["required"], **kind["input"].get("optional", {})}


def is_widget(spec: list) -> bool:
    return isinstance(spec[0], list) or spec[0] in WIDGETS


def has_control(spec: list) -> bool:
    """Whether a widget is followed by another: what becomes of the seed after a run."""
    return len(spec) > 1 and bool(spec[1].get("control_after_generate"))


def _saved(node: Node, i: int, place: tuple[int, int, int], kind: dict[str, Any], links: list[list]) -> dict[str, Any]:
    """A node as the frontend saves it."""
    specs, (left, top, width) = specs_of(kind), place
    if unknown := node.inputs.keys() - specs.keys():
        raise ValueError(f"{node.kind} has no input {', '.join(unknown)}; it has {', '.join(specs)}.")
    values = []
    for name, spec in specs.items():
        if is_widget(spec):
            values += [node.inputs[name] if name in node.inputs else _default(name, *spec)]
            values += ["fixed"] * has_control(spec)
    sockets = (name for name in specs if isinstance(node.inputs.get(name), Out))
    incoming = [link for link in links if link[3] == i]
    properties = {"Node name for S&R": node.kind, "cnr_id": "comfy-core"}
    if node.kind.startswith("PCM"):
        properties |= {"cnr_id": "phased-consistency", "ver": VERSION}
    if node.models:
        properties["models"] = list(node.models)
    return {
        "id": i,
        "type": node.kind,
        "pos": [left, top],
        "size": [width, node.height],
        "flags": {},
        "order": i - 1,
        "mode": 0,
        "inputs": [
            {"name": name, "type": link[5], "link": link[0]} for name, link in zip(sockets, incoming, strict=True)
        ],
        "outputs": [
            {"name": name, "type": type_, "links": [link[0] for link in links if link[1:3] == [i, slot]] or None}
            for slot, (name, type_) in enumerate(zip(kind["output_name"], kind["output"], strict=True))
            if not kind["output_node"]  # those that save have outputs on newer hosts only
        ],
        "properties": properties,
        "widgets_values": values,
        **({"title": node.title} if node.title else {}),
    }


def _default(name: str, kind: str | list, options: dict[str, Any] = MappingProxyType({})) -> Any:
    """A widget's default, else its first choice. Raises ValueError where it has neither."""
    if "default" in options:
        return options["default"]
    choices = kind if isinstance(kind, list) else options.get("options")
    if not choices:
        raise ValueError(f"The widget {name} has no default: give it a value.")
    return choices[0]


def _note(text: str, i: int, height: int) -> dict[str, Any]:
    kind = "MarkdownNote"
    return {
        "id": i,
        "type": kind,
        "pos": [NOTE, TOP],
        "size": [420, height],
        "flags": {},
        "order": i - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {"Node name for S&R": kind},
        "widgets_values": [text],
        "title": "Read me",
    }


def written(graph: dict[str, Any]) -> str:
    """The graph as a file, with a line for each node, link and group."""

    def text(value: Any) -> str:
        lines = [f"    {json.dumps(item)}" for item in value] if isinstance(value, list) else []
        return "[\n" + ",\n".join(lines) + "\n  ]" if lines else json.dumps(value)

    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {text(value)}" for key, value in graph.items()) + "\n}\n"


def to_api(workflow: dict[str, Any], kinds: Kinds) -> dict[str, Any]:
    """The graph as the frontend would queue it, with the nodes' own schemas deciding which value is which."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] not in NOTES:
            linked = {i["name"]: sources[i["link"]] for i in node["inputs"] if i["link"] is not None}
            values = widget_values(specs_of(kinds[node["type"]]), node["widgets_values"])
            graph[str(node["id"])] = {"class_type": node["type"], "inputs": {**values, **linked}}
    return graph


def widget_values(specs: dict[str, list], values: list[Any]) -> dict[str, Any]:
    """Widgets by name; a seed is followed by its control-after-generate choice."""
    rest, named = list(values), {}
    for name, spec in specs.items():
        if is_widget(spec):
            named[name] = rest.pop(0)
            if has_control(spec):
                assert rest.pop(0) == "fixed"
    assert rest == []
    return named
