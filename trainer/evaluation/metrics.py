"""Figures of single pictures: against another setting's from the same noise, and another noise's of the same prompt.

A picture is one row of a tensor (N, ...); norms are over the whole row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def paired_errors(samples: Tensor, reference: Tensor) -> Tensor:
    """(N,) |sample - reference| / |reference| of each pair, norms over a whole latent; 0 is the same picture."""
    return (samples - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


def paired_error(samples: Tensor, reference: Tensor) -> float:
    """Mean of `paired_errors`."""
    return paired_errors(samples, reference).mean().item()


def agreements(change: Tensor, reference: Tensor) -> Tensor:
    """(N,) cosine of each two changes: 1 is the same direction, 0 none in common."""
    return torch.cosine_similarity(change.flatten(1), reference.flatten(1))


def diversities(samples: Tensor) -> Tensor:
    """(P,) how much the K pictures of each prompt differ, from samples (P, K, ...): 0 where noise decides nothing.

    Root mean square difference of one element between two of the K, averaged over pairs.
    """
    flat = samples.flatten(2)
    first, second = torch.triu_indices(flat.shape[1], flat.shape[1], offset=1)
    return (flat[:, first] - flat[:, second]).square().mean(2).sqrt().mean(1)


def consistency(by_steps: dict[int, Tensor]) -> dict[int, dict[int, Tensor]]:
    """Steps -> more steps -> `paired_errors` of the pictures with fewer against those with more, from the same noise.

    by_steps: steps -> latents (N, ...). A model that lands on one clean picture, however it gets there, has 0.
    """
    steps = sorted(by_steps)
    return {n: {m: paired_errors(by_steps[n], by_steps[m]) for m in steps if m > n} for n in steps[:-1]}
