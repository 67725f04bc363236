"""The parts of a small base of SD3's type, as diffusers and ComfyUI know them."""

from __future__ import annotations

from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .making import SIDE

SHIFT = 3.0  # SD3's time shift
CONTEXT = 4096  # width of SD3's text conditioning, T5's


def new_transformer() -> SD3Transformer2DModel:
    """SD3's transformer at depth 3, its modulations starting from nothing as a DiT's do.

    It has SD3's proportions (64 channels of width per block), so that a host reads it as SD3 once its keys are renamed.
    """
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 8,
        num_layers=3,
        num_attention_heads=3,
        attention_head_dim=64,
        joint_attention_dim=CONTEXT,
        caption_projection_dim=192,
        pooled_projection_dim=768 + 1280,
        pos_embed_max_size=16,
    )
    blocks = transformer.transformer_blocks
    modulations = [norm.linear for block in blocks for norm in (block.norm1, block.norm1_context)]
    for linear in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def new_pipeline(
    vae: AutoencoderTiny,
    tokenizer: CLIPTokenizer,
    transformer: SD3Transformer2DModel,
    encoder: CLIPTextModelWithProjection,
    encoder_2: CLIPTextModelWithProjection,
) -> StableDiffusion3Pipeline:
    """The parts as a diffusers pipeline, which knows how to save them."""
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )
