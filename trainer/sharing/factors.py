"""Algebra on LoRA pairs without their full products: sums, best approximations of lower rank, relative errors.

All of it in fp64. ||U D||_F^2 = trace(U^T U D D^T), so a norm takes rank x rank matrices alone; it rounds at about
1e-8 of the norm. The best approximation of a rank is the truncated SVD (Eckart and Young, 1936), which for U D comes
from the small product of their two QR factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .pairs import Pair


def concatenated(pairs: Sequence[Pair]) -> Pair:
    """The sum of what several pairs of one module add: their ranks side by side, in fp32 or wider.

    Where all have one scale, alpha keeps it and the factors stay as they are; else each takes its scale in and alpha is
    the rank.
    """
    if len(pairs) == 1:
        return pairs[0]
    dtype = torch.promote_types(widest(pairs), torch.float32)
    rank, scales = sum(pair.rank for pair in pairs), {pair.scale for pair in pairs}
    if len(scales) > 1:
        pairs, scales = [_scaled(pair, dtype) for pair in pairs], {1.0}
    downs, ups = [pair.down.to(dtype) for pair in pairs], [pair.up.to(dtype) for pair in pairs]
    return Pair(torch.cat(downs), torch.cat(ups, 1), scales.pop() * rank)


def _scaled(pair: Pair, dtype: torch.dtype) -> Pair:
    """A pair with its scale in its factors, and these of about one size: fp16 holds small ones coarsely."""
    down, up = pair.down.to(dtype), pair.up.to(dtype)
    sizes = down.norm().item(), up.norm().item()
    # a power of two rounds nothing
    balance = 2.0 ** round(math.log2(sizes[0] / sizes[1]) / 2) if all(sizes) else 1.0
    factor = abs(pair.scale) ** 0.5
    return Pair(down * (factor / balance), up * (math.copysign(factor, pair.scale) * balance), float(pair.rank))


def approximated(pair: Pair, choose: Callable[[Tensor], int]) -> Pair:
    """The best approximation of what a pair adds, in fp64; its alpha is its rank.

    choose: singular values, falling, at most as many as the rank -> how many to keep.
    """
    q_up, r_up = torch.linalg.qr(pair.up.flatten(1).double())
    q_down, r_down = torch.linalg.qr(pair.down.flatten(1).double().T)
    u, values, vh = torch.linalg.svd(pair.scale * r_up @ r_down.T, full_matrices=False)
    return from_svd(q_up @ u, values, vh @ q_down.T, choose(values), pair.down.shape[1:])


def from_svd(u: Tensor, values: Tensor, vh: Tensor, rank: int, inner: Sequence[int]) -> Pair:
    """The first `rank` parts of u @ diag(values) @ vh as a pair for weights of shape (out, *inner)."""
    root = values[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * vh[:rank]
    return Pair(down.reshape(rank, *inner), up.reshape(len(u), rank, *(1,) * (len(inner) - 1)), float(rank))


def rounded(pair: Pair, dtype: torch.dtype) -> Pair:
    """A pair in this precision."""
    return Pair(pair.down.to(dtype), pair.up.to(dtype), pair.alpha)


def rank_for_error(values: Tensor, error: float) -> int:
    """The fewest singular values (at least one) whose rest is at most this share of the whole, as norms."""
    tail = values.square().flip(0).cumsum(0).flip(0)  # [i]: of i and all after it
    return max(1, int((tail > error**2 * tail[0]).sum()))


def energy(pairs: Sequence[Pair]) -> float:
    """||sum of what these pairs of one module add||_F^2."""
    up = torch.cat([pair.scale * pair.up.flatten(1).double() for pair in pairs], 1)
    down = torch.cat([pair.down.flatten(1).double() for pair in pairs])
    return max(0.0, ((up.T @ up) * (down @ down.T)).sum().item())


def errors(meant: Mapping[str, Sequence[Pair]], found: Mapping[str, Pair]) -> dict[str, Any]:
    """How far the pairs as stored are from the sums meant, as |found - meant| / |meant| (Frobenius).

    Returns {"error": of all modules together, "worst_module", "worst_error"}.
    """
    wrong, size, worst = 0.0, 0.0, (0.0, "")
    for name, sum_of in meant.items():
        off, whole = energy([*sum_of, replace(found[name], alpha=-found[name].alpha)]), energy(sum_of)
        wrong, size = wrong + off, size + whole
        worst = max(worst, ((off / whole) ** 0.5 if whole else 0.0, name))
    return {"error": (wrong / size) ** 0.5 if size else 0.0, "worst_module": worst[1], "worst_error": worst[0]}


def error_text(found: Mapping[str, Any]) -> str:
    """`errors` for people."""
    return f"relative error {found['error']:.2g}, at worst {found['worst_error']:.2g} ({found['worst_module']})"


def widest(pairs: Sequence[Pair]) -> torch.dtype:
    """The precision that holds the factors of all of them."""
    return reduce(torch.promote_types, (factor.dtype for pair in pairs for factor in (pair.down, pair.up)))
