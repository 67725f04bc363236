"""Families of models: what they are called here, and for people.

A family outside of `FAMILIES` is called as ComfyUI calls its kind of network (`image_model`), and works as a flow model
with whatever schedule the host has for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# families of noise prediction, and SD3, which a LoRA's tensors or name tell
FAMILIES = {"sd15": "SD1.5", "sd2": "SD2", "sdxl": "SDXL", "sd3": "SD3"}
# other families that have names of their own for people; the keys are ComfyUI's
HOST_FAMILIES = {
    "flux": "FLUX.1",
    "flux2": "FLUX.2",
    "qwen_image": "Qwen-Image",
    "lumina2": "Z-Image",
    "anima": "Anima",
    "wan2.1": "Wan",
    "ltxv": "LTX-Video",
    "ltxav": "LTX-2",
    "hidream": "HiDream",
    "chroma": "Chroma",
    "krea2": "Krea 2",
    "hunyuan_video": "HunyuanVideo",
    "cosmos_predict2": "Cosmos Predict2",
    "cosmos": "Cosmos 1",
    "svd_img2vid": "SVD",
    "cogvideox": "CogVideoX",
}
# models that were made of one of a family and have LoRAs of their own, by words of a base's name
CHILDREN = {
    "sdxl": {"Illustrious": r"illustrious", "NoobAI": r"noob ?ai", "Pony": r"pony", "Animagine": r"animagine"},
}
BASES = ("ss_sd_model_name", "ss_base_model_name")  # entries of a LoRA's header with the name of what it was made from
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,39}")


def family_title(family: str | None) -> str:
    """A family as people write it; one of the host's alone by its name there."""
    if family is None:
        return "an unknown family"
    return FAMILIES.get(family) or HOST_FAMILIES.get(family) or family


def base_title(family: str | None, metadata: Mapping[str, str]) -> str:
    """`family_title`, with the child of it that a LoRA's header says it is for: "SDXL (NoobAI, v-prediction)"."""
    names = re.sub(r"[^a-z0-9]+", " ", " ".join(metadata.get(key, "") for key in BASES).lower())
    child = next((child for child, words in CHILDREN.get(family or "", {}).items() if re.search(words, names)), None)
    if child is None:
        return family_title(family)
    predicts = ", v-prediction" if metadata.get("ss_v_parameterization", "").lower() == "true" else ""
    return f"{family_title(family)} ({child}{predicts})"


def family_problem(family: str, prediction: str) -> str | None:
    """The fault in a recipe's family, as a clause, or None: any name will do for a flow model."""
    if family in FAMILIES or (prediction == "flow" and NAME.fullmatch(family)):
        return None
    return (
        f"family is {family!r:.60}; available: {', '.join(FAMILIES)}, or for flow models ComfyUI's name of the network"
    )
