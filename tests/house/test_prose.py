"""The prose of the code: docstrings that stand alone, values named by nouns, one meaning for a class's name."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("nodes", "samplers", "trainer")
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
# The tense of a verb, where the name of a thing is due.
TENSES = {"found", "told", "how", "asked", "own"}
# A docstring that begins so is understood only by the line above it.
LEANING = re.compile(r"(Of|Those|That of)\b")


def defined(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def names_of_values(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(name, line) of every local, attribute and parameter that a file gives a value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


@pytest.mark.parametrize("layer", LAYERS)
def test_values_are_named_by_nouns(layer):
    files = [path for path in FILES if path.is_relative_to(ROOT / layer)]
    tenses = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in files
        for name, line in names_of_values(defined(path))
        if name in TENSES
    ]
    assert not tenses


def test_docstrings_stand_alone():
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    leaning = [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for path in FILES
        for node in ast.walk(defined(path))
        if isinstance(node, kinds) and (text := ast.get_docstring(node)) and LEANING.match(text)
    ]
    assert not leaning


def test_a_class_s_name_has_one_meaning():
    """A private class is its file's own affair, and a node's name is fixed by saved graphs: PCMScheduler is a node, and
    a scheduler for diffusers."""
    places = defaultdict(list)
    for path in FILES:
        if path.is_relative_to(ROOT / "nodes"):
            continue
        for node in ast.walk(defined(path)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
