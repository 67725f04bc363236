"""LoRA files of every published key style, read and checked: names, halves, alphas, family."""

from __future__ import annotations

import json
import math
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...samplers.lora_file import (
    CONTEXT_WIDTHS,
    PEFT_KEY,
    UNET_CONTEXT,
    LoraHeader,
    TensorInfo,
    family_from_metadata,
    family_title,
    read_header,
    split_key,
)
from ...samplers.lora_info import recipe_of
from ..families import FAMILIES, Base
from ..lora.check import OTHER_LAYOUT
from .names import dotted_name
from .pairs import Lora, Pair

USABLE = ("sd15", "sdxl", "sd3")
PCM_ALPHA = 8.0  # of every LoRA by PCM's own scripts, which write none


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
    if family.fuses_qkv or len(others) < len(networks):
        what = "q, k and v in one" if family.fuses_qkv else "two layouts"
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
        except (ValueError, AttributeError, RecursionError) as error:
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
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{header.path.name}: its {PEFT_KEY} cannot be read ({error}). Get the file again.") from error


def _dotted(name: str, family: type[Base], path: Path) -> str:
    if (dotted := dotted_name(name, family)) is None:
        raise ValueError(f"{path.name}: {name} is no module of {family.title}, so it has no other name. Leave it out.")
    return dotted
