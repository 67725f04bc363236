"""`pcm extract`: a LoRA of what a tuned checkpoint changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..families import Base
from ..families.base import DTYPES
from ..lora.install import load_for_check
from ..lora.pair import Pair
from .factors import error_text, from_svd, rounded
from .pairs import check_out, settled, write_lora

# Random directions beside the rank, and passes, of the randomised SVD (arXiv 0909.4061, Sec. 4.6).
OVERSAMPLING = 16
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
    """Write the LoRA of this rank that comes nearest to the difference tuned - base on the family's LoRA targets.

    base, tuned: as `load_base` takes them, read in fp32. Modules that did not change are left out. Text
    encoders are not compared. Returns figures, and a sentence on them as "text": the relative error over the
    targets (Frobenius, measured on the full differences), the worst module's, and `left_out`, the norm of the
    changes in the network's other weights as a share of all changes.
    Raises ValueError for two models of other shapes, no change at all, a bad rank or dtype, and what
    `load_base`, `check_out` and `write_lora` raise.
    """
    if rank < 1:
        raise ValueError(f"--rank is {rank}; expected at least 1.")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; available: {', '.join(DTYPES)}.")
    check_out(out, [Path(base), Path(tuned)], overwrite)
    before, after = (load_for_check(path, family=family) for path in (base, tuned))
    targets, others = _weights(before, after)

    pairs: dict[str, Pair] = {}
    errors = changed = 0.0  # squared Frobenius norms over all targets
    worst = (0.0, "")
    for name, (old, new) in targets.items():
        delta = new - old
        if not (energy := delta.square().sum().item()):
            continue
        nearest = settled({name: _pair(delta, rank)}, type(before), float(rank))[name]
        pair = rounded(nearest, DTYPES[dtype])
        product = pair.scale * pair.up.float().flatten(1) @ pair.down.float().flatten(1)
        error = (delta.flatten(1) - product).square().sum().item()
        errors += error
        changed += energy
        worst = max(worst, ((error / energy) ** 0.5, name))
        pairs[f"{before.component}.{name}"] = pair
    if not pairs:
        raise ValueError(f"{tuned} has the weights of {base} in every module that a LoRA can change. Nothing to write.")

    write_lora(out, type(before), pairs, _metadata(before, after, out))
    figures = {"error": (errors / changed) ** 0.5, "worst_module": worst[1], "worst_error": worst[0]}
    left_out = (others / (others + changed)) ** 0.5
    counts = f"{len(pairs)} modules of rank {rank} at most, {len(targets) - len(pairs)} unchanged"
    text = f"{out}: {before.title}, {counts}; {error_text(figures)}"
    if left_out:
        text += f". Changes in other weights, {left_out:.2g} of all by norm, are in no LoRA"
    facts = {"out": str(out), "family": before.name, "modules": len(pairs), "unchanged": len(targets) - len(pairs)}
    return facts | figures | {"left_out": left_out, "text": text}


def _weights(base: Base, tuned: Base) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Compare two networks of one family.

    Returns (module -> its weight before and after, for each LoRA target; the squared norm of all other
    changes). Raises ValueError for two families, or networks of other shapes.
    """
    if type(base) is not type(tuned):
        raise ValueError(f"{base.path} is {base.title}, {tuned.path} is {tuned.title}. Take two of one family.")
    old = dict(base.network.named_parameters())
    new = dict(tuned.network.named_parameters())
    shapes = [{name: weight.shape for name, weight in weights.items()} for weights in (old, new)]
    if other := sorted(name for name in old.keys() | new.keys() if shapes[0].get(name) != shapes[1].get(name)):
        raise ValueError(f"{base.path} and {tuned.path} have other networks: they differ in {other[0]}.")

    targets = {}
    others = 0.0
    for name, weight in new.items():
        module = name.removesuffix(".weight")
        if module != name and f".{module}".endswith(tuple(f".{target}" for target in base.lora_targets)):
            targets[module] = old[name], weight
        else:
            others += (weight - old[name]).square().sum().item()
    return targets, others


def _pair(delta: Tensor, rank: int) -> Pair:
    """The nearest pair of this rank, by a randomised SVD; for modules that are narrow enough it is the whole one."""
    matrix = delta.flatten(1)
    rank = min(rank, *matrix.shape)
    with torch.random.fork_rng(devices=[]):  # the same directions each time: equal models give equal files
        torch.manual_seed(0)
        u, values, v = torch.svd_lowrank(matrix, min(rank + OVERSAMPLING, *matrix.shape), PASSES)
    return from_svd(u, values, v.T, rank, delta.shape[1:])


def _metadata(base: Base, tuned: Base, out: Path) -> dict[str, str]:
    """The header: kohya's entries, which most managers read, and ModelSpec's."""
    return {
        "ss_output_name": out.stem,
        "ss_base_model_version": base.base_version,
        "ss_sd_model_name": Path(base.path).name,
        "ss_new_sd_model_hash": base.base_hash,
        "ss_tag_frequency": "{}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": base.architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": out.stem,
        "modelspec.description": f"What {Path(tuned.path).name} changes in {Path(base.path).name}, by SVD.",
        "modelspec.resolution": f"{base.default_resolution}x{base.default_resolution}",
    }
