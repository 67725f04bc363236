"""The matrix script, whole, at its smallest."""

import json

from phased_consistency.trainer.studies.matrix import main
from support.runs import speck

SMALL = ["data.count=4", "data.batch_size=4", "data.teacher_steps=2", "train.batch_size=2"]
SMALL += ["train.steps=1", "train.trackers=[]", "train.report=false"]
SMALL += ["lora.rank=2", "validation.every=0"]


def test_the_matrix_measures_draws_and_writes(tmp_path):
    cells = "smallcfg-4,normalcfg-4,normalcfg-1-adv"
    options = ["--base", speck().name, "--out", str(tmp_path), "--pictures", "2", "--cells", cells]
    assert main([*options, *SMALL, f"data.cache={tmp_path / 'cache'}"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    whose = [row["who"] for row in report["rows"][9:]]
    cells = ["smallcfg-4", "normalcfg-1-adv", "normalcfg-4"]
    assert whose == [who for cell in cells for who in (cell, f"untrained, as {cell}")]
    assert {row["name"] for row in report["rows"][:9]} == {"teacher"}
    assert report["rows"][0]["paired_error"]["value"] == 0 < report["rows"][-1]["paired_error"]["value"]
    assert [r["name"] for r in report["guidance"]] == ["teacher", "smallcfg-4", "normalcfg-4"]
    teacher = report["guidance"][0]
    assert teacher["agreement"]["value"] > 0.999 and teacher["change"]["value"] > 0
    assert not any(error["high"] for error in teacher["sweep"].values())
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("grid.png", "negative.png"))
    assert "| normalcfg-4 | 4 | 4 | 8 |" in (tmp_path / "table.md").read_text()
