"""Figures that compare sets, on sets whose distances are known in closed form, and what they see of a lost variety."""

import pytest
import torch

from phased_consistency.trainer.evaluation.distances import (
    frechet,
    frechet_distance,
    kernel_distance,
    kernel_pairs,
    precision_and_recall,
    sliced_wasserstein,
)
from phased_consistency.trainer.evaluation.metrics import diversities

SHAPE = (64, 4, 8, 8)
SIZE = 4 * 8 * 8


@pytest.fixture
def latents():
    return torch.randn(SHAPE)


def moments(mean: float, variance: float, size: int):
    """The first three moment tensors of a Gaussian of so many dimensions, the same in each."""
    middle, one = torch.full((size,), mean).double(), torch.eye(size).double()
    second = torch.outer(middle, middle) + variance * one
    across = sum(torch.einsum(f"{term}->ijk", middle, one) for term in ("i,jk", "j,ik", "k,ij"))
    return middle, second, torch.einsum("i,j,k->ijk", middle, middle, middle) + variance * across


def true_kernel_distance(size: int, shift: float, first: float, second: float) -> float:
    """MMD^2 under (x . y / D + 1)^3 = sum of |difference of the p-th moments|^2 (3, 3, 1)_p / D^p over p = 1 to 3."""
    pairs = zip(moments(shift, first, size), moments(0.0, second, size), strict=True)
    return sum(
        (factor * (a - b).square().sum() / size**p).item()
        for p, factor, (a, b) in zip((1, 2, 3), (3, 3, 1), pairs, strict=True)
    )


def drawn(number: int, size: int = 64, shift: float = 0.0, spread: float = 1.0, noises: int = 2):
    """Two sets of pictures of the same prompts: from N(prompt + shift, spread^2) and from N(prompt, 1), prompts from
    N(0, 1)."""
    prompts = torch.randn(number, 1, size).double()
    noise = torch.randn(2, number, noises, size).double()
    return prompts + shift + spread * noise[0], prompts + noise[1]


SHIFTED, WIDER, EQUAL = {"shift": 0.3}, {"spread": 1.5}, {}


def truth(shift: float = 0.0, spread: float = 1.0, size: int = 64) -> float:
    return true_kernel_distance(size, shift, 1 + spread**2, 2.0)


def test_the_moment_tensors_are_those_of_the_kernel():
    """In one dimension: E (xy + 1)^3 over independent x, y by its own moments, and once by two million draws."""
    assert true_kernel_distance(1, 0.5, 1.0, 1.0) == pytest.approx(3 * 0.25 + 3 * 0.25**2 + (0.125 + 1.5) ** 2)
    x, y = torch.randn(2, 2_000_000).double() + 0.5, torch.randn(2, 2_000_000).double()
    kernel = lambda a, b: ((a * b + 1) ** 3).mean()  # noqa: E731
    drawn_once = kernel(*x) + kernel(*y) - kernel(x[0], y[0]) - kernel(x[1], y[1])
    assert drawn_once.item() == pytest.approx(true_kernel_distance(1, 0.5, 1.0, 1.0), abs=0.1)


@pytest.mark.parametrize("change", [EQUAL, SHIFTED, WIDER])
def test_the_kernel_distance_is_unbiased_however_few_the_pictures(change):
    """The mean of 400 sets of eight prompts, within three of its standard errors of the truth."""
    values = torch.tensor([kernel_pairs_mean(*drawn(8, **change)) for _ in range(400)])
    assert abs(values.mean() - truth(**change)) < 3 * values.std() / 400**0.5
    assert change or (values < 0).float().mean() > 0.3, "equal sets come out below 0 as well"


def kernel_pairs_mean(samples, reference) -> float:
    pairs, n = kernel_pairs(samples, reference), len(samples)
    return ((pairs.sum() - pairs.diagonal().sum()) / (n * (n - 1))).item()


def test_pictures_of_one_prompt_do_not_bias_it():
    """Were pairs of one prompt not left out, two equal sets would seem nearer than equal."""
    with_all = [kernel_pairs(*drawn(8)).mean().item() for _ in range(100)]
    assert kernel_distance(*drawn(8)).value == pytest.approx(0, abs=0.5)
    assert sum(with_all) / 100 > 0.05, "the diagonal is within the sets and between them, and not 0 in the mean"


@pytest.mark.parametrize(("change", "least"), [(EQUAL, 0.95), (SHIFTED, 0.88), (WIDER, 0.88)])
def test_the_kernel_distance_s_interval_holds_the_truth(change, least):
    figures = [kernel_distance(*drawn(32, **change)) for _ in range(60)]
    held = [figure.low <= truth(**change) <= figure.high for figure in figures]
    assert sum(held) / 60 >= least
    widths, values = torch.tensor([figure.half_width for figure in figures]), [figure.value for figure in figures]
    assert widths.mean() < 2 * 1.96 * torch.tensor(values).std(), "and it is not so by being as wide as a barn"


def test_the_interval_shrinks_with_the_pictures():
    few, many = (kernel_distance(*drawn(n)).half_width for n in (16, 128))
    assert many == pytest.approx(few / 8, rel=0.5), "as 1 / number where the sets are equal"


def test_a_kernel_distance_needs_sets_of_the_same_prompts():
    first, second = drawn(4)
    with pytest.raises(ValueError, match="two sets of the same prompts, 2 or more; got 3 and 4"):
        kernel_distance(first[:3], second)
    with pytest.raises(ValueError, match="got 1 and 1"):
        kernel_distance(first[:1], second[:1])


def test_precision_and_recall_of_equal_disjoint_and_nested_sets():
    """A set twice is all within itself; far apart nothing is; a narrow set is within a wide one and not around it."""
    wide = torch.randn(100, 2, 3).double()
    assert [figure.value for figure in precision_and_recall(wide, wide)] == [1, 1]
    assert [figure.value for figure in precision_and_recall(wide + 100, wide)] == [0, 0]
    precision, recall = precision_and_recall(0.3 * torch.randn(100, 2, 3).double(), wide)
    assert precision.low > recall.high
    precision, recall = precision_and_recall(3 * torch.randn(100, 2, 3).double(), wide)
    assert precision.value < 0.4 < 0.6 < recall.value


def test_a_share_of_all_or_none_is_not_certain():
    wide = torch.randn(20, 2, 3).double()
    everything, _ = precision_and_recall(wide, wide)
    nothing, _ = precision_and_recall(wide + 100, wide)
    assert 0.7 < everything.low < 1 == everything.high and 0 == nothing.low < nothing.high < 0.3


def test_a_collapsed_sampler_shows_in_recall_and_diversity_and_a_perfect_one_is_at_the_floor():
    """One picture a prompt, itself a perfect one: precision cannot see it."""
    prompts = torch.randn(128, 1, 6).double()
    reference, floor, perfect = (prompts + torch.randn(128, 2, 6) for _ in range(3))
    collapsed = (prompts + torch.randn(128, 1, 6)).expand(128, 2, 6)
    figures = {n: precision_and_recall(s, reference) for n, s in zip("fpc", (floor, perfect, collapsed), strict=True)}
    for kind in (0, 1):
        assert figures["p"][kind].low <= figures["f"][kind].value <= figures["p"][kind].high
    assert figures["c"][0].value == pytest.approx(figures["f"][0].value, abs=0.1)
    assert figures["c"][1].high < 0.1 < 0.5 < figures["f"][1].low
    assert diversities(collapsed).max() == 0 and diversities(perfect).mean() == pytest.approx(2**0.5, rel=0.1)
    middle = prompts.expand(128, 2, 6)  # the mean picture of each prompt
    precision, recall = precision_and_recall(middle, reference)
    assert precision.value > figures["f"][0].value + 0.1 and recall.high < 0.1, "good pictures, and always the same"


def test_equal_sets_of_prompts_that_are_far_apart():
    """A third picture is nearer to one of two than these to each other, in two of three orders."""
    prompts = 100 * torch.randn(300, 1, 6).double()
    first, second = (prompts + torch.randn(300, 2, 6) for _ in range(2))
    assert [figure.value for figure in precision_and_recall(first, second)] == pytest.approx([2 / 3] * 2, abs=0.06)


def test_neighbours_are_among_the_others_of_the_set():
    """On a line 0, 1, 2, 3 a point's neighbour is 1 away, so all within [-1, 4] lie among them."""
    line = torch.arange(4.0).double().view(4, 1, 1)
    points = torch.tensor([-1.5, -1, 0.5, 4, 4.5]).double().view(5, 1, 1)
    tries = [precision_and_recall(point.expand(4, 1, 1), line)[0].value for point in points]
    assert tries == [0, 1, 1, 1, 0]


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


def test_frechet_is_of_all_pictures_with_an_interval_around_what_such_sets_give():
    """100 sets of 16 prompts in 64 dimensions: the mean, bias included, is within nearly all of the intervals."""
    samples, reference = drawn(16)
    expected = frechet_distance(samples.flatten(0, 1), reference.flatten(0, 1))
    assert frechet(samples, reference).value == pytest.approx(expected, rel=1e-9)
    figures = [frechet(*drawn(16)) for _ in range(25)]
    middle = sum(figure.value for figure in figures) / 25
    assert middle > 1 and sum(figure.low <= middle <= figure.high for figure in figures) >= 22
