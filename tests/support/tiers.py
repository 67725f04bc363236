"""Which tests are slow, read from their source before any of them is run.

A test is slow where it and its fixtures train or evaluate more than once, start a process or compile. What a function
does is what the names in it lead to: imports are followed, function by function, through tests/ and the parts of the
trainer that train or start programs for others, as far as the names below. A name in a loop counts twice. What reading
cannot see, a method of an object or a table of functions, the guard in support/guard.py sees when the test is run.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "phased_consistency"
OURS = {path.stem for path in (ROOT / "tests").iterdir()}

# Where reading ends: what stands for one training, and what else takes long (a name, or all of a module).
TRAINING_MODULE = f"{PACKAGE}.trainer.training.loop"
TRAINING = {
    f"{TRAINING_MODULE}.train",
    f"{TRAINING_MODULE}.Run",
    f"{PACKAGE}.trainer.bench.reference.Reference",
    "support.family_order.diffusion_model",
    "support.family_order.distilled",
}
COSTLY = {
    "subprocess.run": "starts a process",
    "subprocess.Popen": "starts a process",
    "subprocess.check_output": "starts a process",
    "os.fork": "starts a process",
    "multiprocessing": "starts a process",
    "concurrent.futures.ProcessPoolExecutor": "starts a process",
    "http.server.ThreadingHTTPServer": "serves pages, which another process asks for",
    "torch.compile": "compiles",
    f"{PACKAGE}.trainer.efficiency.blocks.compile_blocks": "compiles",
    f"{PACKAGE}.trainer.efficiency.blocks.check_compiler": "compiles",
    "_pytest.pytester.pytester": "runs tests of its own",
    "support.full_size.planned": "plans a run of full size",
    "support.full_size.whole_sd15": "trains a base with as many layers as SD1.5",
    f"{PACKAGE}.trainer.studies.editing.Gallery": "draws a study",
}
MEASURING = "validation__every"  # the setting by which a run evaluates itself, again and again, beside its training
# Raised before a run begins, so that a run which ends so is none.
REFUSALS = {"ValueError", "FileNotFoundError", "PermissionError", "SystemExit"}
# What of the trainer is read as the files of tests/ are: what trains for a study, and what starts other programs.
READ = {f"{PACKAGE}.trainer.{name}" for name in ("bench", "comfy", "demo", "studies", "system.comfyui")}
COMMANDS = {"pcm", "fails"}  # the fixtures that run `pcm ...` in this process
VERBS = {"train": 1, "evaluate": 1, "bench": 2, "bench-gpu": 2}  # and how often it trains or evaluates


@dataclass(frozen=True)
class Traits:
    """What a function does: how often it trains, and what else is slow about it."""

    trainings: int = 0
    costly: frozenset[str] = field(default_factory=frozenset)

    def __add__(self, other: Traits) -> Traits:
        return Traits(self.trainings + other.trainings, self.costly | other.costly)

    def repeated(self) -> Traits:
        return Traits(2 * self.trainings, self.costly)

    def reasons(self) -> list[str]:
        """Why a test with these traits is slow; empty for a fast one."""
        return sorted(self.costly) + ["trains or evaluates more than once"] * (self.trainings > 1)


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Source:
    """One Python file: its functions and classes by name, and where its other names come from."""

    def __init__(self, module: str, path: Path):
        self.module, self.package = module, module if path.name == "__init__.py" else module.rpartition(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        self.defined = {node.name: node for node in tree.body if isinstance(node, (*FUNCTIONS, ast.ClassDef))}
        self.imported = dict(self.imports(tree.body))
        self.measuring = {target.id for target, value in _assignments(tree) if any(map(_measures, ast.walk(value)))}

    def imports(self, body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
        """(name, what it stands for with all its dots) of the imports among these statements."""
        for node in body:
            if isinstance(node, ast.Import):
                for name in node.names:
                    yield (name.asname, name.name) if name.asname else (name.name.split(".")[0],) * 2
            elif isinstance(node, ast.ImportFrom):
                above = self.package.split(".")[: 1 - node.level or None] if node.level else []
                origin = ".".join([*above, *filter(None, [node.module])])
                yield from ((name.asname or name.name, f"{origin}.{name.name}") for name in node.names)


@cache
def source_of(module: str) -> Source | None:
    """The file of a module of tests/ or of the trainer; None for others."""
    parts = module.split(".")
    if parts[0] in OURS:
        parts = ["tests", *parts]
    elif any(f"{module}.".startswith(f"{name}.") for name in READ):
        parts = parts[1:]
    else:
        return None
    path = ROOT.joinpath(*parts)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return Source(module, path) if path.is_file() else None


_read: dict[str, Traits] = {}


def traits_of(name: str) -> Traits:
    """What a dotted name stands for does when it is called; a function that comes to itself again adds nothing."""
    if name not in _read:
        _read[name] = Traits()
        _read[name] = _traits(name)
    return _read[name]


def _traits(name: str) -> Traits:
    if name in TRAINING:
        return Traits(1)
    costly = [reason for known, reason in COSTLY.items() if f"{name}.".startswith(f"{known}.")]
    if costly:
        return Traits(0, frozenset(costly))
    module, _, last = name.rpartition(".")
    source = source_of(module) if module else None
    if source is None:
        return Traits()
    if last in source.imported:
        return traits_of(source.imported[last])
    if last in source.measuring:
        return Traits(1)
    node = source.defined.get(last)
    if isinstance(node, ast.ClassDef):
        node = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    return _Reader(source, node).read() if node else Traits()


class _Reader:
    """Adds up the traits of one function by the names that it loads."""

    def __init__(self, source: Source, function: ast.FunctionDef):
        arguments, nodes = function.args, list(ast.walk(function))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        self.source, self.function = source, function
        self.inner = {node.name: node for node in nodes if isinstance(node, FUNCTIONS) and node is not function}
        own = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        own |= {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        self.elsewhere = (source.defined.keys() | source.measuring) - own
        elsewhere = {name: origin for name, origin in source.imported.items() if name not in own}
        self.imported = elsewhere | dict(source.imports(nodes))
        self.loaded = {name.id for name in names} & (self.elsewhere | self.imported.keys() | COMMANDS)

    def read(self) -> Traits:
        return self._visit_all(self.function.body) if self.loaded else Traits()

    def _visit_all(self, nodes: Iterable[ast.AST]) -> Traits:
        return sum(map(self._visit, nodes), Traits())

    def _visit(self, node: ast.AST) -> Traits:
        if isinstance(node, (ast.For, ast.While)):
            once = [node.iter if isinstance(node, ast.For) else node.test, *node.orelse]
            return self._visit_all(node.body).repeated() + self._visit_all(once)
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            return self._visit_all(ast.iter_child_nodes(node)).repeated()
        if isinstance(node, ast.With) and any(_refuses(item.context_expr) for item in node.items):
            return Traits(0, self._visit_all(node.body).costly)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in COMMANDS:
            words = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            if words and "--dry-run" not in words:
                return Traits(VERBS.get(words[0], 0)) + self._visit_all(node.args)
        if isinstance(node, ast.ClassDef):  # in a function: its methods, as if each was called once
            return self._visit_all(line for method in node.body for line in getattr(method, "body", ()))
        if isinstance(node, FUNCTIONS):
            return Traits()  # counted where it is called
        if _measures(node):
            return Traits(1) + self._visit_all(ast.iter_child_nodes(node))
        if isinstance(node, ast.Name) and node.id in self.inner:
            function = self.inner.pop(node.id)  # which adds nothing where it comes to itself again
            traits = self._visit_all(function.body)
            self.inner[node.id] = function
            return traits
        if name := self._name(node):
            return traits_of(name)
        return self._visit_all(ast.iter_child_nodes(node))

    def _name(self, node: ast.AST) -> str | None:
        """What a name, or a chain of attributes, stands for, with all its dots; None for what the function owns."""
        if isinstance(node, ast.Attribute):
            base = self._name(node.value)
            return base and f"{base}.{node.attr}"
        if not isinstance(node, ast.Name):
            return None
        if node.id in self.elsewhere:
            return f"{self.source.module}.{node.id}"
        return self.imported.get(node.id)


def _assignments(tree: ast.Module) -> Iterator[tuple[ast.Name, ast.expr]]:
    """(name, value) of a module's constants."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0], node.value


def _measures(node: ast.AST) -> bool:
    """Whether it sets how often a run measures itself: an argument, or an entry of a dictionary."""
    pairs: Iterable[tuple[Any, ast.expr]] = ()
    if isinstance(node, ast.keyword):
        pairs = [(node.arg, node.value)]
    elif isinstance(node, ast.Dict):
        pairs = ((getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True))
    return any(key == MEASURING and getattr(value, "value", 1) != 0 for key, value in pairs)


def _refuses(context: ast.expr) -> bool:
    """Whether it is `pytest.raises` of what is said before a run begins."""
    if not (isinstance(context, ast.Call) and ast.unparse(context.func) == "pytest.raises" and context.args):
        return False
    return ast.unparse(context.args[0]) in REFUSALS


def traits_of_test(item: pytest.Function) -> Traits:
    """The traits of a collected test and of all its fixtures, but for what is trained once for the whole session."""
    definitions = [found[-1] for found in item._fixtureinfo.name2fixturedefs.values()]
    once = [traits_of(_full_name(d.func)) for d in definitions if d.scope == "session"]
    each = [traits_of(_full_name(d.func)) for d in definitions if d.scope != "session"]
    return sum([traits_of(_full_name(item.function)), *each], Traits(0, frozenset().union(*(t.costly for t in once))))


def _full_name(function: Callable) -> str:
    """A function's name with its module's; a file of tests/ is a module by its path from there."""
    return f"{_module_of(function.__code__.co_filename) or function.__module__}.{function.__name__}"


@cache
def _module_of(file: str) -> str:
    """The module that a file of tests/ is; empty for others."""
    path = Path(file)
    known = ROOT / "tests" in path.parents
    return ".".join(path.relative_to(ROOT / "tests").with_suffix("").parts) if known else ""
