"""One optimizer update: it waits for nothing, and its numbers are read late without being lost."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from phased_consistency.samplers import schedule
from phased_consistency.trainer.reporting.progress import Reporter
from phased_consistency.trainer.system.clock import Clock
from phased_consistency.trainer.training import loop, validation
from phased_consistency.trainer.training.checkpoint import load_latest_state
from phased_consistency.trainer.training.loop import Run, RunFailed, train
from phased_consistency.trainer.training.update import lr_factor
from support.runs import Notes, sha256, small_config

# What makes a host wait for a GPU: a number read from a tensor, and shapes that depend on values.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")


class Waits(TorchDispatchMode):
    """Notes the operations inside that a GPU's host would wait in."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(WAITING):
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Levels are looked at on a CPU alone."""
    monkeypatch.setattr(schedule, "_holds_on_cpu", lambda condition: False)


@pytest.mark.parametrize("settings", [{}, {"adversarial__weight": 0.1, "train__accumulation": 2, "train__ema": 0.9}])
@pytest.mark.parametrize("base", ["tiny-sd15", "tiny-sdxl", "tiny-emoji"])
def test_no_update_waits_for_the_device(base, settings, cache, tmp_path, as_on_a_gpu, monkeypatch):
    side = 32 if base != "tiny-emoji" else 64
    data = {"data__resolution": side, "data__count": 4, "data__teacher_steps": 1, "data__cache": cache}
    config = small_config(tmp_path, base__path=base, **data, **settings)
    run = Run(config, Reporter())
    run.update()
    for maker in (torch.Tensor, "new_tensor"), (torch, "tensor"):  # a number goes to a GPU by a copy that is waited for
        monkeypatch.setattr(*maker, _refused)
    with Waits() as waits:
        outcome = run.updater(2, False)
        run.trained.updated(2, config.train.steps)
    monkeypatch.undo()
    assert waits.found == []
    with waits:
        assert outcome.read()["loss"] > 0 and torch.ones(1).item()
    assert waits.found, "the watch does see such operations"


def _refused(*_, **__):
    raise AssertionError("a number is copied to the device, for which the host waits")


def test_numbers_read_late_are_the_same(tmp_path, monkeypatch):
    """However many updates are under way before the first one's are looked at."""

    class Losses(Notes):
        def update(self, status):
            super().update(status)
            self.said.append(status.loss)

    told = []
    for lag in (0, 1, 3):
        monkeypatch.setattr(loop, "LAG", lag)
        notes = Losses()
        config = small_config(tmp_path / str(lag), data__cache=tmp_path / "cache")
        told.append((sha256(train(config, notes)), notes.steps))
        told[-1] += (tuple(line for line in notes.said if isinstance(line, float)),)
    assert told[0] == told[1] == told[2] and told[0][1] == [1, 2, 3, 4]


@pytest.mark.parametrize("lag", [0, 1])
def test_nothing_is_saved_of_an_update_that_is_not_finite(lag, tmp_path, monkeypatch):
    """The checkpoint of the update before it stays the last one, though the weights were spoilt before it was seen."""
    monkeypatch.setattr(loop, "LAG", lag)
    run = Run(small_config(tmp_path, train__save_every=1), Reporter())
    step = run.engine.step
    monkeypatch.setattr(run.engine, "step", lambda batch: _spoilt(step(batch)) if run.step == 2 else step(batch))
    told = "The loss is not finite at update 3, samples .*The last checkpoint, step-0000002, is kept"
    with pytest.raises(RunFailed, match=told):
        run.go()
    kept, groups, _ = load_latest_state(tmp_path / "checkpoints")
    assert kept == 2 and all(w.isfinite().all() for w in groups["adapter"].values())


def _spoilt(losses):
    losses.distance.data[0] = torch.nan
    return losses


def test_the_parts_of_the_time_are_said_and_are_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "PICTURES", 2)
    notes = Notes()
    watched = {"validation__every": 2, "validation__steps": [], "validation__teacher_steps": 1, "preview__every": 2}
    small = {
        "train__steps": 3,
        "train__save_every": 2,
        "data__teacher_steps": 1,
        "adversarial__weight": 0.1,
        "adversarial__width": 16,
        "preview__steps": [1],
    }
    train(small_config(tmp_path, **watched, **small), notes)
    (line,) = (line for line in notes.said if line.startswith("Time: "))
    parts = {name: int(share) for name, share in (p.rsplit(" ", 1) for p in _shares(line))}
    expected = {"teacher", "target", "student", "discriminator", "backward", "optimizer", "data", "other"}
    expected |= {"validation", "saving", "previews"}
    assert parts.keys() == expected and 95 <= sum(parts.values()) <= 105


def _shares(line: str) -> list[str]:
    return line.removeprefix("Time: ").removesuffix(".").replace("%", "").split(", ")


def test_a_clock_adds_up_its_parts(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 4.0, 4.5, 6.0])
    monkeypatch.setattr("phased_consistency.trainer.system.clock.time.perf_counter", lambda: next(now))
    clock = Clock()
    with clock.part("student"):
        pass
    with clock.part("student"):
        pass
    assert clock.seconds() == {"student": 2.5, "other": 3.5}


def test_a_part_within_another_is_the_outer_ones(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 5.0, 6.0, 6.0])
    monkeypatch.setattr("phased_consistency.trainer.system.clock.time.perf_counter", lambda: next(now))
    clock = Clock()
    with clock.part("validation"), clock.part("student"):
        pass
    with clock.part("student"):
        pass
    assert clock.seconds() == {"validation": 3.0, "student": 1.0, "other": 2.0}


def test_the_rate_warms_up_and_falls():
    constant = small_config("nowhere", train__warmup=3, train__steps=10)
    assert [lr_factor(constant, step) for step in (1, 2, 4, 10)] == [0.25, 0.5, 1, 1]
    cosine = small_config("nowhere", train__lr_schedule="cosine", train__steps=10)
    assert lr_factor(cosine, 1) == 1 and lr_factor(cosine, 6) == pytest.approx(0.5)


def test_the_rate_falls_in_each_stage():
    """As a cosine's over a run of that stage alone, wherever the stages begin."""
    progressive = {"objective__name": "progressive", "objective__halvings": 3, "train__lr_schedule": "stages"}
    staged = small_config("nowhere", train__steps=30, **progressive)
    alone = small_config("nowhere", train__steps=10, train__lr_schedule="cosine")
    expected = [lr_factor(alone, step) for step in range(1, 11)]
    assert [lr_factor(staged, step) for step in range(1, 31)] == pytest.approx(expected * 3)
    stages = [staged.objective.stage((step - 1) / 30) for step in range(1, 31)]
    assert stages == [0] * 10 + [1] * 10 + [2] * 10, "the teacher changes where the rate is back"
