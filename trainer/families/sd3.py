"""SD3-medium, SD3.5-medium, SD3.5-large and their fine-tunes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from ...samplers import FlowSchedule
from ..tiny.bundled import check_side, check_words
from ..tiny.single_file import has_swapped_halves
from . import loading
from .base import TOKENS, Base, BaseFacts, Condition, side_multiple
from .clip import text_states
from .sd3_loading import (
    T5_LENGTH,
    find_folder,
    find_in_file,
    folder_parts,
    single_file_parts,
    tokenizers_from,
    variant,
    weights_of,
)

# PCM's adversarial SD3 list without its slip, which left add_q_proj, add_k_proj and add_v_proj out: 340
# modules on SD3-medium, 392 on SD3.5-medium (its attn2 too), 536 on SD3.5-large. ComfyUI maps every one of
# them, with scale and shift of the last block's norm1_context swapped as its own layout has them.
LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "norm1.linear",
    "norm1_context.linear",
    "timestep_embedder.linear_1",
    "timestep_embedder.linear_2",
    "text_embedder.linear_1",
    "text_embedder.linear_2",
    "context_embedder",
    "pos_embed.proj",
    "proj_out",
)
FEATURES = 4  # feature maps for a discriminator; PCM's has one at each of the 24 blocks, at 113 M parameters


@dataclass
class SD3(Base):
    """CLIP-L, CLIP-bigG and perhaps T5-XXL; a transformer that predicts the flow.

    Without T5 its tokens are left out, as in ComfyUI. diffusers puts zeros in their place, which the
    transformer attends to, so that it draws other pictures without T5.

    t5_length: tokens of T5 in a prompt, cut or padded: 77 as in PCM's training and as ComfyUI pads short
    prompts (it lets long ones be longer); diffusers' pipeline takes 256 unless told otherwise.
    """

    network: SD3Transformer2DModel
    t5_length: int = T5_LENGTH

    name = "sd3"
    title = "SD3"
    network_class = SD3Transformer2DModel
    component = "transformer"
    configs = loading.CONFIGS / "sd3"
    lora_targets = LORA_TARGETS
    lora_parts = {"lora_A": "lora_A", "lora_B": "lora_B"}
    stores_alpha = False
    channels_last = False
    text_prefixes = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
    fuses_qkv = True
    parity_options = {"t5": False}  # 19 GB in fp32
    published_in_low_precision = True

    @property
    def architecture(self) -> str:
        """ModelSpec's name of the architecture, which differs between SD3 and SD3.5."""
        return f"stable-diffusion-v{self._version}/lora"

    @property
    def base_version(self) -> str:
        return f"sd{self._version}".replace("-", "_")

    @property
    def _version(self) -> str:
        """Which SD3 it is, by what its transformer has: "3-medium", "3.5-medium" or "3.5-large"."""
        if not self.network.config.qk_norm:
            return "3-medium"
        return "3.5-medium" if self.network.config.dual_attention_layers else "3.5-large"

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tokenizer: str | None = None,
        config: str | None = None,
        parts: str | None = None,
        prediction: str | None = None,
        zero_terminal_snr: bool | None = None,
        null: str | None = None,
        in_turn: bool = False,
        shift: float | None = None,
        t5: bool | None = None,
        t5_length: int | None = None,
    ) -> SD3:
        """Load from a diffusers folder, a single .safetensors file as shared on Civitai, or a hub id.

        dtype: of the frozen transformer. VAE and CLIP stay in fp32; T5, 19 GB so, is in bf16 on a GPU, where
        it was trained (fp16 overflows).
        tokenizer: folder with CLIP's vocab.json and merges.txt, and T5's tokenizer in its tokenizer_3 folder.
        config: folder of component configs for an unusual single file; default: those shipped here.
        parts: diffusers folder, bundled base or hub id that supplies what a single file lacks.
        prediction, zero_terminal_snr: other families' settings, which may say what is true of SD3 and no more.
        null: see `Base`.
        in_turn: network and text encoders are on the device in turn, and wait on the CPU.
        shift: time shift in place of the scheduler's.
        t5: whether to use T5; default: where the base has it. t5_length: see the class.
        Raises FileNotFoundError or ValueError, naming what was looked for and what to do.
        """
        check_flow(prediction, zero_terminal_snr)
        t5_dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        if loading.is_single_file(path):
            contents = single_file_parts(Path(path), config, parts, tokenizer, t5, dtype, t5_dtype)
        else:
            contents = folder_parts(path, tokenizer, t5, dtype, t5_dtype)

        for module in (contents.transformer, contents.vae, *contents.text_encoders):
            module.to("cpu" if in_turn else device).requires_grad_(False).eval()
        return cls(
            network=contents.transformer,
            vae=contents.vae,
            text_encoders=contents.text_encoders,
            tokenizers=contents.tokenizers,
            schedule=FlowSchedule(shift or read_shift(contents.scheduler)),
            prediction="flow",
            zero_terminal_snr=False,
            null=null or "empty",
            path=path,
            base_hash=contents.base_hash,
            supplied=contents.supplied,
            turns=torch.device(device) if in_turn else None,
            t5_length=t5_length or T5_LENGTH,
        )

    @classmethod
    def look(
        cls,
        path: str,
        *,
        tokenizer: str | None = None,
        config: str | None = None,
        parts: str | None = None,
        prediction: str | None = None,
        zero_terminal_snr: bool | None = None,
        null: str | None = None,
        shift: float | None = None,
        t5: bool | None = None,
        t5_length: int | None = None,
    ) -> BaseFacts:
        check_flow(prediction, zero_terminal_snr)
        if loading.is_single_file(path):
            places = find_in_file(Path(path), config, parts, t5, download=False)
            if places.other or not parts:  # else its tokenizers come from the hub, with the rest of `parts`
                tokenizers_from(tokenizer, [places.other, places.configs], path, places.t5)
            scheduler, use_t5 = places.scheduler, places.t5
        elif Path(path).is_dir() or not loading.is_hub_id(path):
            root, use_t5 = find_folder(path, t5)
            loading.check_weights(root, weights_of(use_t5))
            tokenizers_from(tokenizer, [root], path, use_t5)
            scheduler = root / "scheduler" / "scheduler_config.json"
        else:
            scheduler, use_t5 = cls.configs / "scheduler" / "scheduler_config.json", t5 is not False
        return BaseFacts(
            cls,
            path,
            "flow",
            False,
            shift or read_shift(scheduler),
            assumed=not Path(path).exists(),
            tokens=TOKENS + (t5_length or T5_LENGTH) * use_t5,
        )

    @property
    def encoder_settings(self) -> str:
        t5 = f"T5 of {self.t5_length} tokens" if len(self.tokenizers) > 2 else "no T5"
        return f"{t5}, {super().encoder_settings}" if self.supplied else t5

    @property
    def token_limits(self) -> list[int]:
        return [*super().token_limits[:2], *[self.t5_length] * (len(self.tokenizers) - 2)]

    @classmethod
    def check_prompts(cls, path: str, prompts: Iterable[str]) -> None:
        check_words(path, prompts)

    @classmethod
    def check_side(cls, path: str, side: int) -> None:
        check_side(path, side)

    def _encode_prompts(self, prompts: list[str]) -> Condition:
        """Prompts -> {"hidden": (B, 77 [+ t5_length], 4096), "pooled": (B, 2048)}.

        hidden: both CLIPs' last but one hidden states side by side and zeros beyond, then T5's states. Longer
        prompts are cut at 77 tokens, T5's at t5_length. Raises ValueError for words that the emoji base does not know.
        """
        self.check_prompts(self.path, prompts)
        clips = zip(self.text_encoders[:2], self.tokenizers[:2], strict=True)
        (first, pooled), (second, pooled_2) = (text_states(*clip, prompts, -2) for clip in clips)
        hidden = torch.cat([first, second], -1)
        hidden = F.pad(hidden, (0, self.network.config.joint_attention_dim - hidden.shape[-1]))
        if len(self.text_encoders) > 2:
            hidden = torch.cat([hidden, self._t5_states(prompts)], 1)
        return {"hidden": hidden, "pooled": torch.cat([pooled, pooled_2], -1)}

    @torch.no_grad()
    def _t5_states(self, prompts: list[str]) -> Tensor:
        """T5's last hidden states (B, t5_length, 4096) in fp32."""
        encoder = self.text_encoders[2]
        tokenizer = self.tokenizers[2]
        length = self.t5_length
        ids = tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return encoder(ids.to(encoder.device))[0].float()

    def _denoise(self, x: Tensor, tick: Tensor, condition: Condition) -> Tensor:
        dtype = self.dtype
        return self.network(
            x.to(dtype),
            condition["hidden"].to(dtype),
            condition["pooled"].to(dtype),
            self.schedule.network_time(tick).to(x.device),
        ).sample.float()

    @staticmethod
    def feature_blocks(network: SD3Transformer2DModel) -> list[nn.Module]:
        """Four blocks, evenly spaced up to two thirds of the depth: 4, 8, 12 and 16 of SD3-medium's 24."""
        last = max(1, round(network.config.num_layers * 2 / 3))
        layers = sorted({max(1, round(last * k / FEATURES)) - 1 for k in range(1, FEATURES + 1)})
        return [network.transformer_blocks[i] for i in layers]

    @staticmethod
    def feature_map(network: SD3Transformer2DModel, output, x: Tensor) -> Tensor:
        patch = network.config.patch_size
        return output[1].transpose(1, 2).unflatten(2, (x.shape[2] // patch, x.shape[3] // patch))

    @staticmethod
    def latent_shape_of(network_config, resolution: int) -> tuple[int, int, int]:
        multiple = network_config.patch_size * 8
        side_multiple(resolution, multiple)
        largest = network_config.pos_embed_max_size * multiple
        if resolution > largest:
            raise ValueError(
                f"resolution {resolution} is beyond this SD3's position embeddings: use at most {largest}."
            )
        return network_config.in_channels, resolution // 8, resolution // 8

    @staticmethod
    def dummy_condition(network_config, make: Callable[..., Tensor], tokens: int | None = None) -> Condition:
        return {
            "hidden": make(1, tokens or TOKENS + T5_LENGTH, network_config.joint_attention_dim),
            "pooled": make(1, network_config.pooled_projection_dim),
        }

    @classmethod
    def dummy_inputs(
        cls, network_config, resolution: int, make: Callable[..., Tensor], tokens: int | None = None
    ) -> dict[str, Any]:
        condition = cls.dummy_condition(network_config, make, tokens)
        return {
            "hidden_states": make(1, *cls.latent_shape_of(network_config, resolution)),
            "encoder_hidden_states": condition["hidden"],
            "pooled_projections": condition["pooled"],
            "timestep": make(1),
        }

    @classmethod
    def config_folder(cls, path: str, config: str | None) -> Path:
        if config is None and loading.is_single_file(path):
            return loading.CONFIGS / variant(loading.checkpoint_header(Path(path)).tensors)
        return super().config_folder(path, config)

    @staticmethod
    def lora_key(module: str) -> str:
        """Transformer module path -> diffusers' module name."""
        return "transformer." + module

    def host_rows(self, module: str, rows: Tensor) -> Tensor:
        # what is added to a weight ComfyUI turns round by itself, but not the magnitudes
        config = self.network.config
        width = config.num_attention_heads * config.attention_head_dim
        return torch.cat(rows.chunk(2)[::-1]) if has_swapped_halves(module, len(rows), width) else rows

    def load_lora(self, state: dict[str, Tensor], metadata: dict[str, Any] | None, name: str) -> None:
        state = StableDiffusion3Pipeline.lora_state_dict(state)
        # as the pipeline's load_lora_weights does: what comes after would pass over other tensors, alphas
        # above all
        strange = next((key for key in state if "lora" not in key), None)
        if strange is not None:
            raise ValueError(f"diffusers refuses SD3 LoRAs with tensors such as {strange}.")
        StableDiffusion3Pipeline.load_lora_into_transformer(state, self.network, adapter_name=name, metadata=metadata)


def check_flow(prediction: str | None, zero_terminal_snr: bool | None) -> None:
    """Raise ValueError for settings that only SD1.5 and SDXL have."""
    if prediction not in (None, "flow"):
        raise ValueError(f"base.prediction is {prediction!r}, but SD3 predicts the flow: leave it out, or say 'flow'.")
    if zero_terminal_snr:
        raise ValueError("base.zero_terminal_snr is for SD1.5 and SDXL: a flow model always ends in pure noise.")


def read_shift(path: Path) -> float:
    """A scheduler config's time shift. Raises ValueError for a scheduler that is not plain flow matching."""
    config = loading.read_config(path)
    if not str(config.get("_class_name")).startswith("FlowMatch") or config.get("use_dynamic_shifting"):
        raise ValueError(
            f"{path} is a {config.get('_class_name')} with dynamic shifting {bool(config.get('use_dynamic_shifting'))};"
            " SD3 has FlowMatchEulerDiscreteScheduler without. Set base.shift (3 for SD3), or mend the file."
        )
    shift = config.get("shift", 1.0)
    if not isinstance(shift, int | float) or not 0 < shift < 1000:
        raise ValueError(f"{path} has shift {shift!r:.30}; expected a number above 0, 3 for SD3. Mend it.")
    return shift
