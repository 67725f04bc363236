"""The alphas that a LoRA file keeps in its header's PEFT entry, and not as tensors: ComfyUI ignores that entry."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from .lora_names import bare_path

PEFT_KEY = "lora_adapter_metadata"
TEXT_ENCODER = re.compile(r"lora_te[123]?(?=_)")
COMPONENTS = {
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
}
# What a file's pattern may not hold: a group repeated, or many wildcards, on which matching may never come to an end.
REPEATED_GROUP = re.compile(r"\)[*+{]")
WILDCARD = re.compile(r"(?<!\\)[*+{]")
MOST_WILDCARDS = 3


def peft_alphas(text: str, modules: Mapping[str, Any]) -> dict[str, float]:
    """Module -> alpha by an entry of PEFT's, as JSON, for the modules that it speaks of.

    modules: kohya name -> `LoraModule`. A key of the entry is `unet.lora_alpha` and the like; one without a component
    is for all. rsLoRA's scale is alpha / sqrt(rank) (arXiv 2312.03732), so its alpha is multiplied by sqrt(rank),
    which makes it alpha / rank as everywhere else.
    Raises ValueError, TypeError and the like for an entry of another form, or an alpha that is not a finite number.
    """
    configs: dict[str, dict[str, Any]] = {}
    for key, value in json.loads(text).items():
        component, _, name = key.rpartition(".")
        configs.setdefault(component, {})[name] = value
    alphas = {}
    for name, module in modules.items():
        config = _config_of(name, configs)
        if (alpha := _alpha_of(module.path, config)) is not None:
            alphas[name] = alpha * ((module.rank or 1) ** 0.5 if config.get("use_rslora") else 1)
    return alphas


def _config_of(name: str, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The entries for the component of a module; without one of its own, those for all. {} where there are none."""
    if encoder := TEXT_ENCODER.match(name):
        return configs.get(COMPONENTS[encoder[0]]) or configs.get("") or {}
    networks = [config for component, config in configs.items() if not component.startswith("text_encoder")]
    return next(iter(networks), {})


def _alpha_of(path: str, config: dict[str, Any]) -> float | None:
    """A module's alpha: of the first pattern that its path matches, as in PEFT's `get_pattern_key`, else of all."""
    path = bare_path(path)
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if _matches(pattern, path):
            return _number(alpha)
    alpha = config.get("lora_alpha")
    return None if alpha is None else _number(alpha)


def _matches(pattern: str, path: str) -> bool:
    """Whether a path is a pattern's, or ends in it after a dot. Raises ValueError for a pattern that is none."""
    if REPEATED_GROUP.search(pattern) or len(WILDCARD.findall(pattern)) > MOST_WILDCARDS:
        raise ValueError(f"the pattern {pattern[:60]!r} repeats groups, or has over {MOST_WILDCARDS} wildcards")
    try:
        if "." not in path:  # names in kohya's style have lost their dots
            pattern = pattern.replace(r"\.", "_")
        return re.match(rf"(.*[._])?({pattern})$", path) is not None
    except re.error as error:
        raise ValueError(f"the pattern {pattern[:60]!r} cannot be read ({error})") from None


def _number(value: float) -> float:
    """An alpha from JSON, which also has NaN, Infinity and numbers in quotes: ValueError for those."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"an alpha is {str(value)[:30]!r}, which is no number")
    return float(value)
