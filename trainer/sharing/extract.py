"""A LoRA from what a tuned checkpoint changed, as `pcm extract` makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..families import Base
from ..families.base import DTYPES
from ..lora.install import load_for_check
from .factors import error_text, from_svd, rounded
from .pairs import Pair, check_out, settled, write_lora

OVERSAMPLING = 16  # random directions beside the rank, and passes, of the randomised SVD (arXiv 0909.4061, Sec. 4.6)
PASSES = 4


@torch.no_grad()
def extract(
    base: str,
    tuned: str,
    out: Path,
    *,
    rank: int,
    dtype: str = "fp16",
    family: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the LoRA of this rank that comes nearest to tuned - base on the family's LoRA targets.

    Modules that did not change are left out. Returns the relative error over the targets (Frobenius, measured on the
    full differences), the worst module's, and `left_out`: the norm of what changed in the network's other weights, as a
    share of all that changed. Text encoders are not compared. base, tuned: as `load_base` takes them, read in fp32.
    Raises ValueError for two models of other shapes, no change at all, a bad rank or dtype, and what `load_base`,
    `check_out` and `write_lora` raise.
    """
    if rank < 1:
        raise ValueError(f"--rank is {rank}; expected at least 1.")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; available: {', '.join(DTYPES)}.")
    check_out(out, [Path(base), Path(tuned)], overwrite)
    first, second = (load_for_check(path, family=family) for path in (base, tuned))
    targets, others = _weights(first, second)
    pairs, wrong, size, worst = {}, 0.0, 0.0, (0.0, "")
    for name, (old, new) in targets.items():
        delta = new - old
        if not (whole := delta.square().sum().item()):
            continue
        nearest = settled({name: _pair(delta, rank)}, type(first), float(rank))[name]
        pair = rounded(nearest, DTYPES[dtype])
        found = pair.scale * pair.up.float().flatten(1) @ pair.down.float().flatten(1)
        off = (delta.flatten(1) - found).square().sum().item()
        wrong, size, worst = wrong + off, size + whole, max(worst, ((off / whole) ** 0.5, name))
        pairs[f"{first.component}.{name}"] = pair
    if not pairs:
        raise ValueError(f"{tuned} has the weights of {base} in every module that a LoRA can change. Nothing to write.")
    write_lora(out, type(first), pairs, _metadata(first, second, out))
    told = {"error": (wrong / size) ** 0.5, "worst_module": worst[1], "worst_error": worst[0]}
    left_out = (others / (others + size)) ** 0.5
    counts = f"{len(pairs)} modules of rank {rank} at most, {len(targets) - len(pairs)} unchanged"
    text = f"{out}: {first.title}, {counts}; {error_text(told)}"
    if left_out:
        text += f". Changes in other weights, {left_out:.2g} of all by norm, are in no LoRA"
    facts = {"out": str(out), "family": first.name, "modules": len(pairs), "unchanged": len(targets) - len(pairs)}
    return facts | told | {"left_out": left_out, "text": text}


def _weights(first: Base, second: Base) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """(module -> its weight before and after, for each LoRA target; the squared norm of all other changes)."""
    if type(first) is not type(second):
        raise ValueError(f"{first.path} is {first.title}, {second.path} is {second.title}. Take two of one family.")
    old, new = (dict(base.network.named_parameters()) for base in (first, second))
    shapes = [{name: weight.shape for name, weight in weights.items()} for weights in (old, new)]
    if other := sorted(name for name in old.keys() | new.keys() if shapes[0].get(name) != shapes[1].get(name)):
        raise ValueError(f"{first.path} and {second.path} have other networks: they differ in {other[0]}.")
    targets, others = {}, 0.0
    for name, weight in new.items():
        module = name.removesuffix(".weight")
        if module != name and f".{module}".endswith(tuple(f".{target}" for target in first.lora_targets)):
            targets[module] = old[name], weight
        else:
            others += (weight - old[name]).square().sum().item()
    return targets, others


def _pair(delta: Tensor, rank: int) -> Pair:
    """The nearest pair of this rank; found by a randomised SVD, which is a whole one for narrow modules."""
    matrix = delta.flatten(1)
    rank = min(rank, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, values, v = torch.svd_lowrank(matrix, min(rank + OVERSAMPLING, *matrix.shape), PASSES)
    return from_svd(u, values, v.T, rank, delta.shape[1:])


def _metadata(first: Base, second: Base, out: Path) -> dict[str, str]:
    return {
        "ss_output_name": out.stem,
        "ss_base_model_version": first.base_version,
        "ss_sd_model_name": Path(first.path).name,
        "ss_new_sd_model_hash": first.base_hash,
        "ss_tag_frequency": "{}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": first.architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": out.stem,
        "modelspec.description": f"What {Path(second.path).name} changes in {Path(first.path).name}, by SVD.",
        "modelspec.resolution": f"{first.default_resolution}x{first.default_resolution}",
    }
