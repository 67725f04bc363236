"""What is measured during a run: what `pcm evaluate` would measure, the same after a kill, and without a trace in the
weights."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from phased_consistency.samplers import recipe_for_file
from phased_consistency.trainer.evaluation.metrics import paired_error
from phased_consistency.trainer.evaluation.setting import Setting
from phased_consistency.trainer.evaluation.trial import Trial
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.lora.install import installed
from phased_consistency.trainer.reporting.curves import curves
from phased_consistency.trainer.reporting.log import LOSS, read_log
from phased_consistency.trainer.reporting.progress import Reporter
from phased_consistency.trainer.training import validation
from phased_consistency.trainer.training.checkpoint import load_latest_state
from phased_consistency.trainer.training.loop import Run, train
from phased_consistency.trainer.training.validation import REFERENCE, Validation, error_at, verdict
from support.runs import Notes, metadata, sha256, small_config

STEPS = 6
CHANGES = {
    "data__count": 40,
    "data__batch_size": 20,
    "train__steps": STEPS,
    "train__ema": 0.5,
    "lora__dtype": "fp32",
    "objective__phases": 2,
    "validation__count": 3,
    "validation__every": 1,
    "validation__steps": [1, 4],
    "validation__teacher_steps": 3,
}


PICTURES = 4


@pytest.fixture(scope="module", autouse=True)
def fewer_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "PICTURES", PICTURES)
        yield


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run that is measured after each update; its configuration and its LoRA."""
    config = small_config(tmp_path_factory.mktemp("watched") / "run", **CHANGES)
    return config, train(config)


@pytest.fixture(scope="module")
def finished(watched):
    """That run as it is opened again at its end. Leave it as it is."""
    return Run(watched[0], Reporter())


def another(run, config, say=print, **parts):
    """A validation of that run by other settings."""
    of_the_run = {"engine": run.engine, "batches": run.batches, "trained": run.trained, "processes": run.processes}
    return Validation(config, **of_the_run | parts, say=say)


def changed(config, **settings):
    return config.model_copy(update={"validation": config.validation.model_copy(update=settings)})


def measured(config):
    return {line["step"]: line for line in read_log(config.run_folder) if line["kind"] == "validation"}


def test_measuring_leaves_no_trace_in_the_weights(watched, tmp_path):
    assert sha256(train(small_config(tmp_path / "run", **CHANGES | {"validation__every": 0}))) == sha256(watched[1])
    assert not (tmp_path / "run" / REFERENCE).exists()


def test_every_update_is_measured_at_the_asked_and_the_recommended_steps(watched):
    found = measured(watched[0])
    assert list(found) == list(range(STEPS + 1))
    names = {LOSS, error_at(1), error_at(2), error_at(4)}
    assert all(line["figures"].keys() == names for line in found.values())
    assert found[0]["plain"] == {} and all(found[step]["plain"].keys() == names for step in range(1, STEPS + 1))
    assert found[1]["plain"] == found[1]["figures"], "the average of one update is that update's"
    assert found[STEPS]["plain"] != found[STEPS]["figures"]


def test_the_errors_are_those_that_an_evaluation_of_the_file_finds(watched, finished):
    """From the saved LoRA, reloaded by diffusers; only how batches are cut may differ."""
    config, path = watched
    run, base = finished, load_base(config.base.path)
    trial = Trial.of(base, run.validation.prompts, run.validation.trial.seed, resolution=config.data.resolution)
    teacher = trial.latents(Setting("teacher", 3, 3.5), base)
    recipe = recipe_for_file(str(path), metadata(path), "sd15")
    told = measured(config)[STEPS]["figures"]
    with installed(path, base):
        for steps in (1, 2, 4):
            error = paired_error(trial.latents(Setting("lora", steps, 1.0), base, recipe), teacher)
            assert told[error_at(steps)] == pytest.approx(error, rel=1e-3), steps


def test_prompts_are_held_out_ones(finished):
    run = finished
    captions = [run.cache.captions[n] for n in run.batches.held_out]
    assert (
        len(captions) == 3 and set(run.validation.prompts) == set(captions) and len(run.validation.prompts) == PICTURES
    )


def test_the_loss_is_the_objectives_over_all_held_out_samples(watched, finished):
    config, run = watched[0], finished
    batches = [run.batches.fixed([n], draw) for n in run.batches.held_out for draw in (0, 1)]
    with run.adapter.using(run.trained.weights()), torch.no_grad():
        losses = torch.cat([run.engine.step(batch).distance for batch in batches])
    assert measured(config)[STEPS]["figures"][LOSS] == pytest.approx(losses.mean().item(), rel=1e-4)


def test_the_best_is_kept_and_says_of_which_update_it_is(watched):
    config, _ = watched
    errors = {step: line["figures"][error_at(2)] for step, line in measured(config).items() if step}
    best = min(errors, key=errors.get)
    told = measured(config)[STEPS]["best"]
    assert told.pop("against") and told == {"step": best, "figure": error_at(2), "value": errors[best]}
    header = metadata(config.run_folder / "pcm-lora-best.safetensors")
    assert header["pcm.step"] == str(best) and json.loads(header["pcm.config"])["validation"] == {"count": 3}


def test_a_killed_run_measures_the_same_and_keeps_the_same_best(watched, tmp_path):
    """Killed after the update that a checkpoint is behind of, with a best file that it has not counted yet."""
    config = small_config(tmp_path / "run", **CHANGES)
    shutil.copytree(watched[0].run_folder, config.run_folder)
    for path in sorted((config.run_folder / "checkpoints").iterdir())[1:]:
        path.unlink()
    before = load_latest_state(config.run_folder / "checkpoints")
    assert before[0] == 4 and before[2]["best"]["step"] <= 4
    assert sha256(train(config)) == sha256(watched[1])
    assert _figures(config) == _figures(watched[0])
    assert sha256(config.run_folder / "pcm-lora-best.safetensors") == sha256(
        watched[0].run_folder / "pcm-lora-best.safetensors"
    )


def _figures(config):
    return {step: (line["figures"], line["plain"], line["best"]) for step, line in measured(config).items()}


def test_the_teachers_pictures_are_made_once_for_a_setting(watched, finished, monkeypatch):
    asked = []
    monkeypatch.setattr(Trial, "latents", lambda self, setting, *_: asked.append(setting) or torch.zeros(1))
    monkeypatch.setattr(validation, "write_tensors", lambda *_: None)
    assert another(finished, watched[0]).teacher.shape[0] == PICTURES and asked == []
    assert another(finished, changed(watched[0], teacher_steps=9)).teacher.shape == (1,)
    assert [(s.steps, s.guidance) for s in asked] == [(9, 3.5)]


def test_a_damaged_reference_is_made_again(watched, tmp_path):
    notes, config = Notes(), small_config(tmp_path / "run", **CHANGES)
    shutil.copytree(watched[0].run_folder, config.run_folder)
    run = Run(config, notes)
    whole = run.validation.teacher
    (config.run_folder / REFERENCE).write_bytes(b"no tensors")
    del run.validation.teacher
    assert torch.equal(run.validation.teacher, whole)
    assert any(line.startswith(f"{REFERENCE} is damaged") for line in notes.said)


@pytest.fixture
def judged(watched, finished):
    """Which of these errors, one an update, are found to be better."""

    def improved(errors, **settings):
        plain = SimpleNamespace(average=None, weights=dict)
        judge, told = another(finished, changed(watched[0], **settings), trained=plain), iter(errors)
        judge._measure = lambda weights, step: {error_at(2): next(told)}
        return [judge(step).improved for step in range(len(errors))]

    return improved


def test_only_a_lower_error_is_better(judged):
    assert judged([4.0, 3.0, 2.0, 2.0, math.nan, 2.5, 1.0]) == [False, True, True, False, False, False, True]
    assert judged([0.1, 3.0, 2.0]) == [False, False, False], "the base is the first candidate, and no file"
    assert judged([0.1, 3.0, 2.0], best=False) == [False, False, False]


def test_a_best_file_that_is_gone_is_said(watched, finished, tmp_path):
    notes = Notes()
    judge = another(finished, watched[0], notes.say)
    judge.load(best_of(judge), tmp_path / "gone.safetensors")
    assert judge.best is None
    assert notes.said == ["gone.safetensors of update 3 is gone: the best is looked for anew."]


@pytest.mark.parametrize(
    ("settings", "kept"), [({}, True), ({"steps": [1]}, True), ({"every": 0}, True), ({"teacher_steps": 9}, False)]
)
def test_a_best_of_another_measure_is_not_compared_with(settings, kept, watched, finished, tmp_path):
    notes, file = Notes(), tmp_path / "best.safetensors"
    file.touch()
    judge = another(finished, changed(watched[0], **settings), notes.say)
    judge.load(best_of(another(finished, watched[0])), file)
    told = "best.safetensors of update 3 was measured against something else: the best is looked for anew."
    assert bool(judge.best) == kept and notes.said == ([] if kept else [told])


def best_of(judge):
    return {"step": 3, "figure": error_at(2), "value": 0.5, "against": judge.against}


WITHOUT_TEACHER = {"objective__name": "ct", "objective__guidance": None, "objective__phases": None, "train__ema": 0}


def test_without_a_teacher_the_held_out_loss_decides(tmp_path):
    config, notes = small_config(tmp_path / "run", **CHANGES | WITHOUT_TEACHER | {"train__steps": 2}), Notes()
    train(config, notes)
    assert "Measured at the start, every 1 updates and at the end: the loss on 3 held-out samples." in notes.said
    found = measured(config)
    assert all(line["figures"].keys() == {LOSS} for line in found.values())
    assert found[2]["best"]["figure"] == LOSS and not (config.run_folder / REFERENCE).exists()


def test_with_neither_nothing_is_measured_and_that_is_said(tmp_path):
    changes = WITHOUT_TEACHER | {"validation__count": 0, "train__steps": 1}
    config, notes = small_config(tmp_path / "run", **CHANGES | changes), Notes()
    train(config, notes)
    assert any("no sample is held out, and there is no teacher to compare" in line for line in notes.said)
    assert measured(config) == {} and not list(config.run_folder.glob("*-best*"))


def test_without_held_out_samples_pictures_are_of_training_prompts(tmp_path):
    changes = {"validation__count": 0, "train__steps": 1, "validation__steps": []}
    config, notes = small_config(tmp_path / "run", **CHANGES | changes), Notes()
    train(config, notes)
    assert any(
        f"{PICTURES} pictures of prompts that training sees too against the teacher's 3 steps at CFG 3.5" in line
        for line in notes.said
    )
    assert all(line["figures"].keys() == {error_at(2)} for line in measured(config).values())


def line(step, **figures):
    names = {"loss": LOSS, "at_1": error_at(1), "at_4": error_at(4)}
    return {"step": step, "figures": {names[name]: value for name, value in figures.items()}}


def test_a_run_that_is_no_better_than_its_base_is_told_so():
    both = [error_at(1), error_at(4)]
    first = line(0, loss=1.0, at_1=0.5, at_4=0.2)
    half = line(9, loss=0.1, at_1=0.4, at_4=0.3)
    worse = line(9, loss=0.1, at_1=0.5, at_4=math.nan)
    better = line(9, loss=2.0, at_1=0.4, at_4=0.1)
    assert (
        verdict([first, better], "the untrained base", both)
        == verdict([half], "x", both)
        == verdict([], "x", both)
        == ""
    )
    assert verdict([first, better, half], "the untrained base", both) == (
        "The LoRA is no nearer to the teacher than the untrained base: paired error at 4 steps 0.3 (at first 0.2)."
    )
    assert "Do not use it: change train.lr" in verdict([first, worse], "the untrained base", both)
    fewer = line(9, loss=0.1, at_1=0.9, at_4=0.1)
    assert "at 1 step" in verdict([first, fewer], "x", both) and verdict([first, fewer], "x", both[1:]) == ""


def test_a_run_promises_nothing_at_fewer_steps_than_its_own(watched, finished):
    judge = another(finished, changed(watched[0], steps=[1, 2, 8]))
    assert judge.recipe.steps == 2 and judge.promised == [error_at(2), error_at(8)]


def test_update_0_is_a_candidate_for_the_best(watched, tmp_path):
    """A rate that makes every update worse leaves no LoRA called the best, and says what came of it."""
    cache = {"data__cache": str(watched[0].cache_folder)}
    config = small_config(tmp_path / "run", **CHANGES | cache | {"train__lr": 1.0, "train__ema": 0.0})
    notes = Notes()
    train(config, notes)
    best = {line["best"]["step"] for line in measured(config).values()}
    assert best == {0} and not list(config.run_folder.glob("*-best*"))
    assert any(text.startswith("Measured at update 3: held-out loss ") for text in notes.said)
    assert notes.said[-1].startswith("Report: ") or "no nearer to the teacher than the untrained base" in notes.said[-1]
    assert any("Do not use it" in text for text in notes.said)


def test_a_loss_that_says_nothing_is_not_measured_nor_drawn(watched, tmp_path):
    cache = {"data__cache": str(watched[0].cache_folder)}
    changes = {name: value for name, value in CHANGES.items() if not name.startswith("objective")}
    config = small_config(tmp_path / "run", **changes | cache | {"objective__name": "dscd", "train__steps": 2})
    train(config)
    lines = read_log(config.run_folder)
    assert all(LOSS not in line["figures"] for line in lines if line["kind"] == "validation")
    updates = [line for line in lines if line["kind"] == "update"]
    assert "Loss in training" in curves(updates, [], None)
    assert not [title for title in curves(updates, [], None, loss_tells=False) if "oss" in title]
    assert any("loss of dscd is the size of a normalised step" in note for note in lines[0]["notes"])
