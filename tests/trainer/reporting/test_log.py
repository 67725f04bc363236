"""A run's log: over kills and starts it holds each update once, and what it cannot hold ends no run."""

from __future__ import annotations

import json

import pytest

from phased_consistency.trainer.reporting.log import LOG, RunLog, continued, read_log, without_places


@pytest.fixture
def said():
    return []


@pytest.fixture
def run_log(tmp_path, said):
    return RunLog(tmp_path / LOG, said.append)


def steps(folder, kind="update"):
    return [line["step"] for line in read_log(folder) if line["kind"] == kind]


def update(run_log, *numbers):
    for number in numbers:
        run_log.add("update", step=number, seconds=float(number), loss=1 / number)


def test_each_update_is_there_once_after_a_kill(run_log, tmp_path):
    run_log.begin(0, device="one")
    update(run_log, 1, 2, 3, 4, 5)
    RunLog(tmp_path / LOG, print).begin(3, device="other")
    update(run_log, 4, 5, 6)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [line["device"] for line in read_log(tmp_path) if line["kind"] == "start"] == ["one", "other"]


def test_a_killed_start_gets_an_end_that_tells_what_it_took(run_log, tmp_path):
    run_log.begin(0)
    update(run_log, 1, 2, 3)
    run_log.begin(2)
    run_log.add("end", step=4, seconds=9.0, how="finished")
    run_log.begin(4)
    ends = [line for line in read_log(tmp_path) if line["kind"] == "end"]
    assert [(line["how"], line["step"], line["seconds"]) for line in ends] == [("killed", 3, 3.0), ("finished", 4, 9.0)]


def test_a_run_that_begins_anew_has_none_of_the_old_figures(run_log, tmp_path):
    run_log.begin(0)
    run_log.add("validation", step=0, figures={"held-out loss": 1.0})
    update(run_log, 1)
    run_log.begin(0)
    assert steps(tmp_path, "validation") == steps(tmp_path) == [] and steps(tmp_path, "start") == [0, 0]


def test_what_went_before_the_first_update_stays(run_log, tmp_path):
    run_log.begin(0)
    run_log.add("validation", step=0, figures={"held-out loss": 1.0})
    update(run_log, 1, 2)
    run_log.begin(1)
    assert steps(tmp_path, "validation") == [0] and steps(tmp_path) == [1]


def test_nothing_is_dropped_where_nothing_was_lost():
    lines = [{"kind": "start", "step": 0}, {"kind": "update", "step": 1, "seconds": 2.0}]
    lines += [{"kind": "end", "step": 1, "seconds": 2.5, "how": "stopped"}]
    assert list(continued(lines, 1)) == lines


def test_a_line_cut_short_ends_the_log(run_log, tmp_path):
    run_log.begin(0)
    update(run_log, 1, 2)
    path = tmp_path / LOG
    path.write_bytes(path.read_bytes()[:-7])
    assert steps(tmp_path) == [1] and read_log(tmp_path / "elsewhere") == []


def test_lines_are_strict_json(run_log, tmp_path):
    run_log.begin(0)
    run_log.add("update", step=1, loss=float("nan"), norms={"a": float("inf")}, more=[1.0, float("-inf")])
    *_, last = (tmp_path / LOG).read_text().splitlines()
    line = json.loads(last, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert line == {"kind": "update", "step": 1, "loss": None, "norms": {"a": None}, "more": [1.0, None]}


def test_a_log_that_cannot_be_written_is_said_once(run_log, tmp_path, said):
    run_log.begin(0)
    (tmp_path / LOG).unlink()
    (tmp_path / LOG).mkdir()
    update(run_log, 1, 2, 3)
    assert len(said) == 1 and said[0].startswith("log.jsonl is no longer written: ")


def test_file_names_that_are_no_text_are_written(run_log, tmp_path, said):
    run_log.begin(0, left_out=["bad\udcff.png: cannot be read"])
    assert said == [] and read_log(tmp_path)[0]["left_out"] == ["bad?.png: cannot be read"]


@pytest.mark.parametrize("line", ["[1]", '{"kind": "update"}', '{"kind": "update", "step": null}', '{"step": 1}'])
def test_a_line_that_is_no_log_line_is_left_out(line, run_log, tmp_path, said):
    run_log.begin(0)
    with (tmp_path / LOG).open("a") as file:
        file.write(f"{line}\n")
    update(run_log, 1)
    run_log.begin(1)
    assert said == [] and steps(tmp_path) == [1] and steps(tmp_path, "start") == [0, 1]


def test_no_process_but_the_first_writes(tmp_path):
    run_log = RunLog(None, pytest.fail)
    run_log.begin(0)
    run_log.add("update", step=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (
            "The last checkpoint is kept in /home/me/runs/one/checkpoints.",
            "The last checkpoint is kept in checkpoints.",
        ),
        (r"Cannot write C:\Users\me\runs\x.safetensors: disk full", "Cannot write x.safetensors: disk full"),
        ("'/data/set one/a.png' is damaged", "'set one/a.png' is damaged"),
        ("https://host.org/a/set-0001.tar?token=secret cannot be read", "set-0001.tar cannot be read"),
        ("s3://key:word@bucket/ is gone", "bucket is gone"),
        ("runs/one holds 3/4 of it; and/or, 1:2", "runs/one holds 3/4 of it; and/or, 1:2"),
    ],
)
def test_messages_for_others_have_no_places(text, left):
    assert without_places(text) == left
