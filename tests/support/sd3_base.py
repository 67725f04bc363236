"""A small random SD3 or SD3.5 with all its parts: as a diffusers folder, and as one file as shared on Civitai."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from phased_consistency.trainer.bench.gpu.bases import t5_tokenizer
from phased_consistency.trainer.tiny.single_file import sd3_checkpoint, sd3_transformer
from support.bases import clip_config, make_vae, second_tokenizer
from support.ldm_checkpoint import ldm_text_encoder, ldm_vae

JOINT, WIDTH_L, WIDTH_G, T5_WORDS = 96, 32, 48, 40


def make_parts(words: CLIPTokenizer, dual: bool = False, t5: bool = True) -> SimpleNamespace:
    """Random parts by their pipeline names, no weight left at zero. dual: SD3.5's second attention and its norms."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=4,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=JOINT,
        caption_projection_dim=32,
        pooled_projection_dim=WIDTH_L + WIDTH_G,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )
    quant = {"use_quant_conv": False, "use_post_quant_conv": False}
    parts = SimpleNamespace(
        transformer=transformer,
        vae=make_vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, **quant),
        text_encoder=CLIPTextModelWithProjection(clip_config(words, WIDTH_L, WIDTH_L)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(words, WIDTH_G, WIDTH_G)),
        text_encoder_3=T5EncoderModel(_t5_config()) if t5 else None,
    )
    with torch.no_grad():
        for module in (transformer, parts.text_encoder, parts.text_encoder_2):
            for weight in module.parameters():
                weight.add_(0.05 * torch.randn(weight.shape))
        # what a single file says of CLIP-L's projection: nothing, as SD3 has none
        parts.text_encoder.text_projection.weight.copy_(torch.eye(WIDTH_L))
    for module in vars(parts).values():
        if module is not None:
            module.eval()
    return parts


def _t5_config() -> T5Config:
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return T5Config(vocab_size=T5_WORDS, d_model=JOINT, d_kv=16, d_ff=64, num_layers=2, num_heads=2, **gated)


def make_pipeline(parts: SimpleNamespace, words: CLIPTokenizer) -> StableDiffusion3Pipeline:
    """The parts as diffusers puts them together."""
    return StableDiffusion3Pipeline(
        **vars(parts),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=words,
        tokenizer_2=second_tokenizer(words),
        tokenizer_3=t5_tokenizer() if parts.text_encoder_3 is not None else None,
    )


def make_sd3_folder(path: Path, words: CLIPTokenizer, dual: bool = False, t5: bool = True) -> SimpleNamespace:
    """Write the diffusers folder; returns its parts."""
    parts = make_parts(words, dual, t5)
    make_pipeline(parts, words).save_pretrained(path)
    return parts


def save_sd3_single_file(path: Path, parts: SimpleNamespace, dtype: torch.dtype | None = None) -> Path:
    """Write the parts as one checkpoint, cast to `dtype` (default: as they are). Returns the path."""
    tensors = sd3_checkpoint(sd3_transformer(parts.transformer.state_dict()), ldm_vae(parts.vae))
    for short, encoder in (("clip_l", parts.text_encoder), ("clip_g", parts.text_encoder_2)):
        tensors |= {f"text_encoders.{short}.transformer.{k}": v for k, v in clip_weights(encoder).items()}
    del tensors["text_encoders.clip_l.transformer.text_projection.weight"]
    if parts.text_encoder_3 is not None:
        t5 = {k: v for k, v in parts.text_encoder_3.state_dict().items() if "embed_tokens" not in k}
        tensors |= {f"text_encoders.t5xxl.transformer.{k}": v for k, v in t5.items()}
    save_file({k: v.detach().to(dtype or v.dtype).clone().contiguous() for k, v in tensors.items()}, path)
    return path


def clip_weights(encoder: CLIPTextModelWithProjection) -> dict[str, torch.Tensor]:
    """A CLIP's weights as `text_model.*` and `text_projection.weight`."""
    named = ldm_text_encoder(encoder)
    return {k.replace("text_model.text_projection", "text_projection"): v for k, v in named.items()}
