"""Confidence intervals: they hold the truth about as often as they say, and are the same every time."""

import pytest
import torch

from phased_consistency.trainer.evaluation.intervals import (
    Figure,
    counts,
    jackknife,
    mean_of,
    mean_over_pairs,
    ratio_of,
)


def coverage(draw, truth: float, times: int = 400) -> float:
    figures = [draw() for _ in range(times)]
    return sum(figure.low <= truth <= figure.high for figure in figures) / times


def test_a_mean_s_interval_holds_the_truth():
    assert 0.92 <= coverage(lambda: mean_of(torch.randn(20) + 3), 3) <= 0.98
    skewed = lambda: mean_of(torch.randn(64).square())  # noqa: E731
    assert 0.89 <= coverage(skewed, 1) <= 0.98


def test_pictures_of_one_prompt_count_as_one_where_they_are_alike():
    """Two equal pictures of each prompt tell no more than one."""
    values = torch.randn(40, 1)
    assert mean_of(values.expand(40, 2)).half_width == pytest.approx(mean_of(values[:, 0]).half_width)
    assert 0.9 <= coverage(lambda: mean_of(torch.randn(30, 1) + torch.randn(30, 2)), 0) <= 0.98


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_share_s_interval_holds_the_truth(share):
    assert 0.9 <= coverage(lambda: mean_of(torch.rand(50, 2) < share), share) <= 0.995
    alike = lambda: mean_of((torch.rand(50, 1) < share).expand(50, 2))  # noqa: E731
    assert 0.9 <= coverage(alike, share) <= 0.995, "twice the same pictures are no more of them"


def test_a_share_of_all_is_not_certain():
    """Wilson: n / (n + 1.96^2) of n, and nothing above 1."""
    figure = mean_of(torch.ones(64, 2, dtype=torch.bool))
    assert figure == Figure(1.0, pytest.approx(64 / (64 + 1.96**2)), 1.0)
    assert mean_of(torch.zeros(64, dtype=torch.bool)).low == 0


def test_graded_agreement_has_an_interval_as_well():
    figure = mean_of(torch.rand(64, 2))
    assert 0.3 < figure.low < figure.value < figure.high < 0.7


def test_a_ratio_s_noise_that_both_share_is_not_in_its_interval():
    reference = 1 + torch.rand(64)
    assert ratio_of(0.5 * reference, reference) == Figure(*[pytest.approx(0.5)] * 3)
    assert ratio_of(torch.rand(64), reference).half_width > 0.02


def test_a_mean_over_pairs_leaves_out_a_prompt_and_itself():
    """Of a constant it is the constant, with nothing around it, whatever the diagonal."""
    pairs = torch.full((12, 12), 2.0) + torch.diag(torch.full((12,), 1e6))
    assert mean_over_pairs(pairs) == Figure(*[pytest.approx(2.0)] * 3)


def test_a_jackknife_of_a_mean_is_the_mean_s_standard_error():
    values = torch.randn(200).double()
    figure = jackknife(200, lambda kept: values[kept].mean().item())
    expected = 2.09 * values.std().item() / 200**0.5
    assert figure.value == pytest.approx(values.mean().item()) and figure.half_width == pytest.approx(expected, rel=0.4)
    few = lambda: (lambda v: jackknife(40, lambda kept: v[kept].mean().item()))(torch.randn(40))  # noqa: E731
    assert 0.91 <= coverage(few, 0) <= 0.98


def test_bootstrap_samples_are_of_one_size_and_always_the_same():
    drawn = counts(17)
    assert set(drawn.sum(1).tolist()) == {17.0}
    counts.cache_clear()
    assert torch.equal(counts(17), drawn) and drawn.mean().item() == 1


def test_a_figure_in_words():
    assert format(Figure(0.12, 0.108, 0.135), ".3f") == "0.120 [0.108, 0.135]"
    assert format(Figure(0.5, 0.4, 0.6) * 100, ".0f") == "50 [40, 60]"
    assert Figure(1.0, 0.5, 2.0).as_dict() == {"value": 1.0, "low": 0.5, "high": 2.0}
