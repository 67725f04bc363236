"""A LoRA in memory, whatever its file calls its tensors, and written in kohya's or diffusers' form.

kohya: `lora_unet_*` (SD3: `lora_transformer_*`) with an `.alpha` tensor beside each pair. diffusers: `unet.*` with
alpha in the `lora_adapter_metadata` header, which its loader reads, and which ComfyUI does not. For SD3, where files
without any alpha are what everyone shares, alpha is worked into the weights as the trainer does (see `export`).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...samplers import Recipe
from ...samplers.lora_file import PEFT_KEY
from ...samplers.recipe import HEADER_KEY
from ...samplers.writing import check_header
from ..lora.hashes import hashes
from ..system.files import write_tensors
from .names import kohya_name

if TYPE_CHECKING:  # neither `pcm tag` nor `pcm panels` waits for the families' libraries
    from ..families import Base

STYLES = ("kohya", "diffusers")
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
# what ModelSpec demands of a header that claims to follow it
MUST = tuple(f"modelspec.{key}" for key in ("sai_model_spec", "architecture", "implementation", "title", "resolution"))
DYNAMIC = "Dynamic"  # kohya's word for ranks that differ


@dataclass(frozen=True)
class Pair:
    """One module's factors as stored: down (rank, in, *kernel), up (out, rank, *1). It adds scale * up @ down."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Lora:
    """A LoRA of one family: pairs by diffusers' module name ("unet.mid_block.attentions.0.proj_in").

    alpha_told: where the alphas came from, for people. recipe: of the header, or of a known file.
    """

    path: Path
    family: type[Base]
    pairs: dict[str, Pair]
    metadata: dict[str, str]
    alpha_told: str
    recipe: Recipe | None


def usual_style(family: type[Base]) -> str:
    """The style that the trainer writes, and that the most programs read."""
    return "kohya" if family.stores_alpha else "diffusers"


def check_out(out: Path, sources: list[Path], overwrite: bool) -> None:
    """Raise ValueError for a place that must not be written to, before any work is done."""
    if out.suffix.lower() != ".safetensors":
        raise ValueError(f"--out is {out.name}; its name must end in .safetensors.")
    if any(out.exists() and out.samefile(source) for source in sources if source.exists()):
        raise ValueError(f"{out} is a file that is read, and is never written over: choose another name.")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already: choose another name, or add --overwrite.")


def write_lora(
    out: Path,
    family: type[Base],
    pairs: dict[str, Pair],
    metadata: dict[str, str],
    recipe: Recipe | None = None,
    style: str | None = None,
) -> int:
    """Write a LoRA in one of `STYLES` (default: `usual_style`), with true hashes, ranks and alphas in its header.

    metadata: kept but for what tells of tensors. Returns the number of modules whose alpha was worked into their
    weights: those of SD3 in diffusers' style with an alpha unlike the rank. Raises ValueError for a header that
    `check_header` refuses, OSError where it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    worked_in, told = 0, {k: v for k, v in metadata.items() if k not in (*HASHES, PEFT_KEY, "format")}
    told |= _facts(family, told)
    if (style or usual_style(family)) == "kohya":
        for name, pair in pairs.items():
            key = kohya_name(name, family)
            tensors |= {f"{key}.lora_down.weight": pair.down, f"{key}.lora_up.weight": pair.up}
            tensors[f"{key}.alpha"] = _number(pair.alpha, pair.down.dtype)
    else:
        if not family.stores_alpha:
            worked_in = sum(pair.scale != 1 for pair in pairs.values())
            pairs = settled(pairs, family)
        for name, pair in pairs.items():
            tensors |= {f"{name}.lora_A.weight": pair.down, f"{name}.lora_B.weight": pair.up}
        if family.stores_alpha:
            told[PEFT_KEY] = _peft_metadata(pairs)
    rank, alpha = _common(p.rank for p in pairs.values()), _common(p.alpha for p in pairs.values())
    told |= {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": alpha}
    told["ss_network_args"] = json.dumps({"conv_dim": rank, "conv_alpha": alpha})
    if recipe is not None:
        told |= {HEADER_KEY: recipe.to_header(), "modelspec.usage_hint": recipe.usage_hint()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    told |= hashes(tensors, {k: v for k, v in told.items() if k.startswith("ss_")})
    told["modelspec.hash_sha256"] = f"0x{told['sshs_model_hash']}"
    check_header(out.name, told, tensors)
    write_tensors(out, tensors, told)
    return worked_in


def _facts(family: type[Base], metadata: dict[str, str]) -> dict[str, str]:
    """What tells the family, where the metadata does not; which of the SD3s it is, only the base knew."""
    told = {"ss_base_model_version": family.base_version, "modelspec.architecture": family.architecture}
    if not all(isinstance(value, str) for value in told.values()):
        return {}
    return {"ss_v2": "False"} | {k: metadata.get(k, v) for k, v in told.items()}


def _number(value: float, dtype: torch.dtype) -> Tensor:
    """A number in this precision where it has it exactly, else in fp32."""
    number = torch.tensor(value, dtype=dtype)
    return number if number.item() == value else torch.tensor(value)


def settled(pairs: dict[str, Pair], family: type[Base], alpha: float | None = None) -> dict[str, Pair]:
    """The pairs as every loader reads them right from a file of the family's usual style.

    For SD3 with alpha worked in, else all with one alpha, this one or the most frequent: where they differ in a file of
    kohya's style, diffusers takes another for the attention layers. Factors whose alpha stays are left bit for bit.
    """
    if not family.stores_alpha:
        return {name: _with_alpha(pair, float(pair.rank)) for name, pair in pairs.items()}
    alpha = alpha or Counter(abs(pair.alpha) for pair in pairs.values()).most_common(1)[0][0]
    return {name: _with_alpha(pair, alpha) for name, pair in pairs.items()}


def _with_alpha(pair: Pair, alpha: float) -> Pair:
    """A pair that adds the same with another alpha."""
    if pair.alpha == alpha:
        return pair
    share = pair.alpha / alpha
    factor, sign = abs(share) ** 0.5, -1.0 if share < 0 else 1.0
    down, up = (
        (f * t.to(torch.promote_types(t.dtype, torch.float32))).to(t.dtype)
        for f, t in ((factor, pair.down), (sign * factor, pair.up))
    )
    return Pair(down, up, alpha)


def _peft_metadata(pairs: dict[str, Pair]) -> str:
    """PEFT's configuration of each component, as diffusers writes and reads it: "unet.r", "unet.lora_alpha", ..."""
    from peft import LoraConfig  # takes seconds, and this style alone needs it

    told = {}
    for component in sorted({name.split(".", 1)[0] for name in pairs}):
        own = {n.split(".", 1)[1]: p for n, p in pairs.items() if n.startswith(f"{component}.")}
        ranks, alphas = ({n: getattr(p, what) for n, p in own.items()} for what in ("rank", "alpha"))
        rank, alpha = (Counter(of.values()).most_common(1)[0][0] for of in (ranks, alphas))
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=list(own),
            rank_pattern={n: r for n, r in ranks.items() if r != rank},
            alpha_pattern={n: a for n, a in alphas.items() if a != alpha},
        ).to_dict()
        told |= {f"{component}.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return json.dumps(told, sort_keys=True)


def _common(values) -> str:
    found = set(values)
    return str(found.pop()) if len(found) == 1 else DYNAMIC
