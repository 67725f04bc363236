"""`pcm check`: a LoRA loaded by diffusers against the same LoRA added to the weights by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...samplers.lora_file import LoraHeader, split_key
from ..families import Base
from .describe import broken_sentence, broken_tensors
from .install import ADAPTER, header_of_family, install

# kohya's names of SDXL's and SD3's blocks in the original layout
OTHER_LAYOUT = re.compile(
    r"^lora_(unet|transformer)_(input_blocks|middle_block|output_blocks|joint_blocks|time_embed|label_emb|out)_\d"
)


@torch.no_grad()
def check_parity(file: Path, base: Base) -> dict[str, Any]:
    """Compare a LoRA loaded by diffusers with the same LoRA added to the weights by hand, on one noisy point.

    A file with numbers that are not finite fails without being loaded. By hand: W + alpha / rank * up @ down for each
    module that is, by its name, one of the network's. A file that names blocks in the original layout, which diffusers
    and ComfyUI both map, is loaded by diffusers and not compared. The base is changed by what is added by hand.
    """
    header = header_of_family(file, base.name)
    if broken := broken_tensors(header):
        text = f"FAILED: {file.name}: {broken_sentence(broken)} Get it again."
        return {"modules": len(header.modules), "not_finite": broken[:20], "passed": False, "text": text}
    modules = {_name_in_header(base, n): m for n, m in base.network.named_modules() if hasattr(m, "weight")}
    fits = lambda n, m: n in modules and m.fits(tuple(modules[n].weight.shape))  # noqa: E731
    other_layout = [n for n in header.modules if OTHER_LAYOUT.search(n)]
    unmatched = sorted(n for n, m in header.modules.items() if n not in other_layout and not fits(n, m))
    found = {"modules": len(header.modules), "unmatched": len(unmatched), "unmatched_names": unmatched[:20]}
    found["other_layout"] = len(other_layout)
    x, tick, condition = _probe(base)
    bare = base.denoise(x, tick, condition)
    try:
        _, not_installed = install(file, base, ADAPTER)
    except ValueError as error:
        return found | {"passed": False, "not_loaded_by_diffusers": len(header.modules), "text": f"FAILED: {error}"}
    by_diffusers = base.denoise(x, tick, condition)
    base.network.delete_adapters(ADAPTER)
    if not by_diffusers.isfinite().all():
        text = f"FAILED: with {file.name} the output is not finite: its numbers are too large. Get it again."
        return found | {"passed": False, "not_loaded_by_diffusers": not_installed, "text": text}
    failed = f"; unmatched: {', '.join(unmatched[:5])}" if unmatched else ""
    loaded = (
        f"{len(unmatched)} keys unmatched of {len(header.modules)} modules, {not_installed} not loaded by diffusers"
    )
    passed = not unmatched and not not_installed
    if other_layout:
        effect = (by_diffusers - bare).abs().max().item()
        return found | {
            "passed": passed,
            "not_loaded_by_diffusers": not_installed,
            "max_difference": None,
            "max_effect": effect,
            "text": f"{'OK' if passed else 'FAILED'}: {loaded}; {len(other_layout)} names of another layout, loaded by "
            f"diffusers, not compared by hand (the LoRA's effect is {effect:.2g}){failed}",
        }
    _add_by_hand(file, header, modules, unmatched)
    by_hand = base.denoise(x, tick, condition)
    difference = (by_diffusers - by_hand).abs().max().item()
    effect = (by_hand - bare).abs().max().item()
    passed = passed and difference <= 1e-3 * by_hand.abs().max().item() + 0.01 * effect
    return found | {
        "passed": passed,
        "not_loaded_by_diffusers": not_installed,
        "max_difference": difference,
        "max_effect": effect,
        "text": f"{'OK' if passed else 'FAILED'}: {loaded}, max output difference {difference:.2g} "
        f"(the LoRA's effect is {effect:.2g}){failed}",
    }


def _add_by_hand(file: Path, header: LoraHeader, modules: dict[str, torch.nn.Module], without: list[str]) -> None:
    """Add the LoRA to the weights of these modules, by name, all but those `without`."""
    weights, alphas = load_file(file), header.alphas()
    for name, entry in header.modules.items():
        if name in without:
            continue
        up, down = (weights[entry.keys[part]].float() for part in ("up", "down"))
        alpha = alphas.get(name, entry.rank)
        target = modules[name].get_base_layer() if hasattr(modules[name], "get_base_layer") else modules[name]
        delta = (up.flatten(1) @ down.flatten(1)).view_as(target.weight) * (alpha / entry.rank)
        target.weight += delta.to(target.weight)


def _name_in_header(base: Base, module: str) -> str:
    """What `LoraHeader.modules` calls one of the network's modules, whatever key style the file has."""
    return split_key(base.lora_key(module) + ".alpha")[0]


def _probe(base: Base) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One noisy point halfway up the schedule, and the empty prompt's encoding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *base.latent_shape(base.default_resolution), generator=generator).to(base.device)
    tick = torch.tensor([base.schedule.ticks // 2], device=base.device)
    return x, tick, base.encode_prompts([""])
