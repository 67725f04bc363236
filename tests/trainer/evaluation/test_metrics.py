"""The figures of the report, on sets whose distances are known, and the settings that make the pictures."""

from types import SimpleNamespace

import pytest
import torch

from phased_consistency.samplers import Recipe, VPSchedule, output_from_x0_eps
from phased_consistency.trainer.evaluation import trial as trials
from phased_consistency.trainer.evaluation.metrics import (
    agreement,
    consistency,
    diversity,
    frechet_distance,
    paired_error,
    sliced_wasserstein,
)
from phased_consistency.trainer.evaluation.setting import SOLVERS, Setting
from phased_consistency.trainer.evaluation.trial import Row, Trial

SHAPE = (64, 4, 8, 8)
SIZE = 4 * 8 * 8


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


def test_distance_of_a_set_to_itself_in_another_order_is_zero(latents):
    assert sliced_wasserstein(latents, latents) == 0
    assert sliced_wasserstein(latents[torch.randperm(len(latents))], latents) < 1e-5


def test_distance_of_a_shifted_set_is_the_shift_in_a_mean_direction(latents):
    """sqrt(E[(u . shift)^2]) = |shift| / sqrt(D) over unit directions u; 512 of them leave about 3 % of error."""
    shift = torch.randn(SHAPE[1:])
    expected = shift.norm().item() / SIZE**0.5
    assert sliced_wasserstein(latents + shift, latents) == pytest.approx(expected, rel=0.1)


def test_distance_scales_and_is_symmetric(latents):
    other = 2 * torch.randn(SHAPE) + 1
    distance = sliced_wasserstein(latents, other)
    assert distance == pytest.approx(sliced_wasserstein(other, latents), rel=1e-6)
    assert sliced_wasserstein(3 * latents, 3 * other) == pytest.approx(3 * distance, rel=1e-5)


def test_distance_sees_a_lost_spread(latents):
    """Averages are no substitute for pictures: the set's mean in every place is far from the set."""
    collapsed = latents.mean(0, keepdim=True).expand(SHAPE)
    assert sliced_wasserstein(collapsed, latents) > 0.8


def gaussian(number, mean, spread):
    """(number, D) samples with exactly this mean, and covariance spread spread^T."""
    x = torch.randn(number, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (number - 1))).T
    return white @ spread.T + mean


def test_frechet_distance_of_two_gaussians():
    """|mu|^2 + sum (s - t)^2 for diagonal covariances s^2 and t^2 with means mu apart."""
    s, t = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 1.0]).double()
    shift = torch.tensor([1.0, -2.0, 0.5]).double()
    a, b = gaussian(40, torch.zeros(3), torch.diag(s)), gaussian(70, shift, torch.diag(t))
    assert frechet_distance(a, b) == pytest.approx(shift.square().sum().item() + (s - t).square().sum().item())


def test_frechet_distance_agrees_with_the_root_of_the_product():
    """tr (C1 C2)^(1/2) is the sum of the roots of C1 C2's eigenvalues, for covariances that do not commute."""
    a = torch.randn(50, 6).double() @ torch.randn(6, 6).double()
    b = torch.randn(60, 6).double() @ torch.randn(6, 6).double() + 1
    first, second = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_sets_smaller_than_their_dimensions(latents):
    """64 samples of 256 numbers: a shift, a scale and a set of its own are still told exactly."""
    spread = latents.flatten(1).double().T.cov().trace().item()
    assert frechet_distance(latents, latents[torch.randperm(64)]) == pytest.approx(0, abs=1e-4)
    shifted = latents + (mean := torch.randn(SHAPE[1:]))
    assert frechet_distance(shifted, latents) == pytest.approx(mean.square().sum().item(), rel=1e-4)
    centred = latents - latents.mean(0)
    assert frechet_distance(3 * centred, centred) == pytest.approx(4 * spread, rel=1e-4)


def test_frechet_distance_needs_two_of_each(latents):
    with pytest.raises(ValueError, match="at least 2 of each; got 1 and 64"):
        frechet_distance(latents[:1], latents)


def test_diversity_is_what_noise_decides():
    same = torch.randn(5, 1, 4, 8, 8).expand(5, 3, 4, 8, 8)
    assert diversity(same) == 0
    assert diversity(torch.stack([same[:, 0], same[:, 0] + 0.5], 1)) == pytest.approx(0.5, rel=1e-5)
    independent = 2 * torch.randn(200, 3, 4, 8, 8)  # sqrt(2) * 2 between any two
    assert diversity(independent) == pytest.approx(8**0.5, rel=0.01)
    assert diversity(torch.randn(5, 1, 1, 8, 8) + same) == pytest.approx(0), "prompts that differ are no diversity"


def test_agreement_of_changes(latents):
    assert agreement(3 * latents, latents) == pytest.approx(1)
    assert agreement(-latents, latents) == pytest.approx(-1)
    assert agreement(torch.cat([latents, -latents]), torch.cat([latents, latents])) == pytest.approx(0, abs=1e-6)


def test_consistency_compares_fewer_steps_with_more(latents):
    errors = consistency({8: 2 * latents, 1: latents, 4: 1.5 * latents})
    assert {n: list(row) for n, row in errors.items()} == {1: [4, 8], 4: [8]}
    assert errors[1][8] == pytest.approx(0.5) and errors[1][4] == pytest.approx(1 / 3)
    assert errors[4][8] == pytest.approx(0.25)


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
    assert all(error < 1e-4 for row in consistency(latents).values() for error in row.values())


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


def test_rows_are_json_ready():
    row = Row("lora", 4, 1.0, 4, 0.1, 0.2)
    assert row.as_dict() == {
        "name": "lora", "steps": 4, "guidance": 1.0, "evaluations": 4, "paired_error": 0.1, "distance": 0.2,
    }  # fmt: skip
