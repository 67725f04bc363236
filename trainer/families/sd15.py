"""SD1.5 and its fine-tunes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from ...samplers.lora_file import file_hash
from . import loading
from .base import Condition
from .clip import text_states
from .unet import UNetBase

WEIGHTS = ("unet", "vae", "text_encoder")


class SD15(UNetBase):
    """One CLIP text encoder, whose last hidden states are the prompt; eps- or v-prediction."""

    name = "sd15"
    architecture = "stable-diffusion-v1/lora"
    base_version = "sd_1.5"
    pipeline = StableDiffusionPipeline
    configs = loading.CONFIGS / "sd15"
    components = (*WEIGHTS, "tokenizer", "scheduler")

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tokenizer: str | None = None,
        config: str | None = None,
        prediction: str | None = None,
        zero_terminal_snr: bool | None = None,
        null: str | None = None,
    ) -> SD15:
        """Load from a diffusers folder, a single .safetensors file as shared on Civitai, or a hub id.

        dtype: of the frozen UNet; the encoders stay in fp32, where they cannot overflow.
        tokenizer: folder with vocab.json and merges.txt, where the base has none.
        config: folder of diffusers component configs for an unusual single file (default: SD1.5's own, shipped here).
        prediction, zero_terminal_snr: override what the base's scheduler config says. null: see `Base`.
        Raises FileNotFoundError or ValueError, naming what was looked for and what to do.
        """
        if path.endswith(".safetensors"):
            root = Path(config) if config else cls.configs
            unet, vae, text_encoder = _load_single_file(Path(path), root, dtype)
            base_hash = file_hash(path)
        else:
            root = loading.diffusers_folder(path, cls.components, "SD1.5")
            unet = loading.load_part(root, "unet", cls.network_class, dtype)
            vae = loading.load_vae(root)
            text_encoder = loading.load_part(root, "text_encoder", CLIPTextModel, torch.float32)
            base_hash = loading.folder_hash(root, WEIGHTS)
        betas, told, told_zero = loading.read_vp_scheduler(root / "scheduler" / "scheduler_config.json")
        zero_snr = told_zero if zero_terminal_snr is None else zero_terminal_snr
        unet.to(memory_format=torch.channels_last)
        for module in (unet, vae, text_encoder):
            module.to(device).requires_grad_(False).eval()
        return cls(
            network=unet,
            vae=vae,
            text_encoders=[text_encoder],
            tokenizers=[loading.load_clip_tokenizer(tokenizer or root / "tokenizer", path)],
            schedule=loading.vp_schedule(betas, zero_snr),
            prediction=prediction or told,
            zero_terminal_snr=zero_snr,
            null=null or "empty",
            path=path,
            base_hash=base_hash,
        )

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Prompts -> {"hidden": (B, 77, C)}, the last hidden states. Longer prompts are cut at 77 tokens."""
        return {"hidden": text_states(self.text_encoders[0], self.tokenizers[0], prompts, -1)[0]}


def _load_single_file(path: Path, config: Path, dtype: torch.dtype):
    names = loading.checkpoint_header(path).tensors
    _check_context_width(path, names, config)
    text = loading.read_tensors(path, names, "cond_stage_model.transformer.")
    if not text:
        raise ValueError(
            f"{path.name} holds no text encoder (cond_stage_model.*). Give a full checkpoint, or a diffusers folder."
        )
    unet = loading.convert_part(path, config, "unet", SD15.network_class, dtype)
    vae = loading.convert_part(path, config, "vae", AutoencoderKL, torch.float32)
    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(config / "text_encoder"))
    return unet, vae, loading.fill(text_encoder, text, path, "text encoder")


def _check_context_width(path: Path, names: dict, config: Path) -> None:
    """Another family's UNet would fail deep inside the conversion; say it here in words."""
    wanted = json.loads((config / "unet" / "config.json").read_text())["cross_attention_dim"]
    width = next((i.shape[-1] for n, i in names.items() if n.endswith("attn2.to_k.weight")), None)
    if width != wanted:
        families = {768: "SD1.5", 1024: "SD2", 2048: "SDXL"}
        raise ValueError(
            f"{path.name} has text conditioning {width} wide, which is {families.get(width, 'an unknown family')}; "
            f"base.family sd15 needs {wanted}. Choose an SD1.5 checkpoint, or set base.config to a folder with this "
            "model's configs."
        )
