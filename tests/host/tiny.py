"""Small random weights for the host tests: an SD1.5 checkpoint that the host detects, and LoRAs in every key style."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from phased_consistency.samplers import Recipe
from phased_consistency.samplers.recipe import HEADER_KEY
from support.ldm_checkpoint import ldm_unet, save_single_file

Lora = dict[str, tuple[Tensor, Tensor]]
RANK, ALPHA = 8, 4.0
TARGETS = r"(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|net\.0\.proj|net\.2|conv1|conv2|time_emb_proj|conv_in)$"
RECIPE = Recipe(family="sd15", phases=4)
# files without a header that are known by their names
KNOWN = ("pcm_sd15_smallcfg_8step_converted", "lcm-lora-sdv1-5", "TCD-SD15-LoRA", "Hyper-SD15-8steps-CFG-lora")


def make_unet() -> UNet2DConditionModel:
    """The smallest kind that has attention, a downsampler, a middle and an upsampler: SD1.5's width at two levels."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(320, 320),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=768,
        attention_head_dim=8,
        sample_size=8,
    ).eval()


def make_vae() -> AutoencoderTiny:
    """A TAESD; its scale is the one that the host has for SD1.5's latents."""
    torch.manual_seed(2)
    return AutoencoderTiny(scaling_factor=0.18215).eval()


def make_checkpoint(path: Path) -> UNet2DConditionModel:
    """Write the checkpoint with TAESD's autoencoder and no text encoder; returns its UNet."""
    unet = make_unet()
    save_single_file(path, unet, make_vae())
    return unet


def make_lora(model: nn.Module, seed: int = 1, targets: str = TARGETS) -> Lora:
    """Module path -> (down, up), random, on everything that `targets` finds: what PCM adapts in a UNet."""
    generator = torch.Generator().manual_seed(seed)

    def pair(weight: Tensor) -> tuple[Tensor, Tensor]:
        down = torch.randn(RANK, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
        up = torch.randn(weight.shape[0], RANK, *(1,) * (weight.ndim - 2), generator=generator) / RANK**0.5
        return down, 0.5 * up

    names = [k.removesuffix(".weight") for k in model.state_dict() if k.endswith(".weight")]
    return {name: pair(model.get_submodule(name).weight) for name in names if re.search(targets, name)}


def merge(model: nn.Module, lora: Lora) -> None:
    """Add the LoRA to the weights, by definition: W + alpha / rank * up @ down."""
    with torch.no_grad():
        for name, (down, up) in lora.items():
            weight = model.get_submodule(name).weight
            weight += (ALPHA / RANK) * (up.flatten(1) @ down.flatten(1)).view(weight.shape)


def kohya(lora: Lora) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up) in lora.items():
        module = "lora_unet_" + name.replace(".", "_")
        tensors |= {
            f"{module}.lora_down.weight": down,
            f"{module}.lora_up.weight": up,
            f"{module}.alpha": torch.tensor(ALPHA),
        }
    return tensors


def peft(lora: Lora, prefix: str) -> dict[str, Tensor]:
    a = {f"{prefix}.{name}.lora_A.weight": down for name, (down, _) in lora.items()}
    return a | {f"{prefix}.{name}.lora_B.weight": up for name, (_, up) in lora.items()}


def make_loras(folder: Path, unet: UNet2DConditionModel) -> Lora:
    """Write every LoRA file of the tests; returns the LoRA that the three key styles share."""
    lora = make_lora(unet)
    recipe = {HEADER_KEY: RECIPE.to_header()}
    adapter = json.dumps({"unet.lora_alpha": ALPHA, "unet.r": RANK})
    save_file(kohya(lora), folder / "kohya.safetensors", recipe)
    save_file(peft(lora, "unet"), folder / "peft.safetensors", {**recipe, "lora_adapter_metadata": adapter})
    raw = json.dumps({"lora_alpha": ALPHA, "r": RANK})
    save_file(peft(lora, "base_model.model"), folder / "raw.safetensors", {**recipe, "lora_adapter_metadata": raw})
    stochastic = Recipe(family="sd15", mode="stochastic", phases=1).to_header()
    save_file(kohya(lora), folder / "stochastic.safetensors", {HEADER_KEY: stochastic})
    one_step = Recipe(family="sd15", phases=1, min_alpha=0.5).to_header()
    save_file(kohya(lora), folder / "clamped.safetensors", {HEADER_KEY: one_step})
    save_file(kohya(lora), folder / "unnamed.safetensors")
    for name in KNOWN:
        (folder / f"{name}.safetensors").symlink_to("unnamed.safetensors")
    save_file(kohya(make_lora(unet, seed=2)), folder / "style.safetensors")
    partly = {k.replace("mid_block", "far_block"): v for k, v in kohya(lora).items()}
    save_file(partly, folder / "partly.safetensors", recipe)
    save_file(_of_another_family(lora), folder / "sdxl.safetensors")
    nowhere = {
        k.replace("blocks", "towers").replace("conv_in", "gate"): v for k, v in kohya(lora).items() if "mid" not in k
    }
    save_file(nowhere, folder / "nowhere.safetensors")
    whole = (folder / "kohya.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    return lora


def _of_another_family(lora: Lora) -> dict[str, Tensor]:
    """The same names with SDXL's text width: a file that the host would patch in part without a word."""
    wide = {}
    for name, (down, up) in lora.items():
        wide[name] = (torch.zeros(RANK, 2048) if re.search(r"attn2\.to_[kv]", name) else down, up)
    return kohya(wide)


def make_controlnet(path: Path, unet: UNet2DConditionModel) -> None:
    """Write a ControlNet: the UNet's first half, a picture encoder, and outputs that are not zero as in training."""
    generator = torch.Generator().manual_seed(3)
    half = {k: v for k, v in ldm_unet(unet).items() if k.startswith(("input_blocks", "middle_block", "time_embed"))}
    blocks = 1 + max(int(k.split(".")[1]) for k in half if k.startswith("input_blocks"))
    convolutions = {f"zero_convs.{i}.0": (320, 320, 1, 1) for i in range(blocks)} | {
        "middle_block_out.0": (320, 320, 1, 1)
    }
    widths = (3, 16, 16, 32, 32, 96, 96, 256, 320)
    for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        convolutions[f"input_hint_block.{2 * i}"] = (after, before, 3, 3)
    for name, shape in convolutions.items():
        half[f"{name}.weight"] = torch.randn(shape, generator=generator) / torch.Size(shape[1:]).numel() ** 0.5
        half[f"{name}.bias"] = torch.zeros(shape[0])
    save_file({f"control_model.{k}": v.detach().clone().contiguous() for k, v in half.items()}, path)
