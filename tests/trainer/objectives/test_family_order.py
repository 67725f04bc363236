"""The published order of the family, on a closed form where the truth is known (tests/support/family_order.py)."""

import pytest
import torch

from phased_consistency.trainer.objectives import DSCD
from support.family_order import ROWS, diffusion_model, distilled, error

UPDATES = 1000


@pytest.fixture(scope="module")
def start():
    return diffusion_model(UPDATES)


@pytest.fixture(scope="module")
def errors(start):
    """name -> (steps, gamma) -> error, after a short training."""
    actual = {}
    for name in ("pcm, 4 phases", "lcm", "tcd", "dscd"):
        network, phases = distilled(ROWS[name], start, UPDATES, seed=0), ROWS[name].grid().phases
        actual[name] = {(n, gamma): error(network, n, gamma, phases) for n in (1, 4, 8) for gamma in (0.0, 1.0)}
    return actual


def test_pcm_beats_lcm_at_its_own_number_of_steps(errors):
    assert errors["pcm, 4 phases"][4, 0.0] < 0.5 * min(errors["lcm"][4, gamma] for gamma in (0.0, 1.0))


def test_more_steps_do_not_harm_pcm_and_do_harm_lcm(errors):
    assert errors["pcm, 4 phases"][8, 0.0] < 0.15
    assert all(errors["lcm"][8, gamma] > errors["lcm"][4, gamma] for gamma in (0.0, 1.0))


def test_deterministic_steps_harm_lcm_and_not_tcd(errors):
    assert errors["lcm"][4, 0.0] > max(errors["lcm"][4, 1.0], 2 * errors["lcm"][1, 0.0])
    assert all(errors["tcd"][4, gamma] < 0.5 * errors["lcm"][4, gamma] for gamma in (0.0, 1.0))


def test_a_phased_model_is_weak_at_one_step(errors):
    assert errors["pcm, 4 phases"][1, 0.0] > 1.5 * errors["lcm"][1, 0.0]


def test_the_normalised_tangent_learns_one_step_soonest(errors):
    assert errors["dscd"][1, 0.0] < errors["lcm"][1, 0.0]


def test_a_tangent_of_the_wrong_sign_leads_away(start):
    class Wrong(DSCD):
        def _normalised(self, g):
            return -super()._normalised(g)

    wrong = Wrong(guidance_mode="normalcfg")
    assert error(distilled(wrong, start, 150, seed=0), 4, 1.0, 1) > 1.0


def test_the_exact_teacher_is_exact(start):
    """Its own flow in 40 steps gives the data; the measure sees the difference of a shifted set."""

    class Exact(torch.nn.Module):
        def forward(self, x, tick, condition):
            from support.family_order import teacher

            return teacher(x, tick, condition)

    assert error(Exact(), 40, 0.0, 1) < 0.04
