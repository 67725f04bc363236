"""Figures that compare pictures, or their features: pairs, sets, and pictures of one prompt from several noises.

A picture or its feature is one row of a tensor (N, ...); norms are over the whole row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def paired_error(samples: Tensor, reference: Tensor) -> float:
    """Mean over samples of |samples - reference| / |reference|, norms over a whole latent; 0 is the same picture."""
    return ((samples - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)).mean().item()


def agreement(change: Tensor, reference: Tensor) -> float:
    """Mean over samples of the cosine between two changes (N, ...): 1 is the same direction, 0 none in common."""
    return torch.cosine_similarity(change.flatten(1), reference.flatten(1)).mean().item()


def sliced_wasserstein(samples: Tensor, reference: Tensor, directions: int = 512) -> float:
    """Sliced 2-Wasserstein distance of two sets of N latents, on fixed random unit directions; 0 is the same set.

    Root of the mean, over directions and quantiles, of the squared difference of the sorted projections
    (Bonneel et al. 2015, Sec. 3). In the units of one latent element.
    """
    a, b = samples.flatten(1), reference.flatten(1)
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(a.shape[1], directions, generator=generator), dim=0).to(a)
    return ((a @ unit).sort(0).values - (b @ unit).sort(0).values).square().mean().sqrt().item()


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


def diversity(samples: Tensor) -> float:
    """How much the K pictures of each of P prompts differ, from samples (P, K, ...): 0 where noise decides nothing.

    Root mean square difference of one element between two of the K, averaged over pairs and prompts.
    """
    flat = samples.flatten(2)
    first, second = torch.triu_indices(flat.shape[1], flat.shape[1], offset=1)
    return (flat[:, first] - flat[:, second]).square().mean(2).sqrt().mean().item()


def consistency(by_steps: dict[int, Tensor]) -> dict[int, dict[int, float]]:
    """Steps -> more steps -> `paired_error` of the pictures with fewer against those with more, from the same noise.

    by_steps: steps -> latents (N, ...). A model that lands on one clean picture, however it gets there, has 0.
    """
    steps = sorted(by_steps)
    return {n: {m: paired_error(by_steps[n], by_steps[m]) for m in steps if m > n} for n in steps[:-1]}
