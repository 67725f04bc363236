"""`pcm watch`: a run's page in a terminal, read from its folder while it goes on and after."""

import io
import json
import math
import shutil

import pytest
from rich.console import Console

from phased_consistency.trainer.reporting import watch as watching
from phased_consistency.trainer.reporting.story import Story
from phased_consistency.trainer.reporting.watch import facts, sparkline, watch


@pytest.mark.parametrize(
    ("values", "curve"),
    [
        ([], ""),
        ([1.0], "▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([5, 5, 5], "▁▁▁"),
        ([0, math.nan, 7], "▁ █"),
        ([math.inf], " "),
    ],
)
def test_a_curve_goes_from_its_least_to_its_greatest(values, curve):
    assert sparkline(values) == curve


def test_a_long_curve_is_of_means():
    assert sparkline([0, 2, 6, 8], width=2) == "▁█" and len(sparkline(range(1000))) == watching.WIDTH


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of a finished run's folder."""
    return shutil.copytree(trained[0].run_folder, tmp_path / "run")


def printed(folder, **options):
    out = io.StringIO()
    watch(folder, 1.0, options.get("report", False), Console(file=out, width=100))
    return out.getvalue()


def test_a_finished_run_is_told_once(folder):
    text = printed(folder)
    assert "pcm-lora: finished" in text and "update 4 of 4" in text and "left" not in text
    assert str(folder / "pcm-lora.safetensors") in text
    assert any(line.split()[-1].replace(".", "").isdigit() and "▁" in line for line in text.splitlines())


def test_a_run_that_goes_on_has_a_rate_and_a_time_left(folder, monkeypatch):
    lines = (folder / "log.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["kind"] != "end" and json.loads(line).get("step", 0) <= 2]
    (folder / "log.jsonl").write_text("\n".join(kept) + "\n")
    monkeypatch.setattr(Story, "state", ("running", "the run is under way"))
    now = facts(Story.of(folder))
    assert (now["step"], now["steps"]) == (2, 4)
    assert now["seconds_left"] == pytest.approx(2 / now["updates_per_second"])
    assert "left" in printed(folder)


def test_a_terminal_is_drawn_until_the_run_ends(folder, monkeypatch):
    looks = iter([("running", ""), ("running", ""), ("running", ""), ("running", ""), ("finished", "")])
    last = [("running", "")]

    def state(self):
        last[0] = next(looks, ("finished", ""))
        return last[0]

    monkeypatch.setattr(Story, "state", property(state))
    waits = []
    monkeypatch.setattr(watching.time, "sleep", waits.append)
    out = io.StringIO()
    watch(folder, 0.25, True, Console(file=out, width=100, force_terminal=True))
    assert waits and set(waits) == {0.25} and last[0][0] == "finished"
    assert (folder / "report.html").is_file()


def test_the_report_of_a_run_under_way_reads_itself_anew(folder, monkeypatch):
    from phased_consistency.trainer.reporting.page import write_report

    mark = '<meta http-equiv="refresh"'
    write_report(folder)
    assert mark not in (folder / "report.html").read_text(encoding="utf-8")
    monkeypatch.setattr(Story, "state", ("running", "the run is under way"))
    write_report(folder)
    assert mark in (folder / "report.html").read_text(encoding="utf-8")


def test_the_verb_tells_it_to_programs_and_people(folder, pcm, fails, tmp_path):
    assert json.loads(pcm("watch", folder, "--json").out)["state"] == "finished"
    assert "update 4 of 4" in pcm("watch", folder).out
    assert "--every is 0" in fails(2, "watch", folder, "--every", 0)
    assert "holds no log.jsonl" in fails(2, "watch", tmp_path)
