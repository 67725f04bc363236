"""Every sentence that nodes can say, as the code has it: literals of nodes/ and samplers/, read without a host."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOR_PROGRAMMERS = {"samplers/schedule.py"}  # raises for what no widget, file or link can lead to
NOTES = "samplers/phases.py"  # notes on denoise
SCHEMA = re.compile(r"io\.(Schema|Input)")  # functions that return such: locales/ has their texts
FORMATTED = re.compile(r"\{[^{}]*\}")  # a field of str.format


def shape(text: str) -> str:
    """A text or template with its fields unnamed."""
    return FORMATTED.sub("{}", text)


def sentences() -> dict[str, str]:
    """The shapes of what is raised, and of all that ends as a sentence does, with the files that they are in."""
    return {
        text: module.name for module in modules() if module.name not in FOR_PROGRAMMERS for text in module.sentences()
    }


def literals() -> set[str]:
    """The shapes of all literals of nodes/ and samplers/."""
    return {text for module in modules() for _, text in module.literals()}


def modules() -> list[Module]:
    paths = (path for folder in ("nodes", "samplers") for path in sorted((ROOT / folder).glob("*.py")))
    return [Module(path) for path in paths]


class Module:
    """One file's literals. A name in them that stands for a sentence of this file is read as that."""

    def __init__(self, path: Path):
        self.name = path.relative_to(ROOT).as_posix()
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = list(ast.walk(self.tree))
        read = {getattr(node.value, "id", None) for node in nodes if isinstance(node, ast.FormattedValue)}
        self.inlined = [
            node
            for node in nodes
            if isinstance(node, ast.Assign) and _is_text(node.value) and getattr(node.targets[0], "id", None) in read
        ]
        self.constants = {node.targets[0].id: node.value.value for node in self.inlined}

    def sentences(self) -> Iterator[str]:
        """The shapes of all that is raised, or ends as a sentence does."""
        return (text for is_raised, text in self.literals() if " " in text and (is_raised or text.endswith(".")))

    def literals(self) -> Iterator[tuple[bool, str]]:
        """Whether it is raised, and the shape, of each literal but for docstrings, logs and schemas."""
        for is_raised, text in self._literals(self.tree):
            yield is_raised, text
            if self.name == NOTES and not is_raised:  # which PCM Stroke to Image words in its own way
                yield is_raised, text.replace("denoise", "strength")

    def _literals(self, node: ast.AST, is_raised: bool = False) -> Iterator[tuple[bool, str]]:
        if _is_docstring(node) or _is_schema(node) or _is_log(node) or node in self.inlined:
            return
        is_raised = is_raised or isinstance(node, ast.Raise)
        if _is_text(node) or isinstance(node, ast.JoinedStr):
            yield is_raised, self._shape(node)
        parts = node.values if isinstance(node, ast.JoinedStr) else ast.iter_child_nodes(node)
        for part in parts:
            if isinstance(part, ast.FormattedValue):  # not its format
                yield from self._literals(part.value)
            elif not isinstance(node, ast.JoinedStr):
                yield from self._literals(part, is_raised and not isinstance(node, ast.Compare | ast.Subscript))

    def _shape(self, node: ast.Constant | ast.JoinedStr) -> str:
        if isinstance(node, ast.Constant):
            return shape(node.value)
        values = (getattr(part, "value", "") for part in node.values)
        return "".join(
            part if isinstance(part, str) else self.constants.get(getattr(part, "id", None), "{}") for part in values
        )


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_schema(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return getattr(node.func, "id", None) == "EditKind"
    return isinstance(node, ast.FunctionDef) and bool(node.returns and SCHEMA.search(ast.unparse(node.returns)))


def _is_log(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logging.")
