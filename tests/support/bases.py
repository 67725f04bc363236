"""Small random bases for tests, written as diffusers folders, and their parts; trained and sampled in seconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    SD3Transformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from phased_consistency.trainer.bench.gpu.bases import SPECKS
from phased_consistency.trainer.bench.gpu.bases import TINY as BUNDLED
from phased_consistency.trainer.tiny.bundled import bundled_folder

WIDTH_L, WIDTH_G, POOLED = 32, 48, 40


def make_speck(path: Path, family: str = "sd15") -> None:
    """Write the smallest base of a family that has one of each kind of layer: the bundled one, with a random network in
    place of its own, which has a fifth of the modules (half, for SD3) and trains four times as fast."""
    bundled, network = bundled_folder(BUNDLED[family]), "transformer" if family == "sd3" else "unet"
    shutil.copytree(bundled, path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(network))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = json.loads((bundled / network / "config.json").read_text())
        speck = (SD3Transformer2DModel if family == "sd3" else UNet2DConditionModel).from_config(
            config | SPECKS[family]
        )
        with torch.no_grad():
            for weight in speck.parameters():
                weight.add_(0.05 * torch.randn(weight.shape))
    speck.save_pretrained(path / network)


def make_sdxl_parts(words: CLIPTokenizer) -> SimpleNamespace:
    """A random SDXL by its pipeline's names, no weight left at zero: SDXL's kinds of block, and 64 pixels its size."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=WIDTH_L + WIDTH_G,
        attention_head_dim=(2, 4, 4),
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=POOLED + 6 * 16,
    )
    parts = SimpleNamespace(
        unet=unet,
        vae=make_vae(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(clip_config(words, WIDTH_L)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(words, WIDTH_G, POOLED, hidden_act="gelu")),
    )
    with torch.no_grad():
        for weight in (p for module in vars(parts).values() for p in module.parameters()):
            weight.add_(0.05 * torch.randn(weight.shape))
    for module in vars(parts).values():
        module.requires_grad_(False).eval()
    return parts


def make_vae(levels: int = 4, **changes) -> AutoencoderKL:
    """A narrow random autoencoder; `changes` are further settings of its config."""
    return AutoencoderKL(
        block_out_channels=(32,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **changes,
    )


def clip_config(words: CLIPTokenizer, width: int, pooled: int = 512, **changes) -> CLIPTextConfig:
    """A small CLIP's config for the words of this tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=pooled,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        **changes,
    )


def make_sdxl_folder(path: Path, words: CLIPTokenizer, **scheduler) -> SimpleNamespace:
    """Write the diffusers folder; `scheduler` changes the scheduler's config. Returns the parts."""
    parts = make_sdxl_parts(words)
    make_sdxl_pipeline(parts, words, **scheduler).save_pretrained(path)
    return parts


def make_sdxl_pipeline(parts: SimpleNamespace, words: CLIPTokenizer, **scheduler) -> StableDiffusionXLPipeline:
    """The parts as diffusers puts them together."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return StableDiffusionXLPipeline(
        **vars(parts),
        scheduler=DDIMScheduler(**betas, **scheduler),
        tokenizer=words,
        tokenizer_2=second_tokenizer(words),
        add_watermarker=False,
    )


def second_tokenizer(words: CLIPTokenizer) -> CLIPTokenizer:
    """The same words for the second CLIP of SDXL and SD3, which pads with token 0."""
    second = CLIPTokenizer.from_pretrained(words.name_or_path)
    second.pad_token = "!"
    return second


def save_without(checkpoint: Path, path: Path, prefix: str | tuple[str, ...]) -> Path:
    """Write a checkpoint at `path` without the weights whose names start so. Returns the path."""
    save_file({k: v for k, v in load_file(checkpoint).items() if not k.startswith(prefix)}, path)
    return path
