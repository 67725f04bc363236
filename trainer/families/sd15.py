"""SD1.5 and its fine-tunes."""

from __future__ import annotations

from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from . import loading
from .base import Condition
from .clip import text_states
from .unet import UNetBase
from .unet_loading import TextEncoder


class SD15(UNetBase):
    """One CLIP text encoder, whose last hidden states are the prompt; eps- or v-prediction."""

    name = "sd15"
    title = "SD1.5"
    architecture = "stable-diffusion-v1/lora"
    base_version = "sd_1.5"
    pipeline = StableDiffusionPipeline
    configs = loading.CONFIGS / "sd15"
    encoders = (TextEncoder("text_encoder", "CLIP-L text encoder", CLIPTextModel, "cond_stage_model.transformer."),)
    usual_null = "empty"
    text_prefixes = {"text_encoder": "lora_te_"}

    def _encode_prompts(self, prompts: list[str]) -> Condition:
        """Prompts -> {"hidden": (B, 77, C)}, the last hidden states. Longer prompts are cut at 77 tokens."""
        return {"hidden": text_states(self.text_encoders[0], self.tokenizers[0], prompts, -1)[0]}
