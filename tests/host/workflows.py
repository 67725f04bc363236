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
from textwrap import wrap
from types import MappingProxyType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
LEFT, TOP = 40, 90  # of the first node
ABOVE, BESIDE = 70, 20  # a group's title and frame around its nodes
GAP = 50  # between two nodes under one another, of which a title takes 30, and between two columns
LETTER, LINE, AROUND = 5, 16, 20  # of a note in Nodes 2.0, where it is highest: pixels of its letters, lines and frame
HEADING, HEADING_LETTER = 25, 9  # of its heading
AFTER_HEADING, AFTER_PARAGRAPH, AFTER_ITEM, IN_FRONT = 16, 5, 8, 32  # below them, and in front of an item of a list
PAGE, SHARE = (1440, 900), 0.75  # of a page, and the share of it that a template fills when ComfyUI opens it
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
        self.after_run = "randomize"

    def __getitem__(self, slot: int) -> Out:
        return Out(self, slot)

    def fixed(self) -> Node:
        """The node, whose seed stays as it is after a run."""
        self.after_run = "fixed"
        return self

    def of(self, *models: dict[str, str]) -> Node:
        """The node, which tells where its files are: name, url and directory of each."""
        self.models = models
        return self


class Group:
    """Nodes under one another, in a frame with a title."""

    def __init__(self, title: str, *nodes: Node):
        self.title, self.nodes = title, nodes

    @property
    def height(self) -> int:
        return sum(node.height for node in self.nodes) + GAP * (len(self.nodes) - 1)


class Column:
    """Groups under one another."""

    def __init__(self, *groups: Group, width: int = 320):
        self.groups, self.width = groups, width

    @property
    def height(self) -> int:
        return sum(group.height for group in self.groups) + (ABOVE + 2 * BESIDE) * (len(self.groups) - 1)


@dataclass(frozen=True)
class Workflow:
    """A template. name: of its files. note: Markdown, at the top of the first column."""

    name: str
    note: str
    columns: tuple[Column, ...]

    def graph(self, kinds: Kinds) -> dict[str, Any]:
        """The graph in the form that the frontend saves. Raises ValueError for an input that a node does not have."""
        listed = [node for column in self.columns for group in column.groups for node in group.nodes]
        ids = {node: i for i, node in enumerate(listed, 1)}
        links = list(self._links(kinds, ids))
        nodes = [
            _saved(node, ids[node], (left, top, width), kinds[node.kind], links)
            for left, width, _, members in self._frames()
            for node, top in members
        ]
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, self.name)),
            "revision": 0,
            "last_node_id": len(nodes) + 1,
            "last_link_id": len(links),
            "nodes": [*nodes, _note(self.note, len(nodes) + 1, self.columns[0].width, self._note_height)],
            "links": links,
            "groups": list(self._groups()),
            "config": {},
            "extra": {"ds": self._view()},
            "version": 0.4,
        }

    @property
    def _note_height(self) -> int:
        return note_height(self.note, self.columns[0].width)

    @property
    def _bottom(self) -> int:
        """Of the lowest node."""
        return max(self._begin(i) + column.height for i, column in enumerate(self.columns))

    def _begin(self, i: int) -> int:
        """The top of the first node of a column."""
        return TOP if i else TOP + self._note_height + BESIDE + ABOVE

    def _links(self, kinds: Kinds, ids: dict[Node, int]) -> Iterator[list]:
        numbers = count(1)
        for node, i in ids.items():
            sockets = [name for name in specs_of(kinds[node.kind]) if isinstance(node.inputs.get(name), Out)]
            for slot, name in enumerate(sockets):
                source, output = node.inputs[name]
                kind = kinds[source.kind]["output"][output]
                yield [next(numbers), ids[source], output, i, slot, kind]

    def _frames(self) -> Iterator[tuple[int, int, str, list[tuple[Node, int]]]]:
        """Left, width and title of every group, and its nodes with their tops."""
        left = LEFT
        for i, column in enumerate(self.columns):
            top = self._begin(i)
            for group in column.groups:
                members = []
                for node in group.nodes:
                    members.append((node, top))
                    top += node.height + GAP
                yield left, column.width, group.title, members
                top += ABOVE + 2 * BESIDE - GAP
            left += column.width + 3 * BESIDE

    def _groups(self) -> Iterator[dict[str, Any]]:
        """The frames; the last of a column goes down to the lowest node of all."""
        last = {column.groups[-1].nodes[-1] for column in self.columns}
        for i, (left, width, title, members) in enumerate(self._frames(), 1):
            begin, (end, top) = members[0][1], members[-1]
            bottom = self._bottom if end in last else top + end.height
            height = bottom + BESIDE - (begin - ABOVE)
            bounding = [left - BESIDE, begin - ABOVE, width + 2 * BESIDE, height]
            yield {"id": i, "title": title, "bounding": bounding, "color": "#3f789e", "flags": {}}

    def _view(self) -> dict[str, Any]:
        """Zoom and offset with which the whole graph is in the middle of a page, as newer hosts open a template."""
        width = sum(column.width for column in self.columns) + 3 * BESIDE * (len(self.columns) - 1)
        sizes = width, self._bottom - TOP
        scale = round(min(SHARE * side / size for side, size in zip(PAGE, sizes, strict=True)), 2)
        begins = LEFT, TOP
        middle = [begin + size / 2 for begin, size in zip(begins, sizes, strict=True)]
        return {"scale": scale, "offset": [round(side / 2 / scale - at) for side, at in zip(PAGE, middle, strict=True)]}


def note_height(text: str, width: int) -> int:
    """Pixels that a note of this width is to be high, to show all its text: a heading, paragraphs and lists."""
    heading, *blocks = filter(None, text.splitlines())
    height = AROUND + HEADING * lines(heading, width - AROUND, HEADING_LETTER) + AFTER_HEADING
    for block in blocks:
        is_item = block.startswith("- ")
        room = width - AROUND - IN_FRONT * is_item
        height += LINE * lines(block, room, LETTER) + (AFTER_ITEM if is_item else AFTER_PARAGRAPH)
    return height


def lines(markdown: str, width: int, letter: int) -> int:
    """Lines that a block of Markdown takes, without its marks."""
    text = re.sub(r"^(#|-) |\*", "", markdown)
    return len(wrap(text, width // letter, break_on_hyphens=False))


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
            values += [node.after_run] * has_control(spec)
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


def _note(text: str, i: int, width: int, height: int) -> dict[str, Any]:
    kind = "MarkdownNote"
    return {
        "id": i,
        "type": kind,
        "pos": [LEFT, TOP],
        "size": [width, height],
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
                assert rest.pop(0) in ("fixed", "randomize")
    assert rest == []
    return named


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether two boxes of left, top, right and bottom have a part in common."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
