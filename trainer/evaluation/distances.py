"""Figures that compare sets of pictures with the teacher's, in a space of features.

A set is (N, K, D): the features of K pictures, each from its own noise, of each of N prompts; both sets are of the same
prompts, in the same order, and share no noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .intervals import Figure, jackknife, mean_of, mean_over_pairs

SCALE = 1000  # of kernel distances in tables and plots, as usual
# The paper has 3 of thousands. With two pictures of a prompt the second neighbour is of another prompt, and among those
# lies whatever fits the prompt: a sampler that draws one picture of each would not show.
NEIGHBOURS = 1


def kernel_pairs(samples: Tensor, reference: Tensor) -> Tensor:
    """(N, N) terms h_ij of the squared kernel distance of two sets, whose mean over i != j is `kernel_distance`.

    With KID's cubic kernel k(x, y) = (x . y / D + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401, Sec. 4), averaged over
    the noises of both prompts: h_ij = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j).
    """
    across = _kernel(samples, reference)
    return _kernel(samples, samples) + _kernel(reference, reference) - across - across.T


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """(N, N) mean of the kernel over the pictures of each pair of prompts."""
    (n, first, size), second = a.shape, b.shape[1]
    values = (a.flatten(0, 1).double() @ b.flatten(0, 1).double().T / size + 1) ** 3
    return values.view(n, first, n, second).mean((1, 3))


def kernel_distance(samples: Tensor, reference: Tensor) -> Figure:
    """Squared kernel distance of two sets, unbiased: 0 in expectation for equal ones, so it may come below 0.

    MMD^2 as a U-statistic over prompts (Gretton et al. 2012, Lemma 6, Eq. 4), which leaves out every pair of pictures
    of one prompt: these are alike between the sets as within them. The cubic kernel sees the first three moments.
    Raises ValueError for less than two prompts, and for sets that are not of the same.
    """
    if len(samples) < 2 or len(samples) != len(reference):
        raise ValueError(
            f"A kernel distance compares two sets of the same prompts, 2 or more; got {len(samples)} and "
            f"{len(reference)}."
        )
    return mean_over_pairs(kernel_pairs(samples, reference))


def frechet(samples: Tensor, reference: Tensor) -> Figure:
    """`frechet_distance` of all the pictures of two sets."""
    a, b = _coordinates(samples, reference)
    return jackknife(len(a), lambda kept: frechet_distance(a[kept].flatten(0, 1), b[kept].flatten(0, 1)))


def frechet_distance(samples: Tensor, reference: Tensor) -> float:
    """Frechet distance of the Gaussians with the moments of two sets (N, ...), (M, ...); 0 is the same moments.

    |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), squared as usual (FID; Heusel et al. 2017, arXiv
    1706.08500, Eq. 6). With centred sets A, B the last trace is the sum of the singular values of A B^T /
    sqrt((N - 1)(M - 1)), so no square root of a matrix is taken, and sets smaller than their dimensions,
    whose covariances are singular, are exact too. Such sets still give more than their whole populations
    would: compare figures of equal N only. Raises ValueError for a set of less than two.
    """
    if min(len(samples), len(reference)) < 2:
        raise ValueError(f"A Frechet distance needs at least 2 of each; got {len(samples)} and {len(reference)}.")
    a, b = samples.flatten(1).double(), reference.flatten(1).double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b = ((x - mean) / (len(x) - 1) ** 0.5 for x, mean in ((a, mean_a), (b, mean_b)))
    shared = torch.linalg.svdvals(torch.linalg.qr(a, mode="r").R @ torch.linalg.qr(b, mode="r").R.T).sum()
    squared = (mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * shared
    return squared.clamp(min=0).item()


def precision_and_recall(samples: Tensor, reference: Tensor) -> tuple[Figure, Figure]:
    """The share of the samples that lie among the reference's pictures, and of the reference's among the samples.

    Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, Eq. 1 and 2): a picture lies among a
    set's where it is no farther from one of them than that one's nearest neighbour in its own set. Equal sets do not
    get 1: where a prompt's pictures are alike and others far, it is 2/3. Compare with the teacher's own.
    """
    a, b = _coordinates(samples, reference)
    first, second = a.flatten(0, 1), b.flatten(0, 1)
    across = torch.cdist(first, second)
    sizes = a.shape[1], b.shape[1]
    precision = _share_among(across, torch.cdist(second, second), *sizes)
    return precision, _share_among(across.T, torch.cdist(first, first), *sizes[::-1])


def _share_among(distances: Tensor, within: Tensor, each: int, others: int) -> Figure:
    """The share of pictures that lie among a set's, from their distances to it and those within it.

    each, others: pictures of a prompt here and in the set. The interval holds a jackknife's, in which a prompt is
    left out of both, and that of the share alone, since a jackknife of a share of 100 % would be sure of it. It is
    wider than it had to be: neighbours change by leaps.
    """

    def among(prompts: Tensor) -> Tensor:
        rows, columns = ((prompts[:, None] * n + torch.arange(n)).flatten() for n in (each, others))
        nearest = min(NEIGHBOURS, len(columns) - 1)
        radii = within[columns][:, columns].kthvalue(nearest + 1, dim=1).values  # its first neighbour is itself
        return (distances[rows][:, columns] <= radii).any(1)

    number = len(distances) // each
    left_out = jackknife(number, lambda prompts: among(prompts).double().mean().item())
    share = mean_of(among(torch.arange(number)).view(number, each))
    return Figure(share.value, max(0.0, min(share.low, left_out.low)), min(1.0, max(share.high, left_out.high)))


def _coordinates(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets turned into no more dimensions than there are pictures, at the same distances, in double precision."""
    a, b = samples.double(), reference.double()
    if a.shape[2] <= len(a) * (a.shape[1] + b.shape[1]):
        return a, b
    basis = torch.linalg.qr(torch.cat([a.flatten(0, 1), b.flatten(0, 1)]).T).Q
    return a @ basis, b @ basis


def sliced_wasserstein(samples: Tensor, reference: Tensor, directions: int = 512) -> float:
    """Sliced 2-Wasserstein distance of two sets of N latents, on fixed random unit directions; 0 is the same set.

    Root of the mean, over directions and quantiles, of the squared difference of the sorted projections
    (Bonneel et al. 2015, Sec. 3). In the units of one latent element. Biased: two sets of one population are apart
    by what sets of their size are.
    """
    a, b = samples.flatten(1), reference.flatten(1)
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(a.shape[1], directions, generator=generator), dim=0).to(a)
    return ((a @ unit).sort(0).values - (b @ unit).sort(0).values).square().mean().sqrt().item()
