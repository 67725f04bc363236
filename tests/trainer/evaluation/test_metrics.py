"""Figures of single pictures, and the settings that make them."""

from types import SimpleNamespace

import pytest
import torch

from phased_consistency.samplers import Recipe, VPSchedule, output_from_x0_eps
from phased_consistency.trainer.evaluation import trial as trials
from phased_consistency.trainer.evaluation.metrics import (
    agreements,
    consistency,
    diversities,
    paired_error,
    paired_errors,
)
from phased_consistency.trainer.evaluation.setting import SOLVERS, Setting
from phased_consistency.trainer.evaluation.trial import Trial

SHAPE = (64, 4, 8, 8)


@pytest.fixture
def latents():
    return torch.randn(SHAPE)


def test_paired_error_of_the_same_and_of_scaled_pictures(latents):
    assert paired_error(latents, latents) == 0
    assert paired_error(1.3 * latents, latents) == pytest.approx(0.3, rel=1e-4)
    assert paired_error(torch.zeros(SHAPE), latents) == pytest.approx(1, rel=1e-5)


def test_paired_error_counts_every_pair_alike(latents):
    """A faint picture's error weighs as much as a strong one's, and pairs are not exchanged."""
    strength = torch.logspace(-2, 2, len(latents)).view(-1, 1, 1, 1)
    assert paired_error(1.3 * strength * latents, strength * latents) == pytest.approx(0.3, rel=1e-4)
    assert paired_error(latents.roll(1, 0), latents) > 1
    assert torch.allclose(
        paired_errors(torch.cat([latents, 2 * latents]), latents.repeat(2, 1, 1, 1))[64:], torch.ones(64)
    )


def test_diversity_is_what_noise_decides():
    same = torch.randn(5, 1, 4, 8, 8).expand(5, 3, 4, 8, 8)
    assert not diversities(same).any()
    assert diversities(torch.stack([same[:, 0], same[:, 0] + 0.5], 1)) == pytest.approx([0.5] * 5, rel=1e-5)
    independent = 2 * torch.randn(200, 3, 4, 8, 8)  # sqrt(2) * 2 between any two
    assert diversities(independent).mean().item() == pytest.approx(8**0.5, rel=0.01)
    shifted = torch.randn(5, 1, 1, 8, 8) + same
    assert diversities(shifted) == pytest.approx([0] * 5), "prompts that differ are no diversity"


def test_agreement_of_changes(latents):
    assert agreements(3 * latents, latents) == pytest.approx([1] * 64)
    assert agreements(-latents, latents) == pytest.approx([-1] * 64)


def test_consistency_compares_fewer_steps_with_more(latents):
    errors = consistency({8: 2 * latents, 1: latents, 4: 1.5 * latents})
    assert {n: list(row) for n, row in errors.items()} == {1: [4, 8], 4: [8]}
    assert errors[1][8] == pytest.approx([0.5] * 64) and errors[1][4] == pytest.approx([1 / 3] * 64)
    assert errors[4][8] == pytest.approx([0.25] * 64)


class Knowing:
    """A base that knows the one clean picture of every prompt, counts how many points it is asked for, and
    remembers the noise in them."""

    device, prediction, schedule = torch.device("cpu"), "epsilon", VPSchedule.from_betas()

    def __init__(self):
        self.asked, self.network, self.noises = 0, SimpleNamespace(), []

    def denoise(self, x, tick, condition):
        self.asked += len(x)
        levels = self.schedule.alpha(tick), self.schedule.sigma(tick)
        eps = (x - levels[0].view(-1, 1, 1, 1) * condition["picture"]) / levels[1].view(-1, 1, 1, 1)
        self.noises.append(eps)
        return output_from_x0_eps(condition["picture"], eps, *levels, self.prediction)

    @staticmethod
    def with_null(condition, null):
        return {"picture": condition["picture"].repeat(2, 1, 1, 1)}


@pytest.fixture
def known():
    pictures = torch.randn(3, 4, 8, 8)
    return Trial({"picture": pictures}, {"picture": pictures[:1]}, torch.randn(3, 4, 8, 8), seed=0)


@pytest.mark.parametrize("gamma", [None, 0.5, 1.0])
def test_a_perfect_one_phase_model_is_consistent_across_steps(known, gamma):
    base, recipe = Knowing(), Recipe(family="sd15", mode="stochastic", phases=1)
    latents = {n: known.latents(Setting("perfect", n, 1.0, gamma), base, recipe) for n in (1, 2, 4, 8)}
    assert paired_error(latents[1], known.condition["picture"]) < 1e-5
    assert all(error.max() < 1e-4 for row in consistency(latents).values() for error in row.values())


def test_no_two_draws_are_one_and_the_same_trial_draws_the_same(known, monkeypatch):
    """The noise at the start and between the steps, of two batches, from seeds that follow each other."""
    monkeypatch.setattr(trials, "PLACES", 2 * 8 * 8)  # two pictures at once
    recipe = Recipe(family="sd15", mode="stochastic", phases=1)

    def drawn(trial, steps):
        base = Knowing()
        trial.latents(Setting("perfect", steps, 1.0), base, recipe)
        return torch.stack([torch.cat(base.noises[i::steps]) for i in range(steps)])  # step, picture

    whole = Trial(known.condition, known.null, torch.empty(3, 4, 8, 8), seed=0)
    first, other = (drawn(whole.with_noise(seed), 3) for seed in (0, 1))
    pictures = torch.cat([first, other]).flatten(0, 1).flatten(1)
    distances = torch.cdist(pictures, pictures)
    assert (distances + 100 * torch.eye(len(pictures))).min() > 10, "of noises of 256 numbers: about 22"
    assert torch.equal(drawn(whole.with_noise(0), 3), first)
    assert torch.allclose(drawn(whole.with_noise(0), 2), first[:2], atol=1e-3), "one gamma, one noise"


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (4, 1.0), (5, 4.0)])
def test_evaluations_are_those_of_the_network(known, solver, steps, guidance):
    base, setting = Knowing(), Setting("teacher", steps, guidance, solver=solver)
    latents = known.latents(setting, base)
    assert base.asked == setting.evaluations * len(known.noise)
    assert paired_error(latents, known.condition["picture"]) < 1e-4


def test_solvers_step_over_their_own_levels():
    ticks = {solver: Setting("teacher", 4, 4.0, solver=solver).ticks(None) for solver in SOLVERS}
    assert ticks["ddim"] == ticks["dpm++"] == (1000, 750, 500, 250, 0)
    assert ticks["euler"] == (1000, 667, 334, 1, 0)
    assert Setting("teacher", 1, 4.0, solver="euler").ticks(None) == (1000, 0)
    assert Setting("lora", 4, 1.0).ticks(Recipe(family="sd15", points=50)) == (1000, 740, 500, 240, 0)


def test_solvers_differ_on_a_real_base(tiny_base):
    """Each approaches the teacher's 40 steps from its own side; more steps are nearer."""
    trial = Trial.of(tiny_base, ["a red star on a blue background", "a green ring on a white background"], seed=3)
    reference = trial.latents(Setting("teacher", 40, 1.0), tiny_base)
    errors = {
        solver: [
            paired_error(trial.latents(Setting("teacher", n, 1.0, solver=solver), tiny_base), reference)
            for n in (4, 16)
        ]
        for solver in SOLVERS
    }
    assert all(few > many for few, many in errors.values())
    assert len({round(few, 4) for few, _ in errors.values()}) == 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"name": "teacher", "solver": "heun"}, r"solver is 'heun'; available: ddim, euler, dpm\+\+"),
        ({"name": "mine", "solver": "euler"}, "solver 'euler' is the teacher's.*got 'mine'"),
        ({"name": "teacher", "solver": "dpm++", "gamma": 1.0}, "without a gamma; got 'teacher' with gamma 1.0"),
        ({"name": "teacher", "untrained": True}, "The teacher learns nothing; untrained is for a LoRA's setting"),
    ],
)
def test_settings_that_nothing_samples(setting, message):
    with pytest.raises(ValueError, match=message):
        Setting(steps=4, guidance=1.0, **setting)


def test_parts_of_a_trial_and_other_noise(tiny_base):
    prompts = ["a red star", "a blue ring", "a pink moon"]
    trial = Trial.of(tiny_base, prompts, seed=5)
    setting = Setting("teacher", 2, 4.0)
    whole = trial.latents(setting, tiny_base)
    assert torch.allclose(trial.first(2).latents(setting, tiny_base), whole[:2], atol=1e-4)
    other = trial.with_noise(6)
    assert torch.equal(other.noise, Trial.of(tiny_base, prompts, seed=6).noise)
    assert paired_error(other.latents(setting, tiny_base), whole) > 0.1


def test_evaluations_count_both_halves_of_guidance():
    assert Setting("teacher", 10, 4.0).evaluations == 20
    assert Setting("lora", 4, 1.0).evaluations == 4
