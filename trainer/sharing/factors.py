"""Algebra on LoRA pairs without their full products: sums, best approximations of lower rank, relative errors.

A pair adds U D to a weight: U (out x rank) is its up, D (rank x in) its down. As ||U D||_F^2 = trace(U^T U D
D^T), a norm takes rank x rank matrices alone. It is computed in fp64, where it rounds at about 1e-8 of the
norm: the errors that are measured with it are those of fp16, at about 1e-4. The best approximation of a rank
is the truncated SVD (Eckart and Young, 1936), which for U D comes from the small product of their two QR
factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..lora.pair import Pair, check_sums, in_16_bits


def concatenated(pairs: Sequence[Pair]) -> Pair:
    """The sum of several pairs of one module, exactly: their ranks side by side, in fp32 or wider.

    Where all have one scale, alpha keeps it and the factors stay as they are; else each pair's factors take
    its scale in, and alpha is the rank.
    """
    check_sums(pairs)
    if len(pairs) == 1:
        return pairs[0]
    dtype = torch.promote_types(widest(pairs), torch.float32)
    rank = sum(pair.rank for pair in pairs)
    scales = {pair.scale for pair in pairs}
    if len(scales) > 1:
        pairs = [_scaled(pair, dtype) for pair in pairs]
        scales = {1.0}
    down = torch.cat([pair.down.to(dtype) for pair in pairs])
    up = torch.cat([pair.up.to(dtype) for pair in pairs], 1)
    return Pair(down, up, scales.pop() * rank)


def _scaled(pair: Pair, dtype: torch.dtype) -> Pair:
    """A pair with its scale in its factors, and these of about one size: fp16 holds small numbers coarsely."""
    down, up = pair.down.to(dtype), pair.up.to(dtype)
    down_norm, up_norm = down.norm().item(), up.norm().item()
    # a power of two, which rounds nothing
    balance = 2.0 ** round(math.log2(down_norm / up_norm) / 2) if down_norm and up_norm else 1.0
    factor = abs(pair.scale) ** 0.5
    return Pair(down * (factor / balance), up * (math.copysign(factor, pair.scale) * balance), float(pair.rank))


def approximated(pair: Pair, choose: Callable[[Tensor], int]) -> Pair:
    """The best approximation of lower rank of what a pair adds, in fp64; its alpha is its rank.

    choose: from the singular values, falling and at most as many as the rank, how many to keep.
    """
    check_sums([pair])
    q_up, r_up = torch.linalg.qr(pair.up.flatten(1).double())
    q_down, r_down = torch.linalg.qr(pair.down.flatten(1).double().T)
    u, values, vh = torch.linalg.svd(pair.scale * r_up @ r_down.T, full_matrices=False)
    return from_svd(q_up @ u, values, vh @ q_down.T, choose(values), pair.down.shape[1:])


def from_svd(u: Tensor, values: Tensor, vh: Tensor, rank: int, inner: Sequence[int]) -> Pair:
    """The first `rank` parts of u @ diag(values) @ vh as a pair for a weight of shape (out, *inner).

    Both factors take the roots of the values, so that they are of one size.
    """
    root = values[:rank].sqrt()
    up = u[:, :rank] * root
    down = root[:, None] * vh[:rank]
    return Pair(down.reshape(rank, *inner), up.reshape(len(u), rank, *(1,) * (len(inner) - 1)), float(rank))


def rounded(pair: Pair, dtype: torch.dtype) -> Pair:
    """The pair with its factors in this precision."""
    return replace(pair, down=pair.down.to(dtype), up=pair.up.to(dtype))


def rank_for_error(values: Tensor, error: float) -> int:
    """The fewest singular values (at least one) whose rest is at most this share of the whole, as norms."""
    tail = values.square().flip(0).cumsum(0).flip(0)  # at i the energy of value i and of all after it
    return max(1, int((tail > error**2 * tail[0]).sum()))


def energy(pairs: Sequence[Pair]) -> float:
    """||U D||_F^2 of the sum of what these pairs of one module add."""
    check_sums(pairs)
    up = torch.cat([pair.scale * pair.up.flatten(1).double() for pair in pairs], 1)
    down = torch.cat([pair.down.flatten(1).double() for pair in pairs])
    # rounding may make the energy of what cancels a little negative
    return max(0.0, ((up.T @ up) * (down @ down.T)).sum().item())


def errors(exact: Mapping[str, Sequence[Pair]], stored: Mapping[str, Pair]) -> dict[str, Any]:
    """How far the pairs as stored are from the exact sums of several, as |stored - exact| / |exact| (Frobenius).

    Returns {"error": of all modules together, "worst_module", "worst_error"}.
    """
    wrong_in_all = size_of_all = 0.0
    worst = (0.0, "")
    for name, terms in exact.items():
        error = energy([*terms, replace(stored[name], alpha=-stored[name].alpha)])
        size = energy(terms)
        wrong_in_all += error
        size_of_all += size
        worst = max(worst, ((error / size) ** 0.5 if size else 0.0, name))
    return {
        "error": (wrong_in_all / size_of_all) ** 0.5 if size_of_all else 0.0,
        "worst_module": worst[1],
        "worst_error": worst[0],
    }


def error_text(figures: Mapping[str, Any]) -> str:
    """The result of `errors` as a clause for people."""
    return f"relative error {figures['error']:.2g}, at worst {figures['worst_error']:.2g} ({figures['worst_module']})"


def widest(pairs: Sequence[Pair]) -> torch.dtype:
    """The precision that holds the factors of all these pairs, of 16 bits or more."""
    factors = (factor for pair in pairs for factor in (pair.down, pair.up))
    return reduce(torch.promote_types, (in_16_bits(factor.dtype) for factor in factors))
