"""SDXL and its fine-tunes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from . import loading
from .base import Condition
from .clip import text_states
from .unet import UNetBase
from .unet_loading import TextEncoder


class SDXL(UNetBase):
    """Two CLIP text encoders and micro-conditioning on sizes (arXiv 2307.01952, Sec. 2.2); eps- or v-prediction.

    A condition may bring "time_ids" (B, 6): original height and width, top and left of the crop, target
    height and width, in pixels. Without them a picture is taken to be whole and of its own size.
    """

    name = "sdxl"
    title = "SDXL"
    architecture = "stable-diffusion-xl-v1-base/lora"
    base_version = "sdxl_base_v1-0"
    knows_sizes = True
    pipeline = StableDiffusionXLPipeline
    configs = loading.CONFIGS / "sdxl"
    encoders = (
        TextEncoder("text_encoder", "CLIP-L text encoder", CLIPTextModel, "conditioner.embedders.0.transformer."),
        TextEncoder(
            "text_encoder_2",
            "OpenCLIP-bigG text encoder",
            CLIPTextModelWithProjection,
            "conditioner.embedders.1.model.",
            open_clip=True,
        ),
    )
    usual_null = "zeros"

    def _encode_prompts(self, prompts: list[str]) -> Condition:
        """Prompts -> {"hidden": (B, 77, 2048), "pooled": (B, 1280)}. Longer prompts are cut at 77 tokens.

        hidden: both encoders' last but one hidden states side by side; pooled: the second's projected
        summary.
        """
        pairs = zip(self.text_encoders, self.tokenizers, strict=True)
        (first, _), (second, pooled) = (text_states(*pair, prompts, -2) for pair in pairs)
        return {"hidden": torch.cat([first, second], -1), "pooled": pooled}

    def added_conditions(self, x: Tensor, condition: Condition) -> dict[str, Tensor]:
        sizes = condition.get("time_ids")
        if sizes is None:
            height, width = (8 * side for side in x.shape[-2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]], device=x.device).expand(len(x), -1)
        # sizes stay in fp32: above 256 bf16 knows even numbers only
        return {"text_embeds": condition["pooled"].to(self.dtype), "time_ids": sizes.float()}

    @staticmethod
    def dummy_condition(network_config, make: Callable[..., Tensor], tokens: int | None = None) -> Condition:
        pooled = network_config.projection_class_embeddings_input_dim - 6 * network_config.addition_time_embed_dim
        return UNetBase.dummy_condition(network_config, make, tokens) | {
            "pooled": make(1, pooled),
            "time_ids": make(1, 6),
        }

    @classmethod
    def dummy_inputs(
        cls, network_config, resolution: int, make: Callable[..., Tensor], tokens: int | None = None
    ) -> dict[str, Any]:
        condition = cls.dummy_condition(network_config, make, tokens)
        added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
        return super().dummy_inputs(network_config, resolution, make, tokens) | {"added_cond_kwargs": added}
