"""The Python examples of the pages run, each as a program of its own in an empty folder."""

import ast
import runpy

import pytest
from house.pages import NOT_RUN, ROOT, fences, pages

EXAMPLES = {
    f"{page.relative_to(ROOT).as_posix()}-{i}": content
    for page in pages()
    for i, (kind, content) in enumerate(fences(page.read_text(encoding="utf-8")))
    if kind == "python"
}


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("name", [name for name, text in EXAMPLES.items() if not text.startswith(NOT_RUN)])
def test_an_example_runs(name, tmp_path, monkeypatch):
    """To its end, and its assertions hold."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(EXAMPLES[name], encoding="utf-8")
    runpy.run_path("example.py", run_name="__main__")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_imports_what_there_is(name):
    """Those that do not run, too: what they take from this package is there."""
    for node in ast.walk(ast.parse(EXAMPLES[name])):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("phased_consistency"):
            module = __import__(node.module, fromlist=["*"])
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
