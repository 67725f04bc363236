"""Reading LoRA files of every published key style, and checking them: names, halves, alphas, family."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...samplers.families import family_title
from ...samplers.lora_alphas import PEFT_KEY
from ...samplers.lora_family import CONTEXT_WIDTHS, UNET_CONTEXT, family_from_metadata
from ...samplers.lora_file import (
    PEFT_CONFIG,
    LoraHeader,
    read_header,
)
from ...samplers.lora_info import recipe_of
from ...samplers.lora_names import is_encoders
from ..families import FAMILIES, Base
from ..families.detection import LORA_FAMILIES
from ..lora.install import check_plain
from ..lora.layers import LayerRows, rows_of
from ..lora.pair import Pair
from .names import dotted_name
from .pairs import Lora

PCM_ALPHA = 8.0  # the alpha of every LoRA by PCM's own scripts, which do not write it


def read_lora(path: Path, family: str | None = None, alpha: float | None = None) -> Lora:
    """Read a LoRA file of any published key style.

    family: one of `LORA_FAMILIES`, for files that do not tell. alpha: for files that have none. Without it
    they count as alpha = rank, as every loader takes them, but for PEFT's raw files, whose alpha is in an
    adapter_config.json beside them, or PCM's 8.
    Raises FileNotFoundError, or ValueError for a damaged file, one of another or of two families, tensors
    that are no LoRA's, a module that the family has not, one that is no plain LoRA's, weights that are not
    finite, and unknown alphas.
    """
    header = read_header(path)
    base_class = _family(header, family)
    header, notes = _without_others(header, base_class)
    check_plain(header, header.modules)

    tensors = {name: tensor for name, tensor in _load(header.path).items() if name in header.tensors}
    parts = _rows(header, base_class)
    alphas, alpha_source = _alphas(header, alpha)
    if broken := next((name for name, value in alphas.items() if not value or not math.isfinite(value)), None):
        raise ValueError(f"{path.name}: the alpha of {broken} is {alphas[broken]:g}; expected a number other than 0.")

    pairs: dict[str, Pair] = {}
    for name, module in header.modules.items():
        for rows in parts.get(name, (LayerRows(name),)):  # text encoders' are whole
            if (dotted := _dotted(rows.name, base_class, path)) in pairs:
                raise ValueError(f"{path.name} has {dotted} under two names, {name} the second. Get the file again.")
            pairs[dotted] = rows.pair(module, tensors, alphas.get(name))
    pairs = dict(sorted(pairs.items()))
    return Lora(header.path, base_class, pairs, header.metadata, alpha_source, recipe_of(header), notes)


def _without_others(header: LoraHeader, family: type[Base]) -> tuple[LoraHeader, tuple[str, ...]]:
    """The header without what has no place in a LoRA of this family, and a line on each kind that is left out: tensors
    that belong to no module, and modules of a text encoder that it has no LoRA for, as of SD3's T5."""
    encoders = [name for name in header.modules if is_encoders(name) and not dotted_name(name, family)]
    strange = header.unmatched
    lines = [f"{len(strange)} tensors that are no LoRA's left out, such as {strange[0]}"] if strange else []
    if encoders:
        lines.append(f"{len(encoders)} modules of text encoders left out, such as {encoders[0]}")
    dropped = {*strange, *(key for name in encoders for key in header.modules[name].keys.values())}
    kept = {name: info for name, info in header.tensors.items() if name not in dropped}
    return replace(header, tensors=kept), tuple(lines)


def _load(path: Path) -> dict[str, Tensor]:
    """The file's tensors by name. Raises ValueError for a damaged file, or numbers that are not finite."""
    try:
        tensors = load_file(path)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path.name} is damaged ({error}). Get the file again.") from error
    if broken := next((name for name, t in tensors.items() if not t.float().isfinite().all()), None):
        raise ValueError(f"{path.name}: {broken} has numbers that are not finite. Get the file again.")
    return tensors


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


def _rows(header: LoraHeader, family: type[Base]) -> dict[str, tuple[LayerRows, ...]]:
    """`rows_of` for a network of the family's own size."""
    config = family.network_class.load_config(family.configs / family.component)
    return rows_of(header, family, config.get("layers_per_block"))


def _alphas(header: LoraHeader, chosen: float | None) -> tuple[dict[str, float], str]:
    """Find each module's alpha: in the tensors or PEFT's entry of the header, else as chosen, else beside the file.

    Returns (module -> alpha, where they came from); a module without one stands for alpha = rank. Raises ValueError
    for a file that has lost some, and for an unknown alpha.
    """
    modules, alphas = header.modules, header.alphas()
    if len(alphas) == len(modules):
        if chosen is not None:
            raise ValueError(f"{header.path.name} has its own alpha. Leave --alpha out.")
        beside = any("alpha" in module.keys for module in modules.values())
        from_config = not beside and not header.metadata.get(PEFT_KEY)
        return alphas, f"as in {PEFT_CONFIG}" if from_config else "as in the file"
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
    recipe = recipe_of(header)
    if recipe is not None and recipe.objective == "pcm":
        return dict.fromkeys(header.modules, PCM_ALPHA), "that of PCM's scripts"
    raise ValueError(
        f"{header.path.name} has PEFT's raw names (base_model.model.*) and no alpha, without which its strength is "
        f"unknown. Give --alpha ({PCM_ALPHA:g} for PCM's training scripts), or put its {PEFT_CONFIG} beside it."
    )


def _dotted(name: str, family: type[Base], path: Path) -> str:
    """diffusers' name of a module. Raises ValueError for one that the family has not."""
    if (dotted := dotted_name(name, family)) is None:
        raise ValueError(f"{path.name}: {name} is no module of {family.title}, so it has no other name. Leave it out.")
    return dotted
