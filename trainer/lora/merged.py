"""Style LoRAs merged into a base's frozen weights: "my checkpoint with my style LoRA" as the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...samplers.lora_file import LoraHeader, file_hash
from ...samplers.lora_info import recipe_of
from ..config.sections import lora_and_strength
from ..families import Base
from .describe import broken_sentence, broken_tensors
from .install import check_fit, check_plain, header_of_family, left_out


def check_merged(loras: Sequence[str], family: type[Base]) -> list[LoraHeader]:
    """The headers of LoRAs that are to be merged into a base of this family; their weights are not read.

    loras: as in `base.loras`. Raises FileNotFoundError, or ValueError for a LoRA of another family or of few steps, for
    one that is no plain LoRA, for one that is there twice, and for a network that has no frozen weights.
    """
    if loras and family.whole:
        raise ValueError(f"base.loras is for a frozen base, and all of {family.title} is trained. Leave it out.")
    headers = []
    for file, _ in map(lora_and_strength, loras):
        header = header_of_family(Path(file), family.name)
        check_plain(header, header.network)
        if recipe := recipe_of(header):
            raise ValueError(
                f"{header.path.name} is a few-step LoRA ({recipe.method}): merged into the teacher, it would be no "
                "teacher of many steps any more. Put it into lora.init to go on from it."
            )
        if any(header.path.samefile(other.path) for other in headers):
            raise ValueError(
                f"{header.path.name} is in base.loras twice. Give it once, with the sum of both strengths, unless that "
                "is 0."
            )
        headers.append(header)
    return headers


@torch.no_grad()
def merge_into(base: Base, loras: Sequence[str]) -> list[str]:
    """Add LoRAs to a base's weights, each times its strength, in fp32; returns a sentence on each.

    loras: as in `base.loras`. Modules of text encoders are left out, and that is said. Raises as `check_merged` and
    `check_fit`, and ValueError for numbers that are not finite, in the file or by the strength, and for a LoRA that
    changes nothing, of itself or in the base's precision.
    """
    lines = []
    for text, header in zip(loras, check_merged(loras, type(base)), strict=True):
        _, strength = lora_and_strength(text)
        name = header.path.name
        if broken := broken_tensors(header):
            raise ValueError(f"{name}: {broken_sentence(broken)} Get it again.")
        targets = check_fit(header, base)

        # the whole before the first weight is changed
        merged, added = {}, False
        for (_, layer), pair in targets.pairs(header):
            delta = replace(pair, alpha=strength * pair.alpha).delta(layer.weight)
            merged[layer] = (layer.weight.float() + delta).to(layer.weight.dtype)
            added = added or bool(delta.any())
        if not added:
            raise ValueError(f"{name} changes nothing: all that it adds to {len(merged)} layers is 0. Leave it out.")
        if not all(weight.isfinite().all() for weight in merged.values()):
            raise ValueError(f"{name} at strength {strength:g} is beyond what weights can be: give a smaller strength.")
        if all(torch.equal(weight, layer.weight) for layer, weight in merged.items()):
            raise ValueError(
                f"{name} at strength {strength:g} changes nothing: what it adds is less than the base's weights hold "
                f"in {str(base.dtype).removeprefix('torch.')}. Set base.dtype=fp32, give a greater strength, or leave "
                "it out."
            )
        for layer, weight in merged.items():
            layer.weight.copy_(weight)

        base.merged += f"{file_hash(header.path)} {strength:g}\n"
        notes = "".join(f" {line}" for line in left_out(header))
        lines.append(f"Merged into the base: {name} at strength {strength:g}, {len(merged)} modules.{notes}")
    return lines
