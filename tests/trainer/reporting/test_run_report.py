"""A run's report: one page from the folder alone, true to the log and the files, with nothing of this machine in it."""

from __future__ import annotations

import html
import json
import re
import shutil
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

from phased_consistency.samplers.lora_file import file_hash
from phased_consistency.trainer.config.load import flat, load_config
from phased_consistency.trainer.config.presets import PRESETS
from phased_consistency.trainer.reporting.curves import curves, smoothed
from phased_consistency.trainer.reporting.log import LOG, read_log
from phased_consistency.trainer.reporting.page import write_report
from phased_consistency.trainer.reporting.story import Story, duration, starting_point
from phased_consistency.trainer.system.clock import Clock
from phased_consistency.trainer.system.locks import only_run
from phased_consistency.trainer.training.engine import Engine
from phased_consistency.trainer.training.loop import RunFailed, train
from support.runs import Notes, metadata, small_config, speck

CHANGES = {
    "name": "mine",
    "data__count": 20,
    "train__report": "true",
    "train__ema": 0.5,
    "train__save_every": 2,
    "validation__every": 2,
    "validation__count": 2,
    "validation__steps": [1],
    "validation__teacher_steps": 2,
    "preview__every": 2,
    "preview__steps": [1, 2],
    "preview__prompts": '["a <b>red</b> star & <script>alert(1)</script>"]',
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run to its end: its folder and what it said."""
    folder, notes = tmp_path_factory.mktemp("finished") / "the-run", Notes()
    train(small_config(folder, **CHANGES), notes)
    return folder, notes.said


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the run's folder."""
    return shutil.copytree(finished[0], tmp_path / "the-run")


def cut(folder, *kinds):
    """Take the last lines of these kinds out of the log, as a kill would."""
    lines = (folder / LOG).read_text().splitlines(keepends=True)
    while json.loads(lines[-1])["kind"] in kinds:
        del lines[-1]
    (folder / LOG).write_text("".join(lines))


def page(folder):
    return (folder / "report.html").read_text()


def plain(text):
    """The words of a page."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", text, flags=re.S))).split())


def test_a_run_ends_with_its_report(finished):
    folder, said = finished
    assert said[-1] == f"Report: {folder / 'report.html'}"
    words = plain(page(folder))
    base = Path(speck().name).name
    assert f"mine finished PCM LoRA for SD1.5, made from {base}. 4 of 4 updates" in words
    for name in ("mine.safetensors", "mine-best.safetensors"):
        assert f"{name} {metadata(folder / name)['pcm.step']} " in words and file_hash(folder / name) in words
    assert "4 steps, CFG 1 (1 to 2), LoRA strength 1" in words and "0 keys unmatched of 29 modules" in words


def test_a_run_whose_gpu_has_failed_has_a_report(tmp_path, monkeypatch):
    """It tells of no more times, and that is not what the run is said to have ended with."""

    def failed(*_):
        raise RuntimeError("CUDA error: device-side assert triggered")

    config = small_config(tmp_path / "run", train__report="true")
    monkeypatch.setattr(Engine, "step", failed)
    monkeypatch.setattr(Clock, "seconds", failed)
    with pytest.raises(
        RunFailed, match="^The GPU has failed: CUDA error: device-side assert .*; the same command goes"
    ):
        train(config)
    end = read_log(config.run_folder)[-1]
    assert (end["kind"], end["step"], end["how"]) == ("end", 0, "failed") and "parts" not in end
    assert "device-side assert" in plain(page(config.run_folder))


def test_the_page_needs_no_other_file_and_runs_nothing(finished):
    text = page(finished[0])
    assert "<script" not in text and not re.search(r"\son\w+=", text) and "javascript:" not in text
    links = re.findall(r"(?:src|href)=\"([^\"]{0,40})", text)
    assert links and all(link.startswith(("data:image/", "#")) for link in links)
    assert text.count("data:image/") == 3, "two previews and the best"
    assert not re.search(r"url\((?!#)", text) and "@import" not in text


def test_nothing_of_this_machine_is_in_it(finished):
    folder, _ = finished
    for text in (page(folder), (folder / LOG).read_text()):
        assert str(folder.parent) not in text and str(folder.parent.parent) not in text


def test_what_others_wrote_is_text(finished):
    text = page(finished[0])
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "<b>" not in text


def test_figures_are_those_of_the_log(finished):
    story = Story.of(finished[0])
    measured = [line for line in read_log(finished[0]) if line["kind"] == "validation"]
    best = measured[-1]["best"]["step"]
    columns, rows = story.figures()
    assert columns == ["first: update 0", f"best: update {best}", "last: update 4", "last, not averaged"]
    for name, *values in rows:
        expected = [measured[at]["figures"][name] for at in (0, best // 2, -1)] + [measured[-1]["plain"][name]]
        assert values == [f"{value:.4g}" for value in expected]


def test_settings_other_than_the_defaults_are_named(finished):
    changed = {key: (here, before) for key, here, before in Story.of(finished[0]).changed()}
    assert changed["train.lr"] == ("0.01", "5e-06") and changed["base.path"] == (f'"{Path(speck().name).name}"', "")
    assert "train.lr_schedule" not in changed and "train.seed" not in changed and "output" not in changed


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_as_it_is_has_no_changed_settings(name):
    settings = load_config(preset=name).for_others()
    before = starting_point(settings, name)
    places = {"base.path", "data.images", "data.shards", "data.prompts", "lora.init", "output"}
    assert {k: v for k, v in flat(settings).items() if before.get(k) != v and k not in places} == {}


def test_costs_add_up_over_starts(finished, folder):
    cut(folder, "end")
    cut(folder, "saved", "validation")
    for path in (folder / "checkpoints" / "step-0000004.safetensors", folder / "mine.safetensors"):
        path.unlink()
    train(small_config(folder, **CHANGES))
    story = Story.of(folder)
    assert [(s["from"], s["to"], s["how"]) for s in story.starts] == [(0, 4, "killed"), (2, 4, "finished")]
    costs = dict(story.costs())
    assert costs["updates"] == "4 of 4, 2 of them twice" and costs["samples seen in training"] == "18"
    assert costs["starts"] == "2" and costs["time from the first update on"] == duration(
        sum(s["seconds"] for s in story.starts)
    )
    shares = dict(story.parts())
    assert sum(shares.values()) == pytest.approx(1, abs=0.01) and {"validation", "previews", "saving"} <= shares.keys()
    assert "Dotted lines: where the run stopped and went on." in plain(page(folder))


def test_a_killed_run_can_be_reported_on(folder, pcm):
    cut(folder, "end", "saved")
    result = pcm("report", folder, "--json")
    answer = json.loads(result.out)
    assert (result.code, answer["state"], answer["step"], answer["steps"]) == (0, "killed", 4, 4)
    assert "the same command goes on from its last checkpoint" in plain(page(folder))


def test_a_run_under_way_can_be_reported_on(folder, pcm, tmp_path):
    cut(folder, "end", "saved")
    with only_run(folder, print):
        result = pcm("report", folder, "--out", tmp_path / "now.html")
    assert result.out.strip() == f"{tmp_path / 'now.html'}: running, 4 of 4 updates"
    assert "mine running" in plain((tmp_path / "now.html").read_text())


def test_a_failed_run_says_why_and_names_no_folder(tmp_path, monkeypatch):
    from phased_consistency.trainer.lora import selftest

    monkeypatch.setattr(selftest.SelfTest, "passed", False)
    config = small_config(tmp_path / "run", train__report="true")
    with pytest.raises(RunFailed):
        train(config)
    words = plain(page(config.run_folder))
    assert "failed" in words and "What was saved does not give the trained output" in words
    assert "The checkpoint in checkpoints is good" in words and str(tmp_path) not in words
    assert "Nothing was saved yet" not in words, "the file that failed its test is there"


def test_a_run_without_pictures_or_measurements_has_a_page(tmp_path):
    config = small_config(tmp_path / "run", train__report="true", train__steps=1)
    train(config)
    words = plain(page(config.run_folder))
    assert "finished" in words and "Pictures" not in words and "Measured on the way" not in words


def test_folders_of_no_run_are_refused(tmp_path, fails):
    assert "holds no log.jsonl: it is not the folder of a run" in fails(2, "report", tmp_path)
    assert "write a name that ends in .html" in fails(2, "report", tmp_path, "--out", tmp_path / "x.txt")


def test_a_damaged_preview_and_file_are_left_out(folder):
    (folder / "previews" / "step-0000002.png").write_bytes(b"no picture")
    write_report(folder)
    assert page(folder).count("data:image/") == 2


def test_a_damaged_lora_is_named_and_left_out(folder):
    (folder / "mine-best.safetensors").write_bytes(b"no tensors")
    write_report(folder)
    words = plain(page(folder))
    assert "mine-best.safetensors is left out: " in words and "mine.safetensors 4 " in words


@pytest.fixture
def drawn_once(monkeypatch):
    """The curves of the same lines are drawn once: they are most of what a page takes."""
    drawn = {}

    def once(*lines):
        if (key := repr(lines)) not in drawn:
            drawn[key] = curves(*lines)
        return drawn[key]

    monkeypatch.setattr("phased_consistency.trainer.reporting.page.curves", once)


@pytest.mark.parametrize("part", range(3))
def test_a_log_of_another_version_or_damaged_gets_a_sentence(part, folder, drawn_once):
    """Whatever is missing or of another type: a page or a sentence, and no file but the folder's own is read."""
    lines, refused = [json.loads(text) for text in (folder / LOG).read_text().splitlines()], 0
    one_of_each = {line["kind"]: at for at, line in enumerate(lines)}
    fields = [(at, key) for at in one_of_each.values() for key in lines[at] if key != "kind"]
    changes = list(zip(fields, cycle([None, "../../x", [1], {"a": 1}]), strict=False))[part::3]
    for (at, key), value in changes:
        broken = [dict(line) for line in lines]
        broken[at][key] = value
        (folder / LOG).write_text("".join(json.dumps(line) + "\n" for line in broken))
        try:
            write_report(folder)
        except ValueError as error:
            refused += 1
            assert "is of another version, or damaged" in str(error)
    assert 0 < refused < len(changes)


def test_a_report_that_cannot_be_made_ends_no_run(tmp_path, monkeypatch):
    def fails(*_):
        raise ZeroDivisionError("of the page")

    monkeypatch.setattr("phased_consistency.trainer.reporting.page._content", fails)
    monkeypatch.setattr("phased_consistency.trainer.reporting.page.write_page", fails)
    config, notes = small_config(tmp_path / "run", train__report="true", train__steps=1), Notes()
    assert train(config, notes).is_file()
    assert notes.said[-1].startswith("No report: ")


def test_the_smoothed_line_of_a_constant_is_it():
    assert smoothed(np.full(1000, 3.0)) == pytest.approx(np.full(1000, 3.0))
    steps = smoothed(np.arange(400.0))
    assert (np.diff(steps) > 0).all() and steps[-1] == pytest.approx(399 - 7, abs=0.5), "lags by 400 / 50 - 1 updates"


def test_curves_of_many_updates_stay_small():
    updates = [{"kind": "update", "step": n, "loss": 1 + np.sin(n) ** 2, "lr": 1e-4} for n in range(1, 20_001)]
    drawn = curves(updates, [], None)
    assert list(drawn) == ["Loss in training", "Learning rate"]
    assert len(drawn["Loss in training"]) < 100_000 and drawn["Loss in training"].count("<svg") == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (312, "5 min 12 s"), (25_530, "7 h 05 min")]
)
def test_durations_are_in_words(seconds, text):
    assert duration(seconds) == text
