"""What a type checker reads of the surface for Python programs: every argument and result, and no Any for a class."""

from __future__ import annotations

import ast
import importlib
import inspect
import typing
from pathlib import Path

import pytest

import phased_consistency
from phased_consistency.trainer.config.config import Config
from phased_consistency.trainer.reporting.progress import Progress
from phased_consistency.trainer.sharing.pairs import Lora, Pair

FUNCTIONS = [name for name in phased_consistency.NAMES if inspect.isfunction(getattr(phased_consistency, name))]
CLASSES = [getattr(phased_consistency, name) for name in phased_consistency.NAMES if name not in FUNCTIONS]


def untyped(function) -> list[str]:
    """The arguments, and "return", of which a function does not say what they are; all that it says must be there."""
    hints = typing.get_type_hints(function)
    needed = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    return [name for name in (*needed, "return") if name not in hints]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_what_it_takes_and_gives(name):
    assert untyped(getattr(phased_consistency, name)) == []


@pytest.mark.parametrize("kind", [*CLASSES, Config, Lora, Pair, Progress], ids=lambda kind: kind.__name__)
def test_every_public_method_does(kind):
    """Of the classes that the surface has, takes and gives."""
    for name, member in vars(kind).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not name.startswith(("_", "model_")) and inspect.isfunction(function):  # pydantic has put its own there
            assert untyped(function) == [], name


def test_type_checkers_are_told_of_the_same_names():
    """They read the imports under TYPE_CHECKING, and programs NAMES."""
    source = Path(phased_consistency.__file__)
    imported = {
        alias.asname: f".{node.module}"
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module != "typing" and node.module != "nodes"
        for alias in node.names
    }
    assert imported == phased_consistency.NAMES
    assert (source.parent / "py.typed").is_file()


def test_no_untyped_decorator_hides_the_schedulers_class():
    """To mypy a class is Any where a decorator without types is on its __init__."""
    scheduler = importlib.import_module("phased_consistency.trainer.inference.scheduler")
    tree = ast.parse(inspect.getsource(scheduler))
    typed = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.returns}
    (init,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    assert {decorator.id for decorator in init.decorator_list} <= typed
