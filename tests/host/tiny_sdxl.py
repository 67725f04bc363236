"""A random checkpoint that the host takes for an SDXL, with and without v-prediction, and LoRAs in every key style."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from host.tiny import ALPHA, RANK, Lora, kohya, make_lora, make_vae, peft
from phased_consistency.samplers import Recipe
from phased_consistency.samplers.recipe import HEADER_KEY
from support.ldm_checkpoint import save_single_file

RECIPE = Recipe(family="sdxl", phases=4)
V_RECIPE = Recipe(family="sdxl", phases=4, prediction="v_prediction", zero_terminal_snr=True)


def make_sdxl_unet() -> UNet2DConditionModel:
    """KOALA-700M's pattern of attention, the cheapest that the host takes for SDXL's, as narrow as it may be."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(320, 320, 320),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 5),
        reverse_transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=5,
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        sample_size=8,
    )
    return unet.half().float().eval()  # the checkpoint is in fp16, and the host runs it in fp32


def make_sdxl(checkpoints: Path, loras: Path) -> Lora:
    """Write the checkpoints `sdxl` and `sdxl_v` and their LoRAs; returns the LoRA that all of them are."""
    unet = make_sdxl_unet()
    save_single_file(checkpoints / "sdxl.safetensors", unet, make_vae(), dtype=torch.float16)
    markers = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(load_file(checkpoints / "sdxl.safetensors") | markers, checkpoints / "sdxl_v.safetensors")

    edm = {
        name: torch.tensor(sigma) for name, sigma in (("edm_vpred.sigma_max", 120.0), ("edm_vpred.sigma_min", 0.002))
    }
    save_file(load_file(checkpoints / "sdxl.safetensors") | edm, checkpoints / "cosxl.safetensors")

    lora = make_lora(unet)
    write(loras / "sdxl_kohya.safetensors", kohya(lora), RECIPE)
    write(loras / "sdxl_peft.safetensors", peft(lora, "unet"), RECIPE, {"unet.lora_alpha": ALPHA, "unet.r": RANK})
    write(loras / "sdxl_raw.safetensors", peft(lora, "base_model.model"), RECIPE, {"lora_alpha": ALPHA, "r": RANK})
    write(loras / "sdxl_v.safetensors", kohya(lora), V_RECIPE)
    for name in ("sdxl_lightning_4step_lora", "dmd2_sdxl_4step_lora"):
        save_file(kohya(lora), loras / f"{name}.safetensors")
    return lora


def write(path: Path, tensors: dict[str, torch.Tensor], recipe: Recipe, adapter: dict | None = None) -> None:
    metadata = {HEADER_KEY: recipe.to_header()}
    if adapter:
        metadata["lora_adapter_metadata"] = json.dumps(adapter)
    save_file(tensors, path, metadata)
