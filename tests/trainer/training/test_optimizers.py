"""The optimizers that a run may take: each goes on exactly, and what it can make nothing of is a sentence."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.reporting.progress import Reporter
from phased_consistency.trainer.training import optimizers
from phased_consistency.trainer.training.loop import Run, train
from phased_consistency.trainer.training.optimizers import (
    SOURCES,
    ScheduleFreeWeights,
    check_optimizer,
    lr_factor,
    make_optimizer,
    optimizer_class,
)
from phased_consistency.trainer.training.plan import plan
from phased_consistency.trainer.training.state import Trained
from support.runs import sha256, small_config

NAMES = [name for name in SOURCES if name != "adamw8bit"] + ["RMSprop", "NAdam", "SGD", "Adam"]
ALL = pytest.mark.parametrize("name", NAMES)


def installed(name):
    """Skip where the optimizer's package is not installed."""
    if name in SOURCES:
        pytest.importorskip(SOURCES[name].module)


def config_of(name, **changes):
    settings = {"train.optimizer": name, "train.lr": 1.0 if name == "prodigy" else 1e-2} | changes
    return load_config(None, settings, "demo-sd15" if name != "schedulefree" else "sd15-4step")


class Layers(torch.nn.Module):
    """Two small layers, as an adapter has them: a matrix, and a kernel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.conv = torch.nn.Linear(6, 4), torch.nn.Conv2d(2, 4, 3)

    def copy(self):
        return {name: p.detach().clone() for name, p in self.named_parameters().items()}

    def named_parameters(self):
        return dict(super().named_parameters())

    state = copy

    def load(self, state):
        for name, parameter in self.named_parameters().items():
            parameter.data.copy_(state[name])


def trained(config):
    """The state of a run on such layers, without a base."""
    adapter = Layers()
    engine = SimpleNamespace(
        opponent=None, average=None, base=SimpleNamespace(device=torch.device("cpu")), state=dict, load=lambda _: None
    )
    return Trained(config, Accelerator(cpu=True), adapter, engine)


def updated(run, numbers):
    """Make updates with gradients that belong to their number."""
    for number in numbers:
        torch.manual_seed(number)
        for parameter in run.adapter.named_parameters().values():
            parameter.grad = torch.randn_like(parameter)
        run.optimizer.step()
    return run


@ALL
def test_an_optimizer_goes_on_bit_for_bit(name):
    installed(name)
    config = config_of(name)
    whole = updated(trained(config), range(6))
    stopped = updated(trained(config), range(4))
    groups, facts = stopped.state()

    again = trained(config)
    assert again.load({key: dict(value) for key, value in groups.items()}, facts) == []
    updated(again, (4, 5))
    for name, weight in whole.weights().items():
        assert torch.equal(again.weights()[name], weight), name
    assert facts["optimizer"]["kind"] == type(again.optimizer.optimizer).__name__


@pytest.mark.parametrize("changed", [False, True])
def test_a_checkpoint_from_before_there_was_a_choice_goes_on(changed):
    whole = updated(trained(config_of("adamw")), range(6))
    groups, facts = updated(trained(config_of("adamw")), range(4)).state()
    del facts["optimizer"]

    again = trained(config_of("adamw"))
    assert again.load({key: dict(value) for key, value in groups.items()}, facts, changed) == []
    updated(again, (4, 5))
    assert all(torch.equal(again.weights()[name], weight) for name, weight in whole.weights().items())


@pytest.mark.parametrize("name", ["adafactor", "lion", "prodigy", "schedulefree"])
def test_a_run_with_it_goes_on_to_the_same_bytes(name, tmp_path):
    installed(name)
    settings = {
        "train__optimizer": name,
        "train__steps": 4,
        "train__save_every": 100,
        "data__cache": tmp_path / "cache",
    }
    settings |= {"train__lr": 1.0} if name == "prodigy" else {}
    whole = train(small_config(tmp_path / "whole", **settings))
    stopped = Run(small_config(tmp_path / "stopped", **settings), Reporter())
    for _ in range(2):
        stopped.update()
    stopped._save(export_too=False)
    assert sha256(train(stopped.config)) == sha256(whole)


def test_another_optimizer_begins_anew_where_changes_are_accepted():
    groups, facts = updated(trained(config_of("adamw")), range(2)).state()
    other = trained(config_of("RMSprop"))
    assert other.load(groups, facts, changed=True) == ["the optimizer's state"]
    updated(other, range(2))


def test_schedule_free_weights_are_the_optimizer_s_average_and_leave_training_as_it_is():
    installed("schedulefree")
    run = updated(trained(config_of("schedulefree")), range(3))
    assert isinstance(run.average, ScheduleFreeWeights)
    before = run.adapter.copy()
    averaged = run.weights()
    assert all(torch.equal(before[name], p) for name, p in run.adapter.named_parameters().items())
    assert any(not torch.equal(before[name], weight) for name, weight in averaged.items())
    run.optimizer.optimizer.eval()
    assert all(torch.equal(averaged[name], p) for name, p in run.adapter.named_parameters().items())


@ALL
def test_the_run_s_rate_and_decay_reach_it(name):
    installed(name)
    config = config_of(name, **{"train.weight_decay": 0.25})
    (group,) = make_optimizer(
        config, {"adapter": dict(Layers().named_parameters())}, None, torch.device("cpu")
    ).param_groups
    assert group["lr"] == group["full_lr"] == config.train.lr
    assert group["weight_decay"] == 0.25


def test_rates_fall_as_they_are_said_to():
    def factors(schedule, **changes):
        config = small_config("nowhere", train__lr_schedule=schedule, train__steps=8, **changes)
        return [lr_factor(config, step) for step in range(1, 9)]

    assert factors("constant") == [1] * 8
    assert factors("linear") == pytest.approx([1 - n / 8 for n in range(8)])
    cosine = factors("cosine")
    assert cosine[0] == 1 and cosine[4] == pytest.approx(0.5) and sorted(cosine, reverse=True) == cosine
    assert factors("restarts", train__lr_restarts=1) == pytest.approx(2 * factors("cosine")[::2])
    assert factors("linear", train__warmup=3)[:2] == pytest.approx([1 / 4, 2 / 4 * 7 / 8])


# --- bad input


def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(optimizers.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r'prodigy needs prodigyopt: pip install "phased-consistency\[optimizers\]"'):
        optimizer_class("prodigy")
    with pytest.raises(ValueError, match=r'adamw8bit needs bitsandbytes: pip install "phased-consistency\[quantize\]"'):
        optimizer_class("adamw8bit")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ADAMW", r"'ADAMW'; available: adamw, .*Did you mean adamw\?"),
        ("torch.optim.AdamW", r"Did you mean adamw\?"),
        ("sgd", r"Did you mean SGD\?"),
        ("Optimizer", "'Optimizer'; available: adamw"),
        ("swa_utils", "SparseAdam.$"),
        ("Prodigy", "Did you mean prodigy"),
        ("LBFGS", "classes of torch.optim but for LBFGS and SparseAdam"),
        ("Optimizers", "available: adamw"),
        ("lr_scheduler", "available: adamw"),
    ],
)
def test_an_unknown_optimizer_is_named_with_the_nearest(name, words):
    with pytest.raises(ValueError, match=words):
        optimizer_class(name)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train.optimizer": "prodigy", "train.lr": 1e-4}, "finds the learning rate itself .* 0.0001: set train.lr=1"),
        ({"train.optimizer": "prodigy", "train.lr": 1, "adversarial.weight": 0.1}, "a discriminator at its own"),
        ({"train.optimizer": "schedulefree"}, "train.ema=0.98 does not go with it"),
        ({"train.optimizer": "schedulefree", "train.ema": 0}, "train.lr_schedule=cosine does not go with it"),
    ],
)
def test_settings_that_it_makes_nothing_of_are_refused(settings, words):
    for name in ("prodigy", "schedulefree"):
        installed(name)
    with pytest.raises(ValueError, match=words):
        check_optimizer(load_config(None, settings, "demo-sd15"))


@pytest.mark.parametrize("name", ["prodigy", "schedulefree"])
def test_a_critic_s_updates_are_not_counted_as_the_student_s(name):
    installed(name)
    with pytest.raises(ValueError, match=f"train.optimizer={name} counts every update .* the critic of tdm has more"):
        check_optimizer(load_config(None, {"train.optimizer": name, "train.lr": 1}, "tdm-demo"))


def test_one_that_cannot_train_kernels_says_so():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    with pytest.raises(ValueError, match="train.optimizer=Muon does not take the weights of this run"):
        make_optimizer(config_of("Muon"), {"adapter": dict(Layers().named_parameters())}, None, torch.device("cpu"))


def test_the_dry_run_refuses_it_too_where_there_are_kernels(tmp_path):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    with pytest.raises(ValueError, match="train.optimizer=Muon does not take the weights of this run"):
        plan(small_config(tmp_path, train__optimizer="Muon"))
    layers_alone = "{'conv|proj_in|proj_out' = 0}"
    assert plan(small_config(tmp_path, train__optimizer="Muon", lora__ranks=layers_alone))["trained_parameters"]
