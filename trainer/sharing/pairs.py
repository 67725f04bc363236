"""A LoRA in memory, whatever its file calls its tensors, and written in kohya's or diffusers' style.

kohya: `lora_unet_*` (SD3: `lora_transformer_*`) with an `.alpha` tensor beside each pair. Nearly every
program reads it, ComfyUI and A1111 among them. diffusers: `unet.*` with alpha in the header's
`lora_adapter_metadata`, which its loader reads, and which ComfyUI does not. For SD3, where everyone shares
files without any alpha, alpha is worked into the weights, as the trainer does (see `lora/write.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...samplers import Recipe
from ...samplers.lora_file import PEFT_KEY, lora_file
from ...samplers.recipe import HEADER_KEY
from ...samplers.writing import check_header
from ..lora.hashes import hashes
from ..lora.pair import Pair, check_sums, in_16_bits
from ..system.files import write_tensors
from .names import kohya_name

if TYPE_CHECKING:  # neither `pcm tag` nor `pcm panels` waits for the families' libraries
    from ..families import Base

STYLES = ("kohya", "diffusers")
# entries that are hashes of the tensors, made anew for every file
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
# entries that ModelSpec demands of a header that claims to follow it
MUST = tuple(f"modelspec.{key}" for key in ("sai_model_spec", "architecture", "implementation", "title", "resolution"))
DYNAMIC = "Dynamic"  # kohya's word for ranks that differ


@dataclass(frozen=True)
class Lora:
    """A LoRA of one family: pairs by diffusers' module name ("unet.mid_block.attentions.0.proj_in").

    alpha_source: where the alphas came from, for people. recipe: the header's, or a known file's. left_out: sentences
    on what of the file is not here.
    """

    path: Path
    family: type[Base]
    pairs: dict[str, Pair]
    metadata: dict[str, str]
    alpha_source: str
    recipe: Recipe | None
    left_out: tuple[str, ...] = ()

    def remark(self) -> str:
        """What was left out, after a sentence on what was written."""
        return "".join(f"; {line}" for line in self.left_out)


def usual_style(family: type[Base]) -> str:
    """The style that the trainer writes for this family, and that the most programs read."""
    return "kohya" if family.stores_alpha else "diffusers"


def check_out(out: Path, sources: list[Path], overwrite: bool) -> None:
    """Raise ValueError for a file that must not be written to; asked before any work is done."""
    if out.suffix.lower() != ".safetensors":
        raise ValueError(f"--out is {out.name}; its name must end in .safetensors.")
    if any(out.exists() and out.samefile(source) for source in map(lora_file, sources) if source.exists()):
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

    metadata: the header's entries; those that describe the tensors are made anew. Returns the number of
    modules whose alpha was worked into their weights: those of SD3 in diffusers' style with an alpha unlike
    the rank. Raises ValueError for a header that `check_header` refuses and for a DoRA, OSError where it cannot be
    written.
    """
    check_sums(pairs.values())
    tensors: dict[str, Tensor] = {}
    worked_in = 0
    header = {k: v for k, v in metadata.items() if k not in (*HASHES, PEFT_KEY, "format")}
    header |= _family_entries(family, header)

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
            header[PEFT_KEY] = _peft_metadata(pairs)

    rank, alpha = _common(p.rank for p in pairs.values()), _common(p.alpha for p in pairs.values())
    header |= {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": alpha}
    header["ss_network_args"] = json.dumps({"conv_dim": rank, "conv_alpha": alpha})
    if recipe is not None:
        header |= {HEADER_KEY: recipe.to_header(), "modelspec.usage_hint": recipe.usage_hint()}

    # the hashes last: sshs_legacy_hash is of the other ss_ entries too
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header |= hashes(tensors, {k: v for k, v in header.items() if k.startswith("ss_")})
    header["modelspec.hash_sha256"] = f"0x{header['sshs_model_hash']}"
    check_header(out.name, header, tensors)
    write_tensors(out, tensors, header)
    return worked_in


def _family_entries(family: type[Base], metadata: dict[str, str]) -> dict[str, str]:
    """The entries that tell the family, those of the metadata first.

    None for SD3: a class of bases does not know which of the SD3s a LoRA is for (`SD3.architecture` is a
    property).
    """
    entries = {"ss_base_model_version": family.base_version, "modelspec.architecture": family.architecture}
    if not all(isinstance(value, str) for value in entries.values()):
        return {}
    return {"ss_v2": "False"} | {k: metadata.get(k, v) for k, v in entries.items()}


def _number(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor, in this precision where that holds it exactly, else in fp32."""
    number = torch.tensor(value, dtype=dtype)
    return number if number.item() == value else torch.tensor(value)


def settled(pairs: dict[str, Pair], family: type[Base], alpha: float | None = None) -> dict[str, Pair]:
    """The pairs with alphas that every loader reads right from a file of the family's usual style.

    SD3's have their alpha worked in. Others get one alpha for all, this one or the most frequent: where
    alphas differ in a file of kohya's style, diffusers takes a wrong one for the attention layers. Factors
    whose alpha stays are left bit for bit.
    """
    if not family.stores_alpha:
        return {name: _with_alpha(pair, float(pair.rank)) for name, pair in pairs.items()}
    alpha = alpha or Counter(abs(pair.alpha) for pair in pairs.values()).most_common(1)[0][0]
    return {name: _with_alpha(pair, alpha) for name, pair in pairs.items()}


def _with_alpha(pair: Pair, alpha: float) -> Pair:
    """The pair that adds the same with another alpha: each factor takes the root of what alpha loses."""
    if pair.alpha == alpha:
        return pair
    share = pair.alpha / alpha
    factor, sign = abs(share) ** 0.5, -1.0 if share < 0 else 1.0
    return replace(pair, down=_times(pair.down, factor), up=_times(pair.up, sign * factor), alpha=alpha)


def _times(tensor: Tensor, factor: float) -> Tensor:
    """The product in the tensor's own precision, of 16 bits or more, rounded once."""
    dtype = in_16_bits(tensor.dtype)
    return (factor * tensor.to(torch.promote_types(dtype, torch.float32))).to(dtype)


def _peft_metadata(pairs: dict[str, Pair]) -> str:
    """PEFT's configuration of each component, as diffusers writes and reads it: "unet.r", "unet.lora_alpha", ..."""
    from peft import LoraConfig  # takes seconds, and this style alone needs it

    entries = {}
    for component in sorted({name.split(".", 1)[0] for name in pairs}):
        of_component = {n.split(".", 1)[1]: p for n, p in pairs.items() if n.startswith(f"{component}.")}
        ranks = {n: p.rank for n, p in of_component.items()}
        alphas = {n: p.alpha for n, p in of_component.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=list(of_component),
            rank_pattern={n: r for n, r in ranks.items() if r != rank},
            alpha_pattern={n: a for n, a in alphas.items() if a != alpha},
        ).to_dict()
        entries |= {f"{component}.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return json.dumps(entries, sort_keys=True)


def _common(numbers: Iterable[float]) -> str:
    """The number that all of these are, for kohya's entries; else its word for numbers that differ."""
    different = set(numbers)
    return str(different.pop()) if len(different) == 1 else DYNAMIC
