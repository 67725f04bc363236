"""A LoRA in memory, whatever its file calls its tensors: read, checked, and written in kohya's or diffusers' form.

kohya: `lora_unet_*` (SD3: `lora_transformer_*`) with an `.alpha` tensor beside each pair. diffusers: `unet.*` with
alpha in the `lora_adapter_metadata` header, which its loader reads, and which ComfyUI does not. For SD3, where files
without any alpha are what everyone shares, alpha is worked into the weights as the trainer does (see `export`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...samplers import Recipe
from ...samplers.lora_file import (
    CONTEXT_WIDTHS,
    UNET_CONTEXT,
    LoraHeader,
    TensorInfo,
    family_from_metadata,
    family_title,
    read_header,
    split_key,
)
from ...samplers.lora_info import recipe_of
from ...samplers.recipe import HEADER_KEY
from ..checkpoint import write_tensors
from ..export import _hashes
from ..families import FAMILIES, Base
from ..inspection import OTHER_LAYOUT
from .names import dotted_name, kohya_name

STYLES = ("kohya", "diffusers")
USABLE = ("sd15", "sdxl", "sd3")
PEFT_KEY = "lora_adapter_metadata"
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
PCM_ALPHA = 8.0  # of every LoRA by PCM's own scripts, which write none
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


def read_lora(path: Path, family: str | None = None, alpha: float | None = None) -> Lora:
    """Read a LoRA file of any published key style.

    family: one of `USABLE`, for files that do not tell. alpha: for files that have none; they count as alpha = rank,
    as every loader takes them, except PEFT's raw files, whose alpha is in an adapter_config.json, or PCM's 8.
    Raises FileNotFoundError, or ValueError for a damaged file, one of another or of two families, tensors that are no
    LoRA's, a module that the family has not or that lacks a half, weights that are not finite, and unknown alphas.
    """
    header = read_header(path)
    kind = _family(header, family)
    if header.unmatched:
        some = f"{len(header.unmatched)} of {len(header.tensors)} tensors, such as {header.unmatched[0]}"
        raise ValueError(f"{path.name} has tensors of no LoRA style known here: {some}. Use a plain LoRA.")
    tensors = _load(path)
    _check_modules(header, tensors)
    renamed = _in_diffusers_layout(header, tensors, kind)
    alphas, told = _alphas(header, renamed, tensors, alpha)
    if bad := next((name for name, value in alphas.items() if not value or not math.isfinite(value)), None):
        raise ValueError(f"{path.name}: the alpha of {bad} is {alphas[bad]:g}; expected a number other than 0.")
    pairs = {}
    for name, module in renamed.modules.items():
        if (dotted := _dotted(name, kind, path)) in pairs:
            raise ValueError(f"{path.name} has {dotted} under two names, {name} the second. Get the file again.")
        down, up = (tensors[module.keys[part]] for part in ("down", "up"))
        pairs[dotted] = Pair(down, up, alphas.get(name, float(len(down))))
    return Lora(path, kind, dict(sorted(pairs.items())), header.metadata, told, recipe_of(header))


def _load(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path.name} is damaged ({error}). Get the file again.") from error
    if bad := next((name for name, t in tensors.items() if not t.float().isfinite().all()), None):
        raise ValueError(f"{path.name}: {bad} has numbers that are not finite. Get the file again.")
    return tensors


def _check_modules(header: LoraHeader, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError for a module that is no pair of halves with at most one alpha."""
    for name, module in header.modules.items():
        if missing := {"down", "up"} - module.keys.keys():
            has = next(iter(module.keys.values()))
            raise ValueError(f"{header.path.name} has {has} and no {missing.pop()} half of it. Get the file again.")
        down, up = (tensors[module.keys[part]] for part in ("down", "up"))
        fit = down.ndim >= 2 and up.ndim >= 2 and up.shape[1] == len(down) > 0
        if not fit or not (down.is_floating_point() and up.is_floating_point()):
            raise ValueError(
                f"{header.path.name}: the halves of {name} are {down.dtype} of shape {tuple(down.shape)} and "
                f"{up.dtype} of {tuple(up.shape)}; expected floating-point (rank, in, ...) and (out, rank, ...)."
            )
        if "alpha" in module.keys and tensors[module.keys["alpha"]].numel() != 1:
            raise ValueError(f"{header.path.name}: {module.keys['alpha']} is not one number. Get the file again.")


def _family(header: LoraHeader, asked: str | None) -> type[Base]:
    modules = header.modules
    shapes = [m.shapes.get("down", ()) for n, m in modules.items() if UNET_CONTEXT.search(n)]
    widths = {shape[1] for shape in shapes if len(shape) >= 2}
    if len(mixed := sorted({CONTEXT_WIDTHS[w] for w in widths if w in CONTEXT_WIDTHS})) > 1:
        titles = " and ".join(map(family_title, mixed))
        raise ValueError(f"{header.path.name} mixes modules of {titles}. No model takes both: get the file again.")
    by_tensors = LoraHeader(header.path, header.tensors, {}).family
    by_header = family_from_metadata(header.metadata)
    if by_tensors and by_header and by_tensors != by_header:
        raise ValueError(
            f"{header.path.name} is a LoRA for {family_title(by_tensors)} by its tensors, and for "
            f"{family_title(by_header)} by its header. Get it again, or mend the header (pcm tag)."
        )
    found = by_tensors or by_header
    if asked and found and asked != found:
        raise ValueError(f"{header.path.name} is a LoRA for {family_title(found)}, not {family_title(asked)}.")
    found = found or asked
    if found not in USABLE:
        told = f"is a LoRA for {family_title(found)}" if found else "does not tell its family"
        raise ValueError(f"{header.path.name} {told}. Available: --family {', '.join(USABLE)}.")
    return FAMILIES[found]


def _in_diffusers_layout(header: LoraHeader, tensors: dict[str, Tensor], family: type[Base]) -> LoraHeader:
    """The header with the names of SDXL's original layout (input_blocks, ...) turned into diffusers', by diffusers.

    `tensors` get the same names. Raises ValueError for SD3's, which has q, k and v in one.
    """
    networks = [name for name in header.modules if not name.startswith("lora_te")]
    others = [name for name in networks if OTHER_LAYOUT.search(name)]
    if not others:
        return header
    if family.name == "sd3" or len(others) < len(networks):
        what = "q, k and v in one" if family.name == "sd3" else "two layouts"
        raise ValueError(f"{header.path.name} has {what}, such as {others[0]}. Get it with diffusers' names.")
    config = family.network_class.load_config(family.configs / family.component)
    layers = type("Config", (), {"layers_per_block": config["layers_per_block"]})
    modules, names = header.modules, header.kohya_names()
    alphas = {id(tensors[m.keys["down"]]): tensors[m.keys["alpha"]] for m in modules.values() if "alpha" in m.keys}
    state, _ = family.pipeline.lora_state_dict({names[k]: t for k, t in tensors.items()}, unet_config=layers)
    # by the tensors themselves: diffusers' names of the alphas are of another kind than those of the weights
    state |= {f"{split_key(k)[0]}.alpha": alphas[id(t)] for k, t in list(state.items()) if id(t) in alphas}
    tensors.clear()
    tensors.update(state)
    return LoraHeader(header.path, {name: TensorInfo("", tuple(t.shape)) for name, t in state.items()}, header.metadata)


def _alphas(
    header: LoraHeader, renamed: LoraHeader, tensors: dict[str, Tensor], given: float | None
) -> tuple[dict[str, float], str]:
    """(module -> alpha, where they came from), of the header with its names in diffusers' layout."""
    modules = renamed.modules
    own = {n: tensors[m.keys["alpha"]].item() for n, m in modules.items() if "alpha" in m.keys}
    found = _peft_alphas(renamed) | own
    if len(found) == len(modules):
        if given is not None:
            raise ValueError(f"{header.path.name} has its own alpha. Leave --alpha out.")
        return found, "as in the file"
    if found:
        some = next(n for n in modules if n not in found)
        raise ValueError(
            f"{header.path.name}: {len(modules) - len(found)} of {len(modules)} modules have lost their alpha, such as "
            f"{some}. Get the file again."
        )
    if given is not None:
        return dict.fromkeys(modules, given), "as --alpha says"
    if not any("base_model.model." in name for name in header.tensors):
        return {}, "none in the file, which stands for the rank"
    return _raw_alphas(header)


def _raw_alphas(header: LoraHeader) -> tuple[dict[str, float], str]:
    """The alphas of a file by PEFT, or by PCM's training scripts, which put it elsewhere."""
    config = header.path.with_name("adapter_config.json")
    if config.is_file():
        try:
            told = {f"x.{k}": v for k, v in json.loads(config.read_text(encoding="utf-8")).items()}
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{config} cannot be read ({error}). Get it again, or give --alpha.") from error
        beside = LoraHeader(header.path, header.tensors, {PEFT_KEY: json.dumps(told)})
        return _peft_alphas(beside), f"as in {config.name}"
    recipe = recipe_of(header)
    if recipe is not None and recipe.objective == "pcm":
        return dict.fromkeys(header.modules, PCM_ALPHA), "that of PCM's scripts"
    raise ValueError(
        f"{header.path.name} has PEFT's raw names (base_model.model.*) and no alpha, without which its strength is "
        f"unknown. Give --alpha ({PCM_ALPHA:g} for PCM's training scripts), or put its adapter_config.json beside it."
    )


def _peft_alphas(header: LoraHeader) -> dict[str, float]:
    """`LoraHeader.scale_alphas`; for rsLoRA, whose scale is alpha / sqrt(rank) (arXiv 2312.03732), times sqrt(rank)."""
    try:
        told, modules = json.loads(header.metadata.get(PEFT_KEY) or "{}"), header.modules
        by_root = any(value for key, value in told.items() if key.split(".")[-1] == "use_rslora")
        return {n: alpha * (modules[n].rank ** 0.5 if by_root else 1) for n, alpha in header.scale_alphas().items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{header.path.name}: its {PEFT_KEY} cannot be read ({error}). Get the file again.") from error


def _dotted(name: str, family: type[Base], path: Path) -> str:
    if (dotted := dotted_name(name, family)) is None:
        raise ValueError(f"{path.name}: {name} is no module of {family.title}, so it has no other name. Leave it out.")
    return dotted


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
    weights: those of SD3 in diffusers' style with an alpha unlike the rank. Raises OSError where it cannot be written.
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
    told |= _hashes(tensors, {k: v for k, v in told.items() if k.startswith("ss_")})
    told["modelspec.hash_sha256"] = f"0x{told['sshs_model_hash']}"
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
