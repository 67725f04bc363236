"""`pcm check`: a LoRA loaded by diffusers against the same LoRA added to the weights by hand."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...samplers.lora_file import LoraHeader
from ...samplers.lora_modules import LoraModule
from ...samplers.lora_names import split_key
from ..families import Base
from ..families.generate import probe
from .describe import broken_sentence, broken_tensors
from .install import ADAPTER, check_plain, header_of_family, install, left_out

# kohya's names of SDXL's and SD3's blocks in the original layout
OTHER_LAYOUT = re.compile(
    r"^lora_(unet|transformer)_(input_blocks|middle_block|output_blocks|joint_blocks|time_embed|label_emb|out)_\d"
)
# Both ways round: a difference is one where it is beyond this share of the output and of the LoRA's own effect.
OF_OUTPUT, OF_EFFECT = 1e-3, 0.01


@dataclass(frozen=True)
class Names:
    """A LoRA's `modules` for the network by name, the `layers` that they are for, those `unmatched` by any, and those
    that are named in the `other_layout`, which diffusers maps and we do not."""

    modules: dict[str, LoraModule]
    layers: dict[str, nn.Module]
    unmatched: list[str]
    other_layout: list[str]


@torch.no_grad()
def check_parity(file: Path, base: Base) -> dict[str, Any]:
    """Compare a LoRA loaded by diffusers with the same LoRA added to the weights by hand, on one noisy point.

    A file with numbers that are not finite fails without being loaded. By hand: W + alpha / rank * up @ down for each
    module that is, by its name, one of the network's. A file that names blocks in the original layout, which diffusers
    and ComfyUI both map, is loaded by diffusers and not compared. The base is changed by what is added by hand.
    Returns JSON-ready facts, with `passed`, and `text` for people.
    """
    header = header_of_family(file, base.name)
    if broken := broken_tensors(header):
        text = f"FAILED: {file.name}: {broken_sentence(broken)} Get it again."
        return {"modules": len(header.modules), "not_finite": broken[:20], "passed": False, "text": text}

    check_plain(header, header.network)
    names = _names(header, base)
    facts: dict[str, Any] = {
        "modules": len(names.modules),
        "unmatched": len(names.unmatched),
        "unmatched_names": names.unmatched[:20],
        "other_layout": len(names.other_layout),
        "lost_alphas": [name for name in header.lost_alphas() if name in names.modules],
        "left_out": left_out(header),
        "passed": False,
    }

    # the bare base first: nothing that follows is taken out of its weights again
    x, tick = probe(base)
    condition = base.encode_prompts([""])
    bare = base.denoise(x, tick, condition)
    try:
        _, not_installed = install(file, base, ADAPTER)
    except ValueError as error:
        return facts | {"not_loaded_by_diffusers": len(names.modules), "text": f"FAILED: {error}"}
    by_diffusers = base.denoise(x, tick, condition)
    base.network.delete_adapters(ADAPTER)
    facts["not_loaded_by_diffusers"] = not_installed
    if not by_diffusers.isfinite().all():
        text = f"FAILED: with {file.name} the output is not finite: its numbers are too large. Get it again."
        return facts | {"text": text}

    whole = not names.unmatched and not not_installed and not facts["lost_alphas"]
    if names.other_layout:
        return facts | _not_compared(whole, names, by_diffusers - bare, facts)
    _add_by_hand(file, header, names)
    by_hand = base.denoise(x, tick, condition)
    return facts | _compared(whole, names, by_diffusers, by_hand, bare, facts)


def _names(header: LoraHeader, base: Base) -> Names:
    layers = {_name_in_header(base, name): m for name, m in base.network.named_modules() if hasattr(m, "weight")}
    modules = header.network
    other_layout = [name for name in modules if OTHER_LAYOUT.search(name)]
    unmatched = sorted(
        name
        for name, module in modules.items()
        if name not in other_layout and not (name in layers and module.fits(tuple(layers[name].weight.shape)))
    )
    return Names(modules, layers, unmatched, other_layout)


def _name_in_header(base: Base, module: str) -> str:
    """What `LoraHeader.modules` calls one of the network's modules, whatever key style the file has."""
    return split_key(base.lora_key(module) + ".alpha")[0]


def _add_by_hand(file: Path, header: LoraHeader, names: Names) -> None:
    """Add the LoRA to the weights of the network's layers, but for the modules that match none."""
    weights, alphas = load_file(header.path), header.alphas()
    for name, module in names.modules.items():
        if name in names.unmatched:
            continue
        up, down = (weights[module.keys[part]].float() for part in ("up", "down"))
        alpha = alphas.get(name, module.rank)
        layer = names.layers[name]
        if hasattr(layer, "get_base_layer"):  # PEFT leaves its wrapper when an adapter is deleted
            layer = layer.get_base_layer()
        delta = (up.flatten(1) @ down.flatten(1)).view_as(layer.weight) * (alpha / module.rank)
        layer.weight += delta.to(layer.weight)


def _compared(
    whole: bool, names: Names, by_diffusers: Tensor, by_hand: Tensor, bare: Tensor, facts: dict[str, Any]
) -> dict[str, Any]:
    difference = (by_diffusers - by_hand).abs().max().item()
    effect = (by_hand - bare).abs().max().item()
    passed = whole and difference <= OF_OUTPUT * by_hand.abs().max().item() + OF_EFFECT * effect
    text = f"max output difference {difference:.2g} (the LoRA's effect is {effect:.2g})"
    return {
        "passed": passed,
        "max_difference": difference,
        "max_effect": effect,
        "text": f"{_verdict(passed, facts)}, {text}{_remarks(names, facts, difference / effect if effect else 0)}",
    }


def _not_compared(whole: bool, names: Names, added: Tensor, facts: dict[str, Any]) -> dict[str, Any]:
    effect = added.abs().max().item()
    text = (
        f"{len(names.other_layout)} names of another layout, loaded by diffusers, not compared by hand "
        f"(the LoRA's effect is {effect:.2g})"
    )
    return {
        "passed": whole,
        "max_difference": None,
        "max_effect": effect,
        "text": f"{_verdict(whole, facts)}; {text}{_remarks(names, facts)}",
    }


def _verdict(passed: bool, facts: dict[str, Any]) -> str:
    return (
        f"{'OK' if passed else 'FAILED'}: {facts['unmatched']} keys unmatched of {facts['modules']} modules, "
        f"{facts['not_loaded_by_diffusers']} not loaded by diffusers"
    )


def _remarks(names: Names, facts: dict[str, Any], off: float | None = None) -> str:
    """What else there is to say; off: by which share of the LoRA's effect the two ways differ."""
    remarks = [f"unmatched: {', '.join(names.unmatched[:5])}"] if names.unmatched else []
    if lost := facts["lost_alphas"]:
        share = "" if off is None else f", off by {off:.2g} of its effect"
        remarks.append(f"{len(lost)} of {facts['modules']} modules have lost their alpha{share}: get the file again")
    return "".join(f"; {remark}" for remark in [*remarks, *(line.rstrip(".") for line in facts["left_out"])])
