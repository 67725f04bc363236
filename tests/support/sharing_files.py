"""LoRA files for tests of sharing: random ones on a tiny base's own modules, in every style."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from phased_consistency.samplers import Recipe
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.trainer.families import Base
from phased_consistency.trainer.sharing.pairs import Lora
from phased_consistency.trainer.tiny.bundled import bundled_folder
from support.runs import TINY

RECIPE = Recipe(family="sd15", phases=4)
MODULES = (
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "mid_block.attentions.0.proj_in",
    "up_blocks.0.resnets.0.time_emb_proj",
)
SD3_MODULES = ("transformer_blocks.0.attn.add_k_proj", "transformer_blocks.3.norm1_context.linear", "pos_embed.proj")


def pair_of(weight: torch.Tensor, rank: int, size: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random (down, up) for a weight."""
    up = (weight.shape[0], rank, *(1,) * (weight.ndim - 2))
    return size * torch.randn(rank, *weight.shape[1:]), size * torch.randn(up)


def kohya_file(path: Path, base: Base, modules=MODULES, rank=4, alpha=2.0, dtype=torch.float32, **metadata) -> Path:
    """A random LoRA on these modules of the base, in kohya's style."""
    tensors = {}
    for module in modules:
        down, up = pair_of(base.network.get_submodule(module).weight, rank)
        key = "lora_unet_" + module.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down.to(dtype), f"{key}.lora_up.weight": up.to(dtype)}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=dtype)
    save_file(tensors, path, {HEADER_KEY: RECIPE.to_header(), "ss_steps": "7"} | metadata)
    return path


def tuned_folder(folder: Path, change) -> Path:
    """Write tiny-sd15 with a UNet that `change` has worked on; returns the folder."""
    bundled = bundled_folder(TINY)
    folder.mkdir(parents=True)
    for path in bundled.iterdir():
        if path.name != "unet":
            (folder / path.name).symlink_to(path)
    unet = UNet2DConditionModel.from_pretrained(bundled / "unet").float()
    with torch.no_grad():
        change(unet)
    unet.save_pretrained(folder / "unet")
    return folder


def deltas(lora: Lora) -> dict[str, torch.Tensor]:
    """What each module adds, as a full matrix in fp64."""
    return {n: p.scale * p.up.flatten(1).double() @ p.down.flatten(1).double() for n, p in lora.pairs.items()}


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return sum(t.square().sum().item() for t in tensors.values()) ** 0.5


def output(base):
    """What the base predicts at one noisy point, with its adapters as they are."""
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return base.denoise(x, torch.tensor([500]), base.encode_prompts(["a star"]))
