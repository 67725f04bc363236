"""The LoRA file: tensors under the names every loader maps, a header that says how to sample it, and a self-test.

SD1.5 and SDXL: kohya's names with an `.alpha` beside each pair. SD3: diffusers' `transformer.*.lora_A/B.weight`, where
no form of alpha works everywhere (diffusers refuses files with `.alpha` tensors and reads the `lora_adapter_metadata`
header instead, which ComfyUI does not), so alpha is worked into the weights: both factors are multiplied by
sqrt(alpha / rank), and every loader's default, alpha = rank, is right. Nothing in the file tells the time, so the same
run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..samplers import Recipe, recipe_for_file
from ..samplers.lora_file import read_header
from ..samplers.phases import count_steps
from ..samplers.recipe import HEADER_KEY
from ..samplers.texts import brief
from ..samplers.writing import check_header
from .adapter import NAME, Adapter
from .checkpoint import write_tensors
from .config import Config
from .families import Base
from .objectives import Objective
from .objectives.objective import guidance_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EMPTY_HASH = hashlib.sha256().hexdigest()


def recipe_for(config: Config, base: Base) -> Recipe:
    """How a LoRA of this run must be sampled.

    Of the base it asks the family's name, prediction, zero_terminal_snr, a flow's schedule, path and base_hash.
    Raises ValueError for settings that no sampler has.
    """
    return Recipe(
        family=base.name,
        prediction=base.prediction,
        zero_terminal_snr=base.zero_terminal_snr,
        shift=base.schedule.shift if base.prediction == "flow" else None,
        base_name=Path(base.path).name,
        base_hash=base.base_hash,
        **(config.objective.sampling() | _guidance_without_teacher(config)),
    )


def _guidance_without_teacher(config: Config) -> dict[str, Any]:
    """A recipe's fields on guidance where no teacher's step decides them: those of the LoRA that the run goes on from,
    else those of the teacher's pictures, if these are what it learns from."""
    data, phases = config.data, config.grid().phases
    if config.objective.needs_teacher:
        return {}
    if config.lora.init is None:
        return guidance_of(not data.has_pictures and data.teacher_guidance > 1, phases)
    header = read_header(Path(config.lora.init))
    recipe = recipe_for_file(str(header.path), header.metadata, header.family)
    baked = guidance_of(True, phases)
    return {field: getattr(recipe, field) for field in baked} if recipe else baked


def lora_tensors(weights: dict[str, Tensor], alpha: float, family: type[Base], dtype: torch.dtype) -> dict[str, Tensor]:
    """Adapter weights by module path -> the file's tensors, under the family's names.

    With one `.alpha` a module, or for a family without, each factor times sqrt(alpha / rank).
    """
    tensors = {}
    for name, weight in weights.items():
        module, part = name.rsplit(".", 1)
        key = family.lora_key(module)
        if family.stores_alpha:
            tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=dtype)
        else:
            rank = weight.shape[0 if part == "lora_A" else 1]
            weight = weight * (alpha / rank) ** 0.5
        tensors[f"{key}.{family.lora_parts[part]}.weight"] = weight.to(dtype).contiguous()
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
    """Write a LoRA with its whole header, atomically. Raises OSError, and as `check_header`."""
    tensors = lora_tensors(weights, config.lora.alpha, type(base), DTYPES[config.lora.dtype])
    metadata = _kohya_metadata(config, base, step, samples)
    metadata |= hashes(tensors, metadata)
    metadata |= _modelspec_metadata(config, base, metadata["sshs_model_hash"])
    metadata |= {
        HEADER_KEY: recipe_for(config, base).to_header(),
        **origin(config, step, changes),
    }
    check_header(path.name, metadata, tensors)
    write_tensors(path, tensors, metadata)


def origin(config: Config, step: int, changes: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A header's entries on the run that made a file; changes: of its settings on the way, see `agreed_changes`."""
    told = {"config": json.dumps(config.what_decides_the_weights()), "step": str(step), "version": package_version()}
    if changes:
        told["changes"] = json.dumps(changes)
    return {f"pcm.{key}": value for key, value in told.items()}


def package_version() -> str:
    """The installed version, or "unknown" in a source tree."""
    try:
        return version("phased-consistency")
    except PackageNotFoundError:
        return "unknown"


def _kohya_metadata(config: Config, base: Base, step: int, samples: int) -> dict[str, str]:
    train, resolution = config.train, config.data.resolution
    rank, alpha = str(config.lora.rank), str(config.lora.alpha if base.stores_alpha else float(config.lora.rank))
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
    if getattr(objective, "metric", "l1") == "l2":
        return {"ss_loss_type": "l2"}
    if not hasattr(objective, "huber_c"):
        return {"ss_loss_type": objective.name}
    return {"ss_loss_type": "huber", "ss_huber_c": str(objective.huber_c)}


def _modelspec_metadata(config: Config, base: Base, tensor_hash: str) -> dict[str, str]:
    recipe = recipe_for(config, base)
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


def hashes(tensors: dict[str, Tensor], ss_metadata: dict[str, str]) -> dict[str, str]:
    """kohya's two hashes: SHA-256 of the tensor bytes, and of 64 KiB at 1 MiB of the file with `ss_*` keys alone."""
    data = save(tensors, ss_metadata)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    found = {"sshs_model_hash": hashlib.sha256(data[start:]).hexdigest()}
    if found["sshs_model_hash"] == EMPTY_HASH:
        raise ValueError("Refusing to write a LoRA without tensor bytes: its hash would match every other empty file.")
    if len(data) > 0x100000:
        found["sshs_legacy_hash"] = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    return found


@dataclass(frozen=True)
class SelfTest:
    """modules: in the file; unmatched: how many of them diffusers did not take; weights_error: |file - meant| / |meant|
    over what all modules add to their weights; the output of the reloaded file against that of the weights meant to be
    in it: greatest and root-mean-square difference, and the LoRA's own effect and the output's size as root mean
    squares, for scale (a base in bf16 rounds its outputs more than a LoRA may change them)."""

    modules: int
    unmatched: int
    weights_error: float
    max_difference: float
    rms_difference: float
    rms_effect: float
    rms_output: float

    @property
    def passed(self) -> bool:
        return self.unmatched == 0 and self.weights_error <= 0.02 and math.isfinite(self.max_difference)

    def sentence(self) -> str:
        return (
            f"{self.unmatched} keys unmatched of {self.modules} modules, weights off by {self.weights_error:.2g} of "
            f"their size, max difference {self.max_difference:.2g} "
            f"(output rms {self.rms_output:.2g}, LoRA's effect {self.rms_effect:.2g})"
        )


@torch.no_grad()
def self_test(path: Path, base: Base, adapter: Adapter, condition: dict[str, Tensor]) -> SelfTest:
    """Reload a saved LoRA through diffusers beside the adapter, and compare their outputs on one noisy point."""
    shape = base.latent_shape(base.default_resolution)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(base.device)
    tick = torch.tensor([base.schedule.ticks // 2], device=base.device)
    condition = {k: v[:1].to(base.device) for k, v in condition.items()}
    meant = base.denoise(x, tick, condition)
    with adapter.off():
        bare = base.denoise(x, tick, condition)
    modules, unmatched = install(path, base, "selftest")
    try:
        base.network.set_adapters("selftest")
        reloaded = base.denoise(x, tick, condition)
        weights_error = _weights_error(adapter, "selftest")
    finally:
        base.network.set_adapters(NAME)
        base.network.delete_adapters("selftest")
    difference = (reloaded - meant).abs()
    sizes = _rms(difference), _rms(meant - bare), _rms(meant)
    return SelfTest(modules, unmatched, weights_error, difference.max().item(), *sizes)


def _weights_error(adapter: Adapter, loaded: str) -> float:
    error, size = 0.0, 0.0
    for layer in (m for m in adapter.layers.values() if loaded in m.lora_A):
        meant, found = (layer.get_delta_weight(name).float() for name in (NAME, loaded))
        error += (found.to(meant.device) - meant).square().sum().item()  # offload keeps what is loaded in main memory
        size += meant.square().sum().item()
    return (error / size) ** 0.5 if size else 0.0


def install(path: Path, base: Base, name: str) -> tuple[int, int]:
    """Load a LoRA file into the base's network through diffusers as adapter `name`.

    Returns (modules in the file, modules that diffusers did not install). Raises ValueError when it takes none of it.
    """
    try:
        with warnings.catch_warnings():
            # a second adapter is what the self-test wants
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            base.load_lora(path, name)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:  # PEFT's, for its metadata
        raise ValueError(f"diffusers cannot load {path.name} into {Path(base.path).name}: {brief(error)}") from error
    modules = len(read_header(path).modules)
    return modules, modules - _adapted(base, name)


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _adapted(base: Base, name: str) -> int:
    return sum(name in m.lora_A for m in base.network.modules() if hasattr(m, "lora_A"))
