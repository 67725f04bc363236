"""`pcm` without what it needs: a sentence on what to install, never a traceback."""

import sys

import pytest

from phased_consistency.trainer.cli.start import start


@pytest.mark.parametrize("package", ["typer", "pydantic"])
def test_a_package_that_is_missing_is_named_with_what_installs_it(monkeypatch, package):
    """typer is missed when the verbs are imported, pydantic when one of them runs."""
    for name in [name for name in sys.modules if name.startswith("phased_consistency.trainer.c")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", ["pcm", "train", "--preset", "demo"])
    with pytest.raises(SystemExit) as end:
        start()
    assert end.value.code.startswith(f"Error: pcm needs {package}, which is not installed for {sys.executable}. Run: ")
    assert 'pip install "phased-consistency[train]"' in end.value.code


def test_a_module_of_our_own_that_is_missing_is_a_fault(monkeypatch):
    monkeypatch.setitem(sys.modules, "phased_consistency.trainer.cli.main", None)
    with pytest.raises(ModuleNotFoundError):
        start()
