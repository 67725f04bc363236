"""The LoRA file: tensors under the names every loader maps, a header that says how to sample it, and a self-test.

SD1.5 and SDXL: kohya's names with an `.alpha` beside each pair. SD3: diffusers' `transformer.*.lora_A/B.weight`, where
no form of alpha works everywhere (diffusers refuses files with `.alpha` tensors and reads the `lora_adapter_metadata`
header instead, which ComfyUI does not), so alpha is worked into the weights: both factors are multiplied by
sqrt(alpha / rank), and every loader's default, alpha = rank, is right. A DoRA of any family is written so, with its
magnitudes twice: as PEFT and as ComfyUI mean them (see `dora.py`). Nothing in the file tells the time, so the same run
gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...samplers.phases import count_steps
from ...samplers.recipe import HEADER_KEY
from ...samplers.writing import check_header
from ..config.config import Config
from ..families import Base
from ..families.base import DTYPES
from ..objectives import Objective
from ..system.files import write_tensors
from ..system.machine import package_version
from .dora import by_row, lengths
from .hashes import hashes
from .recipe import recipe_for


def lora_tensors(
    weights: dict[str, Tensor], rank: int, alpha: float, family: type[Base], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Adapter weights by module path -> the file's tensors, under the family's names.

    All modules are applied at alpha / rank, those too whose own rank is another. With this alpha for each module, so
    that each factor of another rank r is times sqrt(r / rank); for a family without, each factor is times
    sqrt(alpha / rank).
    """
    tensors = {}
    for name, weight in weights.items():
        module, part = name.rsplit(".", 1)
        key = family.lora_key(module)
        if family.stores_alpha:
            # of alphas that differ diffusers loses those of attention's keys and values
            tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=dtype)
            r = weight.shape[0 if part == "lora_A" else 1]
            weight = weight if r == rank else weight * (r / rank) ** 0.5
        else:
            weight = weight * (alpha / rank) ** 0.5
        tensors[f"{key}.{family.lora_parts[part]}.weight"] = weight.to(dtype).contiguous()
    return tensors


def dora_tensors(
    weights: dict[str, Tensor], rank: int, alpha: float, base: Base, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A DoRA's weights by module path -> the file's tensors, see `Base.dora_names`; alpha is worked into the factors.

    The magnitudes are fp32 whatever `dtype` is: what they differ by from the lengths in the base is less than 16 bits
    may round.
    """
    tensors = {}
    for module in dict.fromkeys(name.rpartition(".")[0] for name in weights):
        names, frozen = base.dora_names(module), base.network.get_submodule(module).get_base_layer().weight
        a, b = (
            (weights[f"{module}.{part}"] * (alpha / rank) ** 0.5).to(dtype).contiguous()
            for part in ("lora_A", "lora_B")
        )
        tensors |= {names["lora_A"]: a, names["lora_B"]: b}

        # of the factors as they are written, which is what a loader adds up
        w = frozen.detach().cpu().float()
        magnitude, length = weights[f"{module}.lora_magnitude_vector"].float(), lengths(w)
        comes_to = lengths(w + (b.float().flatten(1) @ a.float().flatten(1)).view(w.shape))
        tensors[names["magnitude"]] = magnitude.contiguous()
        scale = base.host_rows(module, magnitude.flatten() * length / comes_to)
        tensors[names["dora_scale"]] = by_row(scale, w).contiguous()
    return tensors


def export(
    path: Path,
    weights: dict[str, Tensor],
    config: Config,
    base: Base,
    step: int,
    samples: int,
    changes: Sequence[dict[str, Any]] = (),
) -> None:
    """Write a LoRA with its whole header, whole or not at all.

    weights: the adapter's, by module path. step, samples: after which update, and how many samples there are. changes:
    of settings on the way, see `agreed_changes`. Raises OSError, and as `check_header`.
    """
    # kohya's hashes are of the tensors with the `ss_*` entries, and ModelSpec's entries name one of them: in this order
    lora = config.lora
    if lora.dora:
        tensors = dora_tensors(weights, lora.rank, lora.alpha, base, DTYPES[lora.dtype])
    else:
        tensors = lora_tensors(weights, lora.rank, lora.alpha, type(base), DTYPES[lora.dtype])
    metadata = _kohya_metadata(config, base, step, samples)
    metadata |= hashes(tensors, metadata)
    metadata |= _modelspec_metadata(config, base, metadata["sshs_model_hash"])
    metadata |= {
        HEADER_KEY: recipe_for(config, base.facts).to_header(),
        **origin(config, step, changes),
    }
    check_header(path.name, metadata, tensors)
    write_tensors(path, tensors, metadata)


def origin(config: Config, step: int, changes: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A header's entries on the run that made a file; changes: of its settings on the way, see `agreed_changes`."""
    entries = {
        "pcm.config": json.dumps(config.what_decides_the_weights()),
        "pcm.step": str(step),
        "pcm.version": package_version(),
    }
    if changes:
        entries["pcm.changes"] = json.dumps(changes)
    return entries


def _kohya_metadata(config: Config, base: Base, step: int, samples: int) -> dict[str, str]:
    """The entries that kohya's trainer writes, by which other programs know a LoRA's base, rank and training."""
    train, resolution = config.train, config.data.resolution
    rank = str(config.lora.rank)
    # where alpha is worked into the weights, the file's alpha is its rank
    alpha = str(config.lora.alpha if base.stores_alpha and not config.lora.dora else float(config.lora.rank))
    return {
        "ss_base_model_version": base.base_version,
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps({"conv_dim": rank, "conv_alpha": alpha}),
        "ss_output_name": config.name,
        "ss_sd_model_name": Path(base.path).name,
        "ss_new_sd_model_hash": base.base_hash,
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_num_train_images": str(samples),
        "ss_tag_frequency": "{}",
        "ss_steps": str(step),
        "ss_learning_rate": str(train.lr),
        "ss_unet_lr": str(train.lr),
        "ss_lr_scheduler": train.lr_schedule,
        "ss_optimizer": train.optimizer,
        "ss_seed": str(train.seed),
        "ss_mixed_precision": {"fp32": "no"}.get(config.base.dtype, config.base.dtype),
        **_loss(config.objective),
        "ss_max_grad_norm": str(train.max_grad_norm),
        "ss_gradient_accumulation_steps": str(train.accumulation),
        "ss_total_batch_size": str(train.batch_size * train.accumulation),
        "ss_training_comment": f"{config.objective.name}{_phases(config)}, phased-consistency",
    }


def _phases(config: Config) -> str:
    phases = config.grid().phases
    return f", {phases} phases" if phases > 1 else ""


def _loss(objective: Objective) -> dict[str, str]:
    """kohya's entries on the distance; an objective without its own is named."""
    if getattr(objective, "metric", "l1") == "l2":
        return {"ss_loss_type": "l2"}
    if not hasattr(objective, "huber_c"):
        return {"ss_loss_type": objective.name}
    return {"ss_loss_type": "huber", "ss_huber_c": str(objective.huber_c)}


def _modelspec_metadata(config: Config, base: Base, tensor_hash: str) -> dict[str, str]:
    """ModelSpec's entries (https://github.com/Stability-AI/ModelSpec), for people who look at the file."""
    recipe = recipe_for(config, base.facts)
    # ModelSpec has no word for the flow's prediction
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}.get(base.prediction)
    return ({"modelspec.prediction_type": prediction} if prediction else {}) | {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": base.architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": config.name,
        "modelspec.description": f"{recipe.method} LoRA for {count_steps(recipe.steps)}, made from {recipe.base_name}.",
        "modelspec.resolution": f"{config.data.resolution}x{config.data.resolution}",
        "modelspec.usage_hint": recipe.usage_hint(),
        "modelspec.tags": f"{recipe.method}, few-step, accelerator",
        "modelspec.hash_sha256": f"0x{tensor_hash}",
    }
