"""Reading LoRA files of every published key style, and checking them: names, halves, alphas, family."""

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
from ..families.detection import LORA_FAMILIES
from ..lora.check import OTHER_LAYOUT
from .names import dotted_name
from .pairs import Lora, Pair

PCM_ALPHA = 8.0  # the alpha of every LoRA by PCM's own scripts, which do not write it


def read_lora(path: Path, family: str | None = None, alpha: float | None = None) -> Lora:
    """Read a LoRA file of any published key style.

    family: one of `LORA_FAMILIES`, for files that do not tell. alpha: for files that have none. Without it
    they count as alpha = rank, as every loader takes them, but for PEFT's raw files, whose alpha is in an
    adapter_config.json beside them, or PCM's 8.
    Raises FileNotFoundError, or ValueError for a damaged file, one of another or of two families, tensors
    that are no LoRA's, a module that the family has not or that lacks a half, weights that are not finite,
    and unknown alphas.
    """
    header = read_header(path)
    base_class = _family(header, family)
    if header.unmatched:
        some = f"{len(header.unmatched)} of {len(header.tensors)} tensors, such as {header.unmatched[0]}"
        raise ValueError(f"{path.name} has tensors of no LoRA style known here: {some}. Use a plain LoRA.")

    tensors = _load(path)
    _check_modules(header, tensors)
    renamed = _in_diffusers_layout(header, tensors, base_class)
    alphas, alpha_source = _alphas(header, renamed, tensors, alpha)
    if broken := next((name for name, value in alphas.items() if not value or not math.isfinite(value)), None):
        raise ValueError(f"{path.name}: the alpha of {broken} is {alphas[broken]:g}; expected a number other than 0.")

    pairs: dict[str, Pair] = {}
    for name, module in renamed.modules.items():
        if (dotted := _dotted(name, base_class, path)) in pairs:
            raise ValueError(f"{path.name} has {dotted} under two names, {name} the second. Get the file again.")
        down, up = (tensors[module.keys[part]] for part in ("down", "up"))
        pairs[dotted] = Pair(down, up, alphas.get(name, float(len(down))))
    return Lora(path, base_class, dict(sorted(pairs.items())), header.metadata, alpha_source, recipe_of(header))


def _load(path: Path) -> dict[str, Tensor]:
    """The file's tensors by name. Raises ValueError for a damaged file, or numbers that are not finite."""
    try:
        tensors = load_file(path)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path.name} is damaged ({error}). Get the file again.") from error
    if broken := next((name for name, t in tensors.items() if not t.float().isfinite().all()), None):
        raise ValueError(f"{path.name}: {broken} has numbers that are not finite. Get the file again.")
    return tensors


def _check_modules(header: LoraHeader, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError for a module that is not two halves that fit, with at most one alpha of one number."""
    for name, module in header.modules.items():
        if missing := {"down", "up"} - module.keys.keys():
            half = next(iter(module.keys.values()))
            raise ValueError(f"{header.path.name} has {half} and no {missing.pop()} half of it. Get the file again.")
        down, up = (tensors[module.keys[part]] for part in ("down", "up"))
        fits = down.ndim >= 2 and up.ndim >= 2 and up.shape[1] == len(down) > 0
        if not fits or not (down.is_floating_point() and up.is_floating_point()):
            raise ValueError(
                f"{header.path.name}: the halves of {name} are {down.dtype} of shape {tuple(down.shape)} and "
                f"{up.dtype} of {tuple(up.shape)}; expected floating-point (rank, in, ...) and (out, rank, ...)."
            )
        if "alpha" in module.keys and tensors[module.keys["alpha"]].numel() != 1:
            raise ValueError(f"{header.path.name}: {module.keys['alpha']} is not one number. Get the file again.")


def _family(header: LoraHeader, chosen: str | None) -> type[Base]:
    """The class of the LoRA's family, by its tensors, else by its header, else as chosen by the user.

    Raises ValueError where two of these differ, where none tells, and for a family of which no base can be
    loaded.
    """
    modules = header.modules
    shapes = [module.shapes.get("down", ()) for name, module in modules.items() if UNET_CONTEXT.search(name)]
    widths = {shape[1] for shape in shapes if len(shape) >= 2}
    if len(families := sorted({CONTEXT_WIDTHS[width] for width in widths if width in CONTEXT_WIDTHS})) > 1:
        titles = " and ".join(map(family_title, families))
        raise ValueError(f"{header.path.name} mixes modules of {titles}. No model takes both: get the file again.")
    by_tensors = LoraHeader(header.path, header.tensors, {}).family
    by_header = family_from_metadata(header.metadata)
    if by_tensors and by_header and by_tensors != by_header:
        raise ValueError(
            f"{header.path.name} is a LoRA for {family_title(by_tensors)} by its tensors, and for "
            f"{family_title(by_header)} by its header. Get it again, or mend the header (pcm tag)."
        )
    family = by_tensors or by_header
    if chosen and family and chosen != family:
        raise ValueError(f"{header.path.name} is a LoRA for {family_title(family)}, not {family_title(chosen)}.")
    family = family or chosen
    if family not in LORA_FAMILIES:
        finding = f"is a LoRA for {family_title(family)}" if family else "does not tell its family"
        raise ValueError(f"{header.path.name} {finding}. Available: --family {', '.join(LORA_FAMILIES)}.")
    return FAMILIES[family]


def _in_diffusers_layout(header: LoraHeader, tensors: dict[str, Tensor], family: type[Base]) -> LoraHeader:
    """The header with names of SDXL's original layout (input_blocks, ...) turned into diffusers', by diffusers.

    `tensors` get the same names, in place. Raises ValueError for SD3's original layout, which has q, k and v
    in one, and for a file in two layouts.
    """
    networks = [name for name in header.modules if not name.startswith("lora_te")]
    others = [name for name in networks if OTHER_LAYOUT.search(name)]
    if not others:
        return header
    if family.fuses_qkv or len(others) < len(networks):
        problem = "q, k and v in one" if family.fuses_qkv else "two layouts"
        raise ValueError(f"{header.path.name} has {problem}, such as {others[0]}. Get it with diffusers' names.")
    config = family.network_class.load_config(family.configs / family.component)
    layers = type("Config", (), {"layers_per_block": config["layers_per_block"]})
    modules = header.modules
    names = header.kohya_names()
    alphas = {
        id(tensors[module.keys["down"]]): tensors[module.keys["alpha"]]
        for module in modules.values()
        if "alpha" in module.keys
    }
    state, _ = family.pipeline.lora_state_dict(
        {names[key]: tensor for key, tensor in tensors.items()}, unet_config=layers
    )
    # alphas are matched by the tensors they stand beside: diffusers names them in another way than the
    # weights
    state |= {
        f"{split_key(key)[0]}.alpha": alphas[id(tensor)] for key, tensor in list(state.items()) if id(tensor) in alphas
    }
    tensors.clear()
    tensors.update(state)
    return LoraHeader(
        header.path, {name: TensorInfo("", tuple(tensor.shape)) for name, tensor in state.items()}, header.metadata
    )


def _alphas(
    header: LoraHeader, renamed: LoraHeader, tensors: dict[str, Tensor], chosen: float | None
) -> tuple[dict[str, float], str]:
    """Find each module's alpha: in the tensors or PEFT's entry of the header, else as chosen, else beside the file.

    renamed: the header with its names in diffusers' layout. Returns (module -> alpha, where they came from);
    a module without one stands for alpha = rank. Raises ValueError for a file that has lost some, and for an
    unknown alpha.
    """
    modules = renamed.modules
    beside = {name: tensors[module.keys["alpha"]].item() for name, module in modules.items() if "alpha" in module.keys}
    alphas = _peft_alphas(renamed) | beside
    if len(alphas) == len(modules):
        if chosen is not None:
            raise ValueError(f"{header.path.name} has its own alpha. Leave --alpha out.")
        return alphas, "as in the file"
    if alphas:
        lost = [name for name in modules if name not in alphas]
        raise ValueError(
            f"{header.path.name}: {len(lost)} of {len(modules)} modules have lost their alpha, such as {lost[0]}. Get "
            "the file again."
        )
    if chosen is not None:
        return dict.fromkeys(modules, chosen), "as --alpha says"
    if not any("base_model.model." in name for name in header.tensors):
        return {}, "none in the file, which stands for the rank"
    return _raw_alphas(header)


def _raw_alphas(header: LoraHeader) -> tuple[dict[str, float], str]:
    """The alphas of a file with PEFT's raw names: in an adapter_config.json beside it, or those of PCM's scripts."""
    config = header.path.with_name("adapter_config.json")
    if config.is_file():
        try:
            entries = {f"x.{k}": v for k, v in json.loads(config.read_text(encoding="utf-8")).items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{config} cannot be read ({error}). Get it again, or give --alpha.") from error
        with_config = LoraHeader(header.path, header.tensors, {PEFT_KEY: json.dumps(entries)})
        return _peft_alphas(with_config), f"as in {config.name}"
    recipe = recipe_of(header)
    if recipe is not None and recipe.objective == "pcm":
        return dict.fromkeys(header.modules, PCM_ALPHA), "that of PCM's scripts"
    raise ValueError(
        f"{header.path.name} has PEFT's raw names (base_model.model.*) and no alpha, without which its strength is "
        f"unknown. Give --alpha ({PCM_ALPHA:g} for PCM's training scripts), or put its adapter_config.json beside it."
    )


def _peft_alphas(header: LoraHeader) -> dict[str, float]:
    """Module -> alpha by PEFT's entry in the header (`LoraHeader.scale_alphas`); {} without one.

    rsLoRA's scale is alpha / sqrt(rank) (arXiv 2312.03732), so its alpha is multiplied by sqrt(rank), which
    makes it alpha / rank as everywhere else. Raises ValueError for an entry that cannot be read.
    """
    try:
        entries, modules = json.loads(header.metadata.get(PEFT_KEY) or "{}"), header.modules
        by_root = any(value for key, value in entries.items() if key.split(".")[-1] == "use_rslora")
        return {
            name: alpha * (modules[name].rank ** 0.5 if by_root else 1) for name, alpha in header.scale_alphas().items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{header.path.name}: its {PEFT_KEY} cannot be read ({error}). Get the file again.") from error


def _dotted(name: str, family: type[Base], path: Path) -> str:
    """diffusers' name of a module. Raises ValueError for one that the family has not."""
    if (dotted := dotted_name(name, family)) is None:
        raise ValueError(f"{path.name}: {name} is no module of {family.title}, so it has no other name. Leave it out.")
    return dotted
