"""Diffusers weights under the original LDM names, in one .safetensors as shared on Civitai: for tests."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from phased_consistency.trainer.tiny.single_file import taesd

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OPEN_CLIP = (
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("final_layer_norm", "ln_final"),
    ("text_projection.weight", "text_projection"),
)
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(
    path: str | Path,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL | AutoencoderTiny | None = None,
    text_encoder: nn.Module | None = None,
    text_encoder_2: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    markers: tuple[str, ...] = (),
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write the models as one LDM checkpoint, cast to `dtype` (default: as they are). Returns the path.

    With a second text encoder they go where SDXL has them. markers: names of empty tensors beside them.
    """
    tensors = {f"model.diffusion_model.{k}": v for k, v in ldm_unet(unet).items()}
    if vae is not None:
        tensors |= {f"first_stage_model.{k}": v for k, v in ldm_vae(vae).items()}
    if text_encoder is not None:
        first = "cond_stage_model.transformer." if text_encoder_2 is None else "conditioner.embedders.0.transformer."
        tensors |= {f"{first}{k}": v for k, v in ldm_text_encoder(text_encoder).items()}
    if text_encoder_2 is not None:
        tensors |= {f"conditioner.embedders.1.model.{k}": v for k, v in open_clip(text_encoder_2).items()}
    tensors |= {name: torch.zeros(0) for name in markers}
    save_file({k: v.detach().to(dtype or v.dtype).clone().contiguous() for k, v in tensors.items()}, path, metadata)
    return Path(path)


def ldm_unet(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The UNet's weights by their LDM names, without the `model.diffusion_model.` prefix."""
    per_block = unet.config.layers_per_block + 1
    with_attention = [hasattr(block, "attentions") for block in unet.up_blocks]
    return {_unet_name(k, per_block, with_attention): v for k, v in unet.state_dict().items()}


def _unet_name(name: str, per_block: int, with_attention: list[bool]) -> str:
    module, leaf = name.rsplit(".", 1)
    if module in UNET_ENDS:
        return f"{UNET_ENDS[module]}.{leaf}"
    if m := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module):
        place = f"middle_block.{1 if m[1] == 'attentions' else 2 * int(m[2])}"
        return f"{place}.{_inside(m[1], m[3])}.{leaf}"
    m = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", module)
    side, block, kind, layer, inside = m[1], int(m[2]), m[3], int(m[4]), m[5]
    first = block * per_block + (side == "down")
    if kind == "downsamplers":
        return f"input_blocks.{first + per_block - 1}.0.op.{leaf}"
    if kind == "upsamplers":
        return f"output_blocks.{first + per_block - 1}.{1 + with_attention[block]}.conv.{leaf}"
    blocks = "input_blocks" if side == "down" else "output_blocks"
    return f"{blocks}.{first + layer}.{int(kind == 'attentions')}.{_inside(kind, inside)}.{leaf}"


def _inside(kind: str, name: str) -> str:
    return RESNET[name] if kind == "resnets" else name


def ldm_vae(vae: AutoencoderKL | AutoencoderTiny) -> dict[str, Tensor]:
    """The autoencoder's weights by their LDM names (a tiny one by TAESD's), without the `first_stage_model.` prefix."""
    if isinstance(vae, AutoencoderTiny):
        return taesd(vae.state_dict())
    top = len(vae.config.block_out_channels) - 1
    return dict(_vae_entry(k, v, top) for k, v in vae.state_dict().items())


def _vae_entry(name: str, weight: Tensor, top: int) -> tuple[str, Tensor]:
    if m := re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        as_conv = weight[:, :, None, None] if m[3] == "weight" and weight.ndim == 2 else weight
        return f"{m[1]}.mid.attn_1.{VAE_ATTENTION[m[2]]}.{m[3]}", as_conv
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{top - int(m[1])}", name)
    name = re.sub(r"(down|up)samplers\.0\.", r"\1sample.", name)
    name = name.replace("resnets.", "block.").replace("conv_shortcut", "nin_shortcut")
    return name.replace("conv_norm_out", "norm_out"), weight


def ldm_text_encoder(text_encoder: nn.Module) -> dict[str, Tensor]:
    """A `CLIPTextModel`'s weights as `text_model.*`, whatever this version of transformers calls them."""
    return {f"text_model.{k.removeprefix('text_model.')}": v for k, v in text_encoder.state_dict().items()}


def open_clip(text_encoder: nn.Module) -> dict[str, Tensor]:
    """A `CLIPTextModelWithProjection`'s weights as OpenCLIP has them: q, k and v in one, the projection transposed."""
    own = {k.removeprefix("text_model."): v for k, v in text_encoder.state_dict().items()}
    fused = {}
    for name in [k for k in own if ".self_attn.q_proj." in k]:
        whole = torch.cat([own.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"])
        fused[name.replace("self_attn.q_proj.", "attn.in_proj_")] = whole
    named = {_renamed(k): v for k, v in (own | fused).items()}
    return named | {"text_projection": named["text_projection"].T, "logit_scale": torch.tensor(4.6)}


def _renamed(name: str) -> str:
    for own, theirs in OPEN_CLIP:
        name = name.replace(own, theirs)
    return name
