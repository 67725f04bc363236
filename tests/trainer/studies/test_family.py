"""The comparison of the family, whole, at its smallest; and its figures, gathered over seeds."""

import json

import pytest

from phased_consistency.trainer.objectives import OBJECTIVES
from phased_consistency.trainer.studies.family import ROWS, grouped, main, table
from support.runs import speck

SMALL = ["data.count=4", "data.batch_size=4", "data.teacher_steps=2", "train.batch_size=2"]
SMALL += ["train.steps=1", "train.trackers=[]", "train.report=false"]
SMALL += ["lora.rank=2", "validation.every=0"]


def test_every_objective_has_a_row():
    names = {name.split("=")[1] for row in ROWS.values() for name in row if name.startswith("objective.name=")}
    assert names | {"pcm"} == set(OBJECTIVES)


def test_the_comparison_measures_draws_and_writes(tmp_path):
    options = ["--base", speck().name, "--out", str(tmp_path), "--pictures", "2", "--seeds", "0,1"]
    assert main([*options, "--rows", "lcm", "--no-report", *SMALL]) == 0
    assert not (tmp_path / "report.json").exists()
    measured = tmp_path / "lcm-seed1" / "figures.json"
    before = measured.stat().st_mtime_ns
    assert main([*options, "--rows", "pcm-4,lcm", *SMALL]) == 0
    assert measured.stat().st_mtime_ns == before, "what is measured is not measured again"
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    of = grouped(rows, "distance")
    assert set(of) >= {("pcm-4", "deterministic"), ("lcm", "stochastic"), ("teacher", "dpm++, CFG 4")}
    assert {n: len(v) for n, v in of["lcm", "stochastic"].items()} == dict.fromkeys((1, 2, 4, 8, 16), 2)
    assert of["lcm", "stochastic"][1] == of["lcm", "deterministic"][1], "one step has no noise to add"
    text = (tmp_path / "table.md").read_text()
    assert text == table(rows) and text.count("| pcm-4 | deterministic |") == 3
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("grid.png", "plot.png"))


def test_a_cell_is_the_mean_and_half_the_range():
    row = {"name": "lcm", "gamma": 1.0, "solver": "ddim", "guidance": 1.0, "steps": 2, "paired_error": 0, "followed": 1}
    text = table([row | {"distance": d} for d in (0.1, 0.2, 0.6)])
    assert "| lcm | stochastic | 0.300 (0.250) |" in text


def test_unknown_rows_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--rows", "pcm-4,lcn"])
    assert "no such rows: lcn; available: pcm-4," in capsys.readouterr().err
