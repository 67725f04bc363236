"""Which family a base is of, found without reading a weight: by names, shapes and configs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...samplers.families import family_title
from ...samplers.lora_family import CONTEXT_WIDTHS
from ...samplers.lora_file import TensorInfo
from ..tiny.bundled import bundled_folder
from ..tiny.digits import NAME as DIGITS
from .loading import NETWORK_PREFIX, checkpoint_header, diffusers_folder, is_single_file, read_config

# Width of the text conditioning -> kind of UNet: the families' own, and SDXL's refiner.
UNETS = CONTEXT_WIDTHS | {1280: "sdxl-refiner"}
# Channels of a UNet's input -> another kind of it: beside the latents a mask and a masked picture, or a
# picture to edit.
INPUTS = {9: "-inpaint", 8: "-edit"}
# Families of which a LoRA can be trained, or read from a file.
LORA_FAMILIES = ("sd15", "sdxl", "sd3")
PIXELS = "pixels"  # the family of small networks that are trained whole, from nothing
# End of a kind's name -> that kind for people.
KINDS = {"refiner": "refiner", "inpaint": "inpainting model", "edit": "editing model"}
SET_IT = f"Set base.family (--family) if it is one of {', '.join(LORA_FAMILIES)}."


def family_of(path: str, chosen: str | None = None) -> str:
    """Family of a bundled tiny base, a single file, a diffusers folder or a hub id.

    chosen: the family that the user says it is of, which counts where nothing else tells.
    Raises ValueError where nothing tells at all, where the two differ, and for a kind of model that cannot be
    trained; FileNotFoundError where there is no base.
    """
    name = path
    if path == DIGITS:
        family = PIXELS
    elif (bundled := bundled_folder(path)) is not None:
        family = _folder_family(bundled)
    elif is_single_file(path):
        family = checkpoint_family(checkpoint_header(Path(path)).tensors)
        name = Path(path).name
    else:
        family = _folder_family(diffusers_folder(path, (), "any family"))

    if family is None and chosen is None:
        raise ValueError(f"Nothing in {name} tells which family it is of. {SET_IT}")
    if family == PIXELS:
        if chosen in (None, PIXELS):
            return PIXELS
        raise ValueError(
            f"{name} is a network for small pictures, base.family is {chosen}. Use the preset digits, or choose a base "
            f"of {family_title(chosen)}."
        )
    if family is not None and family not in LORA_FAMILIES:
        instead = family_title(chosen) if chosen else ", ".join(map(family_title, LORA_FAMILIES))
        raise ValueError(f"{name} is {describe(family)}, of which no LoRA can be trained. Choose a base of {instead}.")
    if family and chosen and family != chosen:
        raise ValueError(
            f"{name} is {describe(family)}, base.family is {chosen}. Set base.family={family} with a preset for it "
            f"({family}-4step), or choose a base of {family_title(chosen)}."
        )
    return family or chosen


def describe(family: str) -> str:
    """A family, or a kind of model that belongs to none, for people: "SDXL", "an SDXL refiner"."""
    family, _, kind = family.partition("-")
    title = family_title(family)
    return f"an {title} {KINDS[kind]}" if kind else title


def checkpoint_family(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The family of a single file by its blocks, else by the width of its text conditioning; None if neither tells.

    An SDXL refiner is "sdxl-refiner"; one that takes more than latents is "sd15-inpaint", "sdxl-edit", ...
    """
    inside = {n.removeprefix(NETWORK_PREFIX): t.shape for n, t in tensors.items() if n.startswith(NETWORK_PREFIX)}
    if any(name.startswith("joint_blocks.") for name in inside):
        return "sd3"
    width = next((shape[-1] for name, shape in inside.items() if name.endswith("attn2.to_k.weight") and shape), None)
    inputs = inside.get("input_blocks.0.0.weight", ())[1:2] or (4,)
    return _unet_family(width, *inputs)


def _folder_family(folder: Path) -> str | None:
    """The family of a diffusers folder by its network's config; None where that does not tell."""
    paths = (folder / component / "config.json" for component in ("transformer", "unet"))
    config = next((read_config(path) for path in paths if path.is_file()), {})
    if config.get("_class_name") == "SD3Transformer2DModel":
        return "sd3"
    if config.get("_class_name") == "UNet2DModel" and "num_class_embeds" in config:
        return PIXELS
    if config.get("_class_name") != "UNet2DConditionModel":
        return None
    width, inputs = config.get("cross_attention_dim"), config.get("in_channels")
    if not isinstance(width, int | None) or not isinstance(inputs, int | None):
        return None
    if config.get("addition_embed_type") == "text_time" and width != 1280:
        return "sdxl" + INPUTS.get(inputs, "")
    return _unet_family(width, inputs) or "sd15" + INPUTS.get(inputs, "")


def _unet_family(context_width: int | None, inputs: int) -> str | None:
    """The family of a UNet, or its kind, by the width of its text conditioning and the channels of its input."""
    family = UNETS.get(context_width)
    return family and family + INPUTS.get(inputs, "")
