"""What a latent's frames and size have to agree with: the shift that a node has worked out for them, and the model."""

from __future__ import annotations

import math
from typing import Any

import comfy.supported_models
from torch import Tensor

from ..samplers import Recipe
from ..samplers.given_levels import mu_at
from ..samplers.recipe import same_shift
from .lora_on_model import model_family, model_title, pixels_of, shift_of

# core's nodes that work out mu by a number of positions -> where it is their base_shift, and where their max_shift
SIZED = {"ModelSamplingLTXV": (1024, 4096), "ModelSamplingFlux": (256, 4096)}
OTHER_FRAMES = (
    "ModelSamplingLTXV's shift {:.4g} is for another latent; for {} positions it is {:.4g}: connect this latent to it."
)
OTHER_SIZE = "ModelSamplingFlux's shift {:.4g} is for another size; for {} x {} it is {:.4g}: set its width and height."
PICTURES = ("qwen_image", "anima", "krea2")  # families whose latents have frames, of which they draw one
FRAME_BY_FRAME = getattr(comfy.supported_models, "WAN21_CausalAR_T2V", ())  # 0.3.64 has none
CAUSAL = (
    "This Wan model draws a clip frame by frame, which no PCM node does: take core's SamplerARVideo in "
    "SamplerCustomAdvanced."
)


def frames_of(latent: Tensor) -> int:
    """Frames of what a host latent is of, as it counts them; of video and sound in one, the video's."""
    latent = latent.unbind()[0] if latent.is_nested else latent
    return latent.shape[2] if latent.ndim == 5 else 1


def shift_fault(path: list[dict[str, Any]], model: Any, recipe: Recipe, latent: Tensor) -> str | None:
    """The sentence for a shift that a node before the recipe has worked out for another latent, or None.

    path: as by `graph.model_path`. That node's shift counts where the recipe's is the model's own; where the two
    differ, `Recipe.warnings` says so.
    """
    node = _sizing_node(path, recipe)
    shift = shift_of(model)
    if node is None or shift is None or recipe.shift is None or not same_shift(shift, recipe.shift):
        return None
    ends = [node["inputs"].get(name) for name in ("base_shift", "max_shift")]
    if not all(isinstance(mu, int | float) for mu in ends):  # linked: they are not in the graph
        return None

    height, width = pixels_of(model, latent)
    by_frames = node["class_type"] == "ModelSamplingLTXV"
    video = latent.unbind()[0] if latent.is_nested else latent
    positions = math.prod(video.shape[2:]) if by_frames else width * height / 256
    wanted = math.exp(mu_at(positions, tuple(zip(SIZED[node["class_type"]], ends, strict=True))))
    if same_shift(shift, wanted):
        return None
    if by_frames:
        return OTHER_FRAMES.format(shift, positions, wanted)
    return OTHER_SIZE.format(shift, width, height, wanted)


def _sizing_node(path: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any] | None:
    """The node of `SIZED` whose shift a model has kept since; None where another has set one, or the recipe has its
    own."""
    for entry in path:
        kind = entry["class_type"]
        if kind in SIZED:
            return entry
        has_own = kind in ("PCMLoadLora", "PCMRecipe") and (recipe.source != "settings" or entry["inputs"].get("shift"))
        if has_own or kind.startswith("ModelSampling"):
            return None
    return None


def pictures_fault(model: Any, latent: Tensor) -> str | None:
    """The sentence for a clip that a model of pictures would have to draw, or None.

    Qwen-Image-Layered has its layers as frames.
    """
    if latent.ndim == 5 and model.get_model_object("latent_format").latent_dimensions == 2:
        return (
            f"This latent is a clip's, and a {model_title(model)} model draws pictures: take that of EmptyLatentImage, "
            "or of a picture."
        )
    is_layered = model.model.model_config.unet_config.get("use_additional_t_cond")
    frames = frames_of(latent)
    if frames == 1 or is_layered or model_family(model) not in PICTURES:
        return None
    return (
        f"This latent has {frames} frames, and a {model_title(model)} model draws pictures: set length to 1, or "
        "batch_size to the number of pictures."
    )


def clip_fault(model: Any, latent: Tensor) -> str | None:
    """The sentence for a latent whose frames a model cannot draw all at once, or None."""
    return CAUSAL if isinstance(model.model.model_config, FRAME_BY_FRAME) else pictures_fault(model, latent)
