"""Names of LoRA modules: kohya's, with underscores alone, and diffusers', with dots, each from the other.

Dots to underscores is easy. The way back is not, because names such as mid_block have underscores of their
own: it takes the words that the family's networks are made of, and looks for the one way to cut a name into
them.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # see pairs.py
    from ..families import Base

NETWORKS = ("lora_unet_", "lora_transformer_")
# kohya's prefixes -> the text encoder's folder; the first is SD1.5's, which has one encoder
ENCODERS = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
CLIP_WORDS = ("text_model", "encoder", "layers", "self_attn", "mlp", "text_projection")
CLIP_WORDS += ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def dotted_name(kohya: str, family: type[Base]) -> str | None:
    """kohya's module name -> diffusers', with its component; None for a module that this family has not.

    "lora_unet_mid_block_attentions_0_proj_in" -> "unet.mid_block.attentions.0.proj_in". Numbers are not
    checked.
    """
    for prefix in NETWORKS:
        if kohya.startswith(prefix):
            return _joined(family.component, kohya.removeprefix(prefix), _network_words(family))
    for prefix, encoder in ENCODERS.items():
        if kohya.startswith(prefix):
            return _joined(encoder, kohya.removeprefix(prefix), CLIP_WORDS)
    return None


def kohya_name(dotted: str, family: type[Base]) -> str:
    """diffusers' module name with its component -> the kohya name that ComfyUI maps for this family."""
    component, path = dotted.split(".", 1)
    prefix = f"lora_{component}_" if component == family.component else family.text_prefixes[component]
    return prefix + path.replace(".", "_")


def _joined(component: str, name: str, words: tuple[str, ...]) -> str | None:
    """The name cut into words and numbers, joined by dots; None where something else is left over."""
    longest_first = "|".join(sorted(words, key=len, reverse=True))
    parts = re.findall(rf"(\d+|{longest_first})(?:_|$)", name)
    return ".".join([component, *parts]) if parts and "_".join(parts) == name else None


@cache
def _network_words(family: type[Base]) -> tuple[str, ...]:
    """The words in the module names of the family's networks (SD3's and SD3.5's together), without the numbers."""
    words = set()
    for folder in sorted(family.configs.parent.glob(f"{family.name}*/{family.component}")):
        with torch.device("meta"):
            network = family.network_class.from_config(family.network_class.load_config(folder))
        words |= {word for name, _ in network.named_modules() for word in name.split(".") if word.isidentifier()}
    return tuple(sorted(words))
