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
    names = [row["name"] for row in report["rows"]]
    assert names == ["teacher"] * 9 + ["smallcfg-4", "normalcfg-1-adv", "normalcfg-4"]
    assert report["rows"][0]["paired_error"] == 0 < report["rows"][-1]["paired_error"]
    assert [r["name"] for r in report["guidance"]] == ["teacher", "smallcfg-4", "normalcfg-4"]
    teacher = report["guidance"][0]
    assert teacher["agreement"] > 0.999 and teacher["change"] > 0 and not any(teacher["sweep"].values())
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("grid.png", "negative.png"))
    assert "| normalcfg-4 | 4 | 4 | 8 |" in (tmp_path / "table.md").read_text()
