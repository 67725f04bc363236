"""The comparison of the family, whole, at its smallest; and its figures, gathered over seeds."""

import json

import pytest
import torch

from phased_consistency.samplers import Recipe
from phased_consistency.trainer.evaluation.intervals import Figure
from phased_consistency.trainer.objectives import LCM, OBJECTIVES, PCM
from phased_consistency.trainer.studies import family
from phased_consistency.trainer.studies.family import COMMON, MATCHING, ROWS, evaluations_a_sample, grouped, main, table
from phased_consistency.trainer.studies.matrix import ADVERSARIAL
from phased_consistency.trainer.training.engine import Batch, Engine
from support.closed_form import FLOW, NULL, Gaussian, StubBase, Switch, seeded
from support.runs import small_config, speck

SMALL = ["data.count=4", "data.batch_size=4", "data.teacher_steps=2", "train.batch_size=2"]
SMALL += ["train.steps=1", "train.trackers=[]", "train.report=false"]
SMALL += ["lora.rank=2", "validation.every=0"]


def test_every_objective_has_a_row():
    names = {name.split("=")[1] for row in ROWS.values() for name in row if name.startswith("objective.name=")}
    assert names | {"pcm"} == set(OBJECTIVES)


# a discriminator and a critic need a base that learns: tests/trainer/training count for them
@pytest.mark.parametrize("row", [row for row, settings in ROWS.items() if not {*ADVERSARIAL, *MATCHING} & {*settings}])
def test_a_rows_evaluations_are_worked_out_as_the_engine_counts_them(row, tmp_path):
    """And as the network itself does, call by call, over the whole run with its stages."""
    changes = dict(setting.split("=") for setting in (*COMMON, *ROWS[row]) if setting.startswith("objective."))
    known = {"objective.guidance": None} if row in ("ct", "lcf") else {}
    config = small_config(tmp_path, **{key.replace(".", "__"): value for key, value in (changes | known).items()})
    objective, switch, count, parts = config.objective, Switch(), 256, 24
    exact = Gaussian(FLOW)
    base = StubBase(FLOW, "flow", switch, exact, exact)
    engine = Engine(base, switch, objective.model_copy(update={"target_ema": 0.0}), NULL)
    x0, noise = (torch.randn(count, 4, 2, 2, generator=seeded(seed)) for seed in (1, 2))
    for part in range(parts):
        progress = (part + 0.5) / parts
        levels = objective.levels(count, FLOW, progress, seeded(part))
        guidance = objective.draw_guidance(count, progress, seeded(part))
        engine.step(Batch(x0, noise, levels, guidance, {"hidden": torch.zeros(count, 1)}, progress))

    assert engine.evaluations == sum(rows for rows, *_ in base.calls)
    assert evaluations_a_sample(config, FLOW) == pytest.approx(engine.evaluations / count / parts, rel=0.01)


def test_on_one_grid_lcm_is_pcm_of_one_phase():
    """So the comparison has one row for both."""
    lcm, pcm = LCM(points=8), PCM(points=8, phases=1)
    first, second = (kind.levels(64, FLOW, 0.5, seeded()) for kind in (lcm, pcm))
    assert torch.equal(first.u, second.u) and torch.equal(first.r, second.r) and torch.equal(first.s, second.s)
    assert lcm.huber_c == pcm.huber_c and lcm.target_ema == pcm.target_ema and type(lcm).distance is type(pcm).distance


def test_every_number_of_steps_is_possible_on_the_one_grid():
    recipes = [Recipe(family="sd3", phases=phases) for phases in (1, 2, 4, 8)]
    assert {len(family._finer(recipe).grid().plan(n).ticks) - n for recipe in recipes for n in family.STEPS} == {1}


def test_the_comparison_measures_draws_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(family, "STEPS", (1, 2, 4))
    options = ["--base", speck().name, "--out", str(tmp_path), "--pictures", "2", "--seeds", "0,1"]
    assert main([*options, "--rows", "lcm", "--no-report", *SMALL]) == 0
    assert not (tmp_path / "report.json").exists()
    measured = tmp_path / "lcm-seed1" / "measurements.json"
    before = measured.stat().st_mtime_ns
    assert main([*options, "--rows", "pcm-4,lcm", *SMALL]) == 0
    assert measured.stat().st_mtime_ns == before, "what is measured is not measured again"
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    of = grouped(rows, "kernel")
    assert set(of) >= {("pcm-4", "deterministic"), ("lcm", "stochastic"), ("teacher", "dpm++, CFG 4")}
    assert set(of) >= {("untrained, 4 phases", "deterministic"), ("untrained, 1 phase", "stochastic")}
    assert len(set(of["untrained, 1 phase", "deterministic"][4])) == 1, "the base is the same for every seed"
    assert {n: len(v) for n, v in of["lcm", "stochastic"].items()} == dict.fromkeys((1, 2, 4), 2)
    assert of["lcm", "stochastic"][1] == of["lcm", "deterministic"][1], "one step has no noise to add"
    trained = json.loads((tmp_path / "report.json").read_text())["training"]
    assert all(2 * (1 + 2) <= run["evaluations"] <= 2 * (1 + 2 + 1) and run["updates"] == 1 for run in trained)
    text = (tmp_path / "table.md").read_text()
    assert (
        text.endswith(table(rows))
        and text.count("| lcm | 1 |") == 1
        and text.count("| pcm-4 | deterministic |") == 4 == text.count("| teacher, the floor |")
    )
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("grid.png", "plot.png"))

    reported = []
    monkeypatch.setattr(family, "write_comparison", lambda out, comparison, runs: reported.extend(runs))
    assert main([*options, "--rows", "lcm,cd", "--no-training", *SMALL]) == 0
    assert [(row, config.train.seed) for row, config in reported] == [("lcm", 0), ("lcm", 1)], "cd is not finished"


def test_what_a_run_took_is_told_by_its_last_start_that_trained(tmp_path, monkeypatch):
    """Killed at update 50, and once more when it had nothing left to do but to save."""
    log = [
        *({"kind": "start", "step": 0}, {"kind": "update", "step": 50}),
        *({"kind": "start", "step": 50}, {"kind": "end", "step": 200, "evaluations": 9000, "seconds": 60}),
        *({"kind": "start", "step": 200}, {"kind": "end", "step": 200, "evaluations": 0, "seconds": 1}),
    ]
    monkeypatch.setattr(family, "read_log", lambda folder: log)
    config = small_config(tmp_path, train__steps=200)
    assert family.training("lcm", config) == {
        **{"name": "lcm", "seed": config.train.seed},
        **{"updates": 200, "evaluations": 12000, "seconds": 80},
    }


def test_a_cell_is_the_mean_within_all_the_intervals():
    row = {"name": "lcm", "gamma": 1.0, "solver": "ddim", "guidance": 1.0, "steps": 2}
    figures = [Figure(d, d - 0.05, d + 0.1).as_dict() for d in (0.1, 0.2, 0.6)]
    text = table([row | {"paired_error": figure, "spaces": {"latents": {"kernel": figure}}} for figure in figures])
    assert "| lcm | stochastic | 0.300 [0.050, 0.700] |" in text, "the paired error"
    assert "| lcm | stochastic | 300 [50, 700] |" in text, "the kernel distance, times 1000"
    assert "what the prompt says" not in text, "of a base whose language nobody knows"


def test_unknown_rows_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--rows", "pcm-4", "--base", speck().name, "--out", "nowhere", "--no-training"])
    assert "no run in nowhere is finished: leave out --no-training" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--rows", "pcm-4,lcn"])
    assert "no such rows: lcn; available: pcm-4," in capsys.readouterr().err
