"""The notebook of the documentation runs, cell by cell, as a program."""

import json
import runpy

import pytest


@pytest.fixture(scope="module")
def notebook(root):
    return json.loads((root / "docs" / "first_steps.ipynb").read_text(encoding="utf-8"))


def test_it_is_a_notebook_without_outputs(notebook):
    """Outputs are of one machine, and grow a repository."""
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells) > 5
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_it_runs(notebook, tmp_path, monkeypatch, capsys):
    """Its own magic, which installs the package, is left out; it has one training, of fewer updates."""
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    program = "\n\n".join(source for source in sources if not source.startswith("%pip"))
    assert "UPDATES = 20 " in program and sum(source.startswith("%") for source in sources) == 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebook.py").write_text(program.replace("UPDATES = 20 ", "UPDATES = 2 "), encoding="utf-8")

    values = runpy.run_path("notebook.py", run_name="__main__")

    assert values["lora"].is_file() and values["drawn"].size == (64, 64) and values["wider"].size == (96, 64)
    assert values["scheduler"].timesteps.tolist() == [999, 749, 499, 249]
    assert "4 steps" in capsys.readouterr().out
