"""Which family a base is of, by what says so without a weight being read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...samplers.lora_file import TensorInfo, family_title
from ..tiny.bundled import bundled_folder
from ..tiny.digits import NAME as DIGITS
from .loading import NETWORK_PREFIX, checkpoint_header, diffusers_folder, read_config

CONTEXT_WIDTHS = {768: "sd15", 1024: "sd2", 1280: "sdxl-refiner", 2048: "sdxl"}
# channels of the network's input -> what makes it another kind: a mask and a masked picture, or a picture to edit
INPUTS = {9: "-inpaint", 8: "-edit"}
# Families of which a LoRA can be trained, and read from a file.
LORA_FAMILIES = ("sd15", "sdxl", "sd3")
PIXELS = "pixels"  # trained whole, from nothing
KINDS = {"refiner": "refiner", "inpaint": "inpainting model", "edit": "editing model"}
SET_IT = f"Set base.family (--family) if it is one of {', '.join(LORA_FAMILIES)}."


def family_of(path: str, asked: str | None = None) -> str:
    """Family of a bundled tiny base, a single file, a diffusers folder or a hub id.

    asked: what the user says it is, which counts where nothing tells.
    Raises ValueError where nothing tells at all, where the two differ, and for a kind of model that cannot be trained;
    FileNotFoundError where there is nothing.
    """
    if path == DIGITS:
        found, what = PIXELS, path
    elif bundled_folder(path) is not None:
        found, what = path.removeprefix("tiny-"), path
    elif path.endswith(".safetensors"):
        found, what = checkpoint_family(checkpoint_header(Path(path)).tensors), Path(path).name
    else:
        found, what = _folder_family(diffusers_folder(path, (), "any family")), path
    if found is None and asked is None:
        raise ValueError(f"Nothing in {what} tells which family it is of. {SET_IT}")
    if found == PIXELS:
        if asked in (None, PIXELS):
            return PIXELS
        raise ValueError(
            f"{what} is a network for small pictures, base.family is {asked}. Use the preset digits, or choose a base "
            f"of {family_title(asked)}."
        )
    if found is not None and found not in LORA_FAMILIES:
        instead = family_title(asked) if asked else ", ".join(map(family_title, LORA_FAMILIES))
        raise ValueError(f"{what} is {describe(found)}, of which no LoRA can be trained. Choose a base of {instead}.")
    if found and asked and found != asked:
        raise ValueError(
            f"{what} is {describe(found)}, base.family is {asked}. Set base.family={found} with a preset for it "
            f"({found}-4step), or choose a base of {family_title(asked)}."
        )
    return found or asked


def describe(family: str) -> str:
    """ "SDXL", "an SDXL refiner": a family, or one of the kinds that belong to none, for people."""
    family, _, kind = family.partition("-")
    title = family_title(family)
    return f"an {title} {KINDS[kind]}" if kind else title


def checkpoint_family(tensors: Mapping[str, TensorInfo]) -> str | None:
    """Family of a single file by its blocks, else by the width of its text conditioning; None when neither tells.

    An SDXL refiner is "sdxl-refiner"; a network that takes more than latents is "sd15-inpaint", "sdxl-edit", ...
    """
    inside = {n.removeprefix(NETWORK_PREFIX): t.shape for n, t in tensors.items() if n.startswith(NETWORK_PREFIX)}
    if any(name.startswith("joint_blocks.") for name in inside):
        return "sd3"
    width = next((shape[-1] for name, shape in inside.items() if name.endswith("attn2.to_k.weight") and shape), None)
    inputs = inside.get("input_blocks.0.0.weight", ())[1:2] or (4,)
    return _unet_family(width, *inputs)


def _folder_family(folder: Path) -> str | None:
    """Family of a diffusers folder by its network's config."""
    paths = (folder / component / "config.json" for component in ("transformer", "unet"))
    config = next((read_config(path) for path in paths if path.is_file()), {})
    if config.get("_class_name") == "SD3Transformer2DModel":
        return "sd3"
    if config.get("_class_name") == "UNet2DModel" and "num_class_embeds" in config:
        return PIXELS
    if config.get("_class_name") != "UNet2DConditionModel":
        return None
    width, inputs = (config.get(key) for key in ("cross_attention_dim", "in_channels"))
    if not isinstance(width, int | None) or not isinstance(inputs, int | None):
        return None
    if config.get("addition_embed_type") == "text_time" and width != 1280:
        return "sdxl" + INPUTS.get(inputs, "")
    return _unet_family(width, inputs) or "sd15" + INPUTS.get(inputs, "")


def _unet_family(context_width: int | None, inputs: int) -> str | None:
    family = CONTEXT_WIDTHS.get(context_width)
    return family and family + INPUTS.get(inputs, "")
