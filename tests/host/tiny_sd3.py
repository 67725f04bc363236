"""A small random SD3.5-like checkpoint that the host detects, and LoRAs on it under diffusers' names."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, SD3Transformer2DModel
from safetensors.torch import save_file

from host.tiny import ALPHA, RANK, Lora, make_lora
from phased_consistency.samplers import Recipe
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.trainer.tiny.single_file import sd3_checkpoint, sd3_tiny_vae, sd3_transformer

RECIPE = Recipe(family="sd3", prediction="flow", shift=3.0, points=100, phases=4)
# Every kind of module that can be adapted; block 0 has SD3.5's second attention, block 2 is the last.
BLOCK_KINDS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"{side}.net.{layer}" for side in ("ff", "ff_context") for layer in ("0.proj", "2")),
)
KINDS = {
    **{kind: rf"transformer_blocks\.\d+\.{re.escape(kind)}" for kind in BLOCK_KINDS},
    "norm1.linear, dual": r"transformer_blocks\.0\.norm1\.linear",
    "norm1.linear": r"transformer_blocks\.[12]\.norm1\.linear",
    "norm1_context.linear": r"transformer_blocks\.[01]\.norm1_context\.linear",
    "norm1_context.linear, last": r"transformer_blocks\.2\.norm1_context\.linear",
    "timestep_embedder.linear_1": r"time_text_embed\.timestep_embedder\.linear_1",
    "timestep_embedder.linear_2": r"time_text_embed\.timestep_embedder\.linear_2",
    "text_embedder.linear_1": r"time_text_embed\.text_embedder\.linear_1",
    "text_embedder.linear_2": r"time_text_embed\.text_embedder\.linear_2",
    **{kind: re.escape(kind) for kind in ("pos_embed.proj", "context_embedder", "norm_out.linear", "proj_out")},
}
ALL = "|".join(KINDS.values())


def make_transformer() -> SD3Transformer2DModel:
    """SD3.5's shape at three blocks, 64 wide per block as the host demands; every part has a say in the result."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        num_attention_heads=3,
        attention_head_dim=64,
        joint_attention_dim=4096,
        caption_projection_dim=192,
        pooled_projection_dim=2048,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight[0].numel() ** -0.5)
            elif name.endswith(".bias"):
                weight.normal_(std=0.1)
    return transformer.eval()


def make_vae() -> AutoencoderTiny:
    """TAESD's shape for SD3; it works on latents as they are sampled."""
    torch.manual_seed(0)
    return AutoencoderTiny(latent_channels=16).eval()


def make_sd3(checkpoints: Path, loras: Path) -> dict[str, Lora]:
    """Write the checkpoint, a LoRA on everything, and one on each kind of module; returns them by kind."""
    transformer = make_transformer()
    parts = sd3_transformer(transformer.state_dict()), sd3_tiny_vae(make_vae().state_dict())
    save_file(sd3_checkpoint(*parts), checkpoints / "sd3.safetensors")
    whole = make_lora(transformer, targets=rf"^({ALL})$")
    write(loras / "sd3.safetensors", whole, RECIPE)
    write(loras / "sd3_shift1.safetensors", whole, Recipe(family="sd3", prediction="flow", shift=1.0, points=100))
    write(loras / "Hyper-SD3-4steps-CFG-lora.safetensors", whole, None)
    kinds = {kind: make_lora(transformer, targets=f"^({pattern})$") for kind, pattern in KINDS.items()}
    for kind, lora in kinds.items():
        write(loras / file_of(kind), lora, RECIPE)
    return {"everything": whole, **kinds}


def file_of(kind: str) -> str:
    return "sd3.safetensors" if kind == "everything" else f"sd3_{re.sub(r'[^a-z0-9]+', '_', kind)}.safetensors"


def write(path: Path, lora: Lora, recipe: Recipe | None) -> None:
    """As the trainer writes SD3's: no alpha, which not every loader knows here, but its square root in both factors."""
    scale, tensors = (ALPHA / RANK) ** 0.5, {}
    for name, (down, up) in lora.items():
        tensors |= {f"transformer.{name}.lora_A.weight": scale * down, f"transformer.{name}.lora_B.weight": scale * up}
    save_file(tensors, path, {HEADER_KEY: recipe.to_header()} if recipe else None)
