"""What a model for inpainting takes beside the latent: the mask, and the picture without what it covers."""

from __future__ import annotations

from typing import Any

import node_helpers
import torch
import torch.nn.functional as F

from ..samplers.editing import canvas, extended
from ..samplers.operators import Inpaint, Operator
from .vae import HostVAE

GREY = 0.5  # of what the mask covers, as in training (https://huggingface.co/runwayml/stable-diffusion-inpainting)
GRADED = "DifferentialDiffusion does nothing here: use Sample PCM with Set Latent Noise Mask."


def mask_faults(model: Any) -> list[str]:
    """Sentences on nodes that change the mask of a host MODEL, which an edit has no part of: it masks by itself."""
    return [GRADED] if model.model_options.get("denoise_mask_function") else []


def takes_picture(model: Any) -> bool:
    """Whether a host MODEL is one for inpainting, with nine inputs to its first convolution."""
    return "masked_image" in getattr(model.model, "concat_keys", ())


def with_picture(conditioning: list, model: Any, operator: Operator, vae: Any) -> list:
    """A host CONDITIONING with the mask and the picture of an edit, as core's InpaintModelConditioning makes it.

    On the edit's own canvas, so at sizes that are no multiple of 8 too. As it is for other models and other edits.
    """
    if not takes_picture(model) or not isinstance(operator, Inpaint):
        return conditioning
    height, width = canvas(operator.size)
    mask = F.pad(operator.hole, (0, width - operator.size[1], 0, height - operator.size[0]))
    known = extended(operator.known, (height, width))
    masked = torch.where(mask > 0, GREY, known)
    values = {"concat_latent_image": HostVAE(vae).encode(masked), "concat_mask": mask}
    return node_helpers.conditioning_set_values(conditioning, values)
