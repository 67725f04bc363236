"""Diffusers SD3 weights under Stability's original names, in one .safetensors as shared: for tests."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from ldm_checkpoint import ldm_vae

LATENT_SCALE, LATENT_SHIFT = 1.5305, 0.0609  # of SD3's latents: sampled ones are (stored - shift) * scale
ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


def save_sd3_file(path: str | Path, transformer: SD3Transformer2DModel, vae: AutoencoderTiny | None = None) -> None:
    """Write one checkpoint as SD3 and SD3.5 are shared, with no text encoders."""
    tensors = {f"model.diffusion_model.{k}": v for k, v in sd3_transformer(transformer).items()}
    if vae is not None:
        tensors |= {f"first_stage_model.{k}": v for k, v in sd3_tiny_vae(vae).items()}
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, path)


def sd3_transformer(transformer: SD3Transformer2DModel) -> dict[str, Tensor]:
    """The transformer's weights by their original names, without the `model.diffusion_model.` prefix."""
    weights, last = transformer.state_dict(), len(transformer.transformer_blocks) - 1
    # diffusers' AdaLayerNormContinuous has scale before shift
    swapped = ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")
    named = {"pos_embed": weights.pop("pos_embed.pos_embed")}
    for name in list(weights):
        module, leaf = name.rsplit(".", 1)
        if (new := _name(module)) is not None:
            weight = weights.pop(name)
            named[f"{new}.{leaf}"] = torch.cat(weight.chunk(2)[::-1]) if module in swapped else weight
    for block in range(last + 1):
        for new, parts in FUSED.items():
            for leaf in ("weight", "bias"):
                names = [f"transformer_blocks.{block}.{part}.{leaf}" for part in parts]
                if names[0] in weights:
                    named[f"joint_blocks.{block}.{new}.{leaf}"] = torch.cat([weights.pop(n) for n in names])
    assert not weights, f"no original name is known for {list(weights)}"
    return named


def _name(module: str) -> str | None:
    if m := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module):
        return f"joint_blocks.{m[1]}.{BLOCK[m[2]]}" if m[2] in BLOCK else None
    return ENDS[module]


def sd3_tiny_vae(vae: AutoencoderTiny) -> dict[str, Tensor]:
    """TAESD's names, with the scale and shift by which the host decodes SD3's stored latents as diffusers would."""
    scale = LATENT_SCALE / vae.config.scaling_factor
    shift = LATENT_SHIFT - vae.config.shift_factor / scale
    return ldm_vae(vae) | {"vae_scale": torch.tensor(scale), "vae_shift": torch.tensor(shift)}
