"""Algebra on LoRA pairs without their full products: sums, best approximations of lower rank, relative errors.

All of it in fp64. ||U D||_F^2 = trace(U^T U D D^T), so a norm takes rank x rank matrices alone; it rounds at about
1e-8 of the norm. The best approximation of a rank is the truncated SVD (Eckart and Young, 1936), which for U D comes
from the small product of their two QR factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .lora import Pair


def concatenated(pairs: Sequence[Pair]) -> Pair:
    """The sum of what several pairs of one module add, exactly: their ranks side by side.

    Where all have one scale, alpha keeps it and the factors stay as they are; else each takes its scale in and alpha is
    the rank. In the widest of their precisions.
    """
    if len(pairs) == 1:
        return pairs[0]
    dtype = widest([pair.down.dtype for pair in pairs])
    rank, scales = sum(pair.rank for pair in pairs), {pair.scale for pair in pairs}
    common = scales.pop() if len(scales) == 1 else None
    downs, ups = [], []
    for pair in pairs:
        factor = 1.0 if common is not None else abs(pair.scale) ** 0.5
        sign = -1.0 if common is None and pair.scale < 0 else 1.0
        downs.append((factor * pair.down.double()).to(dtype))
        ups.append((sign * factor * pair.up.double()).to(dtype))
    return Pair(torch.cat(downs), torch.cat(ups, 1), (1.0 if common is None else common) * rank)


def approximated(pair: Pair, choose: Callable[[Tensor], int], dtype: torch.dtype) -> Pair:
    """The best approximation of what a pair adds, in this precision; its alpha is its rank.

    choose: singular values, falling, at most as many as the rank -> how many to keep.
    """
    q_up, r_up = torch.linalg.qr(pair.up.flatten(1).double())
    q_down, r_down = torch.linalg.qr(pair.down.flatten(1).double().T)
    u, values, vh = torch.linalg.svd(pair.scale * r_up @ r_down.T, full_matrices=False)
    return from_svd(q_up @ u, values, vh @ q_down.T, choose(values), dtype, pair.down.shape[1:])


def from_svd(u: Tensor, values: Tensor, vh: Tensor, rank: int, dtype: torch.dtype, inner: Sequence[int]) -> Pair:
    """The first `rank` parts of u @ diag(values) @ vh as a pair for weights of shape (out, *inner)."""
    root = values[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * vh[:rank]
    return Pair(
        down.reshape(rank, *inner).to(dtype), up.reshape(len(u), rank, *(1,) * (len(inner) - 1)).to(dtype), float(rank)
    )


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


def widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The precision that holds them all."""
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype
