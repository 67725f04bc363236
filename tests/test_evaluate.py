"""The figures of the report, on sets whose distances are known."""

import pytest
import torch

from phased_consistency.trainer.evaluate import Row, Setting, paired_error, sliced_wasserstein

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


def test_evaluations_count_both_halves_of_guidance():
    assert Setting("teacher", 10, 4.0).evaluations == 20
    assert Setting("lora", 4, 1.0).evaluations == 4


def test_rows_are_json_ready():
    row = Row("lora", 4, 1.0, 4, 0.1, 0.2)
    assert row.as_dict() == {
        "name": "lora", "steps": 4, "guidance": 1.0, "evaluations": 4, "paired_error": 0.1, "distance": 0.2,
    }  # fmt: skip
