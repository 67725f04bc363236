"""`pcm check`: a LoRA loaded by diffusers against the same LoRA added to the weights by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...samplers.lora_file import LoraHeader
from ..families import Base
from ..families.generate import probe
from .describe import broken_sentence, broken_tensors
from .install import ADAPTER, check_plain, header_of_family, install, install_by_diffusers, left_out
from .layers import Targets, targets_of

# Both ways round: a difference is one where it is beyond this share of the output and of the LoRA's own effect.
OF_OUTPUT, OF_EFFECT = 1e-3, 0.01


@torch.no_grad()
def check_parity(file: Path, base: Base) -> dict[str, Any]:
    """Compare a LoRA loaded by diffusers with the same LoRA added to the weights by hand, on one noisy point.

    A file with numbers that are not finite fails without being loaded. By hand: W + alpha / rank * up @ down for each
    module that is, by its name, one of the network's, its rows at their magnitudes where it has any. Where diffusers
    does not know the file's names and all of them are known here, the LoRA is compared as `install` puts it in, and
    that is said. The base is changed by what is added by hand. Returns JSON-ready facts, with `passed`, and `text` for
    people.
    """
    header = header_of_family(file, base.name)
    if broken := broken_tensors(header):
        text = f"FAILED: {file.name}: {broken_sentence(broken)} Get it again."
        return {"modules": len(header.modules), "not_finite": broken[:20], "passed": False, "text": text}

    check_plain(header, header.network, dora=True)
    targets = targets_of(header, base)
    facts: dict[str, Any] = {
        "modules": len(targets.modules),
        "unmatched": len(targets.unmatched),
        "unmatched_names": targets.unmatched[:20],
        "lost_alphas": [name for name in header.lost_alphas() if name in targets.modules],
        "left_out": left_out(header),
        "tf32": base.device.type == "cuda"
        and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32),
        "passed": False,
    }

    # the bare base first: nothing that follows is taken out of its weights again
    x, tick = probe(base)
    condition = base.encode_prompts([""])
    bare = base.denoise(x, tick, condition)
    missing, refusal = _load_by_diffusers(header, base, targets)
    facts |= {"not_loaded_by_diffusers": missing, "compared_as_sampled": False}
    if missing and not targets.unmatched and not _in_diffusers_style(targets, base):
        if ADAPTER in getattr(base.network, "peft_config", {}):
            base.network.delete_adapters(ADAPTER)
        install(header, base, ADAPTER)
        facts["compared_as_sampled"] = True
    elif missing == len(targets.modules):
        return facts | {"text": (f"FAILED: {refusal}" if refusal else _verdict(False, facts)) + _remarks(facts)}
    loaded = base.denoise(x, tick, condition)
    base.network.delete_adapters(ADAPTER)
    if not loaded.isfinite().all():
        text = f"FAILED: with {file.name} the output is not finite: its numbers are too large. Get it again."
        return facts | {"text": text}

    _add_by_hand(header, targets)
    by_hand = base.denoise(x, tick, condition)
    return facts | _compared(loaded, by_hand, bare, facts)


def _load_by_diffusers(header: LoraHeader, base: Base, targets: Targets) -> tuple[int, str | None]:
    """How many modules diffusers does not load of the file as it is, and what it says where it loads none."""
    try:
        return install_by_diffusers(header.path, base, ADAPTER)[1], None
    except ValueError as error:
        return len(targets.modules), str(error)


def _in_diffusers_style(targets: Targets, base: Base) -> bool:
    """Whether all modules have names that diffusers knows: its own, or those that the trainer writes."""
    return all(
        targets.modules[name].path in (f"{base.component}.{layer.path}", base.lora_key(layer.path))
        and targets.modules[name].keys["down"].endswith((".lora_A.weight", ".lora_down.weight"))
        for layer, name, _ in targets.layers
    )


def _add_by_hand(header: LoraHeader, targets: Targets) -> None:
    """Add the LoRA to the weights of the layers that it is for."""
    for (_, layer), pair in targets.pairs(header):
        layer.weight += pair.delta(layer.weight).to(layer.weight)


def _compared(loaded: Tensor, by_hand: Tensor, bare: Tensor, facts: dict[str, Any]) -> dict[str, Any]:
    difference = (loaded - by_hand).abs().max().item()
    effect = (by_hand - bare).abs().max().item()
    taken = facts["compared_as_sampled"] or not facts["not_loaded_by_diffusers"]
    whole = taken and not facts["unmatched"] and not facts["lost_alphas"]
    passed = whole and difference <= OF_OUTPUT * by_hand.abs().max().item() + OF_EFFECT * effect
    text = f"max output difference {difference:.2g} (the LoRA's effect is {effect:.2g})"
    return {
        "passed": passed,
        "max_difference": difference,
        "max_effect": effect,
        "text": f"{_verdict(passed, facts)}, {text}{_remarks(facts, difference / effect if effect else 0)}",
    }


def _verdict(passed: bool, facts: dict[str, Any]) -> str:
    return (
        f"{'OK' if passed else 'FAILED'}: {facts['unmatched']} keys unmatched of {facts['modules']} modules, "
        f"{facts['not_loaded_by_diffusers']} not loaded by diffusers"
    )


def _remarks(facts: dict[str, Any], off: float | None = None) -> str:
    """What else there is to say; off: by which share of the LoRA's effect the two ways differ."""
    remarks = [f"unmatched: {', '.join(facts['unmatched_names'][:5])}"] if facts["unmatched"] else []
    if facts["tf32"]:
        remarks.append("convolutions and products were computed in TF32, which has about three digits")
    if facts["compared_as_sampled"]:
        remarks.append("compared as pcm sample loads it; for diffusers, write it with pcm convert")
    if lost := facts["lost_alphas"]:
        share = "" if off is None else f", off by {off:.2g} of its effect"
        remarks.append(f"{len(lost)} of {facts['modules']} modules have lost their alpha{share}: get the file again")
    return "".join(f"; {remark}" for remark in [*remarks, *(line.rstrip(".") for line in facts["left_out"])])
