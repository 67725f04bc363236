"""Diffusers SD3 weights under Stability's original names, as one .safetensors holds them for ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

LATENT_SCALE, LATENT_SHIFT = 1.5305, 0.0609  # of SD3's latents: sampled ones are (stored - shift) * scale
# diffusers' modules -> Stability's: those at the network's ends, those of a block, and those that are three
# in one
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
# the way back, from names without their dots
OF_ENDS = {name.replace(".", "_"): (module,) for module, name in ENDS.items()}
OF_BLOCK = {name.replace(".", "_"): (module,) for module, name in BLOCK.items()}
OF_BLOCK |= {name.replace(".", "_"): modules for name, modules in FUSED.items()}
SCALE_AND_SHIFT = ("norm_out.linear", "norm1_context.linear")


def sd3_checkpoint(transformer: Mapping[str, Tensor], vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One checkpoint as SD3 and SD3.5 are shared, without text encoders, from parts by their original names."""
    checkpoint = {f"model.diffusion_model.{k}": v for k, v in transformer.items()}
    return checkpoint | {f"first_stage_model.{k}": v for k, v in vae.items()}


def sd3_transformer(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of diffusers' `SD3Transformer2DModel` by their original names, q, k and v in one.

    Raises ValueError, naming it, for a weight that SD3 and SD3.5 do not have.
    """
    weights = dict(weights)
    last = max(int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks."))
    width = weights["proj_out.weight"].shape[1]

    renamed = {"pos_embed": weights.pop("pos_embed.pos_embed")}
    for name in list(weights):
        module, leaf = name.rsplit(".", 1)
        if (target := _name(module)) is not None:
            weight = weights.pop(name)
            swapped = has_swapped_halves(module, len(weight), width)
            renamed[f"{target}.{leaf}"] = torch.cat(weight.chunk(2)[::-1]) if swapped else weight
    for block in range(last + 1):
        for target, parts in FUSED.items():
            for leaf in ("weight", "bias"):
                names = [f"transformer_blocks.{block}.{part}.{leaf}" for part in parts]
                if names[0] in weights:
                    renamed[f"joint_blocks.{block}.{target}.{leaf}"] = torch.cat([weights.pop(n) for n in names])
    if weights:
        raise ValueError(f"No SD3 has weights such as {next(iter(weights))}; expected an SD3 or SD3.5 transformer's.")
    return renamed


def has_swapped_halves(module: str, rows: int, width: int) -> bool:
    """Whether Stability has the halves of a diffusers module's rows the other way round: shift before scale.

    So it is where a modulation is these two alone, as at the network's end and for the last block's prompt.
    rows: of the module's weight. width: of the network.
    """
    return module.endswith(SCALE_AND_SHIFT) and rows == 2 * width


def diffusers_modules(name: str) -> tuple[str, ...]:
    """diffusers' modules for one of Stability's, whose name has underscores in place of its dots.

    Three for q, k and v in one; none for a name that SD3 and SD3.5 do not have.
    """
    if m := re.fullmatch(r"joint_blocks_(\d+)_(\w+)", name):
        return tuple(f"transformer_blocks.{m[1]}.{part}" for part in OF_BLOCK.get(m[2], ()))
    return OF_ENDS.get(name, ())


def _name(module: str) -> str | None:
    """Stability's name of a module; None for one that goes with others into one."""
    if m := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module):
        return f"joint_blocks.{m[1]}.{BLOCK[m[2]]}" if m[2] in BLOCK else None
    return ENDS.get(module)


def sd3_tiny_vae(weights: Mapping[str, Tensor], scaling: float = 1.0, shift: float = 0.0) -> dict[str, Tensor]:
    """TAESD's weights, with the scale and shift by which a host decodes SD3's stored latents as diffusers would.

    weights: an `AutoencoderTiny`'s of TAESD's size, by diffusers' names. scaling, shift: the
    `AutoencoderTiny`'s scaling_factor and shift_factor.
    """
    scale = LATENT_SCALE / scaling
    return taesd(weights) | {"vae_scale": torch.tensor(scale), "vae_shift": torch.tensor(LATENT_SHIFT - shift / scale)}


def taesd(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of diffusers' `AutoencoderTiny` by TAESD's names."""
    return {_taesd_name(name): weight for name, weight in weights.items()}


def _taesd_name(name: str) -> str:
    """TAESD's name of a tensor."""
    side, index, rest = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.+)", name).groups()
    # TAESD's decoder counts its clamp as layer 0
    return f"taesd_{side}.{int(index) + (side == 'decoder')}.{rest}"
