"""The part that the two UNet families, SD1.5 and SDXL, share: loading, schedule, LoRA targets, features, latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from ...samplers import VPSchedule
from . import prediction as predictions
from .base import TOKENS, Base, BaseFacts, Condition, side_multiple
from .clip import clip_tokenizers
from .loading import check_weights, is_hub_id, is_single_file
from .unet_loading import TextEncoder, find_folder, find_in_file, folder_parts, single_file_parts, weights_of

# PCM's published targets (the set of LCM-LoRA): 278 modules on SD1.5, 788 on SDXL.
LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)


class UNetBase(Base):
    """A base whose network is a `UNet2DConditionModel` on the VP schedule, with eps- or v-prediction."""

    network: UNet2DConditionModel
    network_class = UNet2DConditionModel
    component = "unet"
    lora_targets = LORA_TARGETS
    lora_parts = {"lora_A": "lora_down", "lora_B": "lora_up"}

    pipeline: ClassVar[type[DiffusionPipeline]]
    encoders: ClassVar[tuple[TextEncoder, ...]]
    # What stands for "no prompt" in the published training: "zeros" or "empty".
    usual_null: ClassVar[str]

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
    ) -> UNetBase:
        """Load from a diffusers folder, a single .safetensors file as shared on Civitai, or a hub id.

        dtype: of the frozen UNet; the encoders stay in fp32, where they cannot overflow.
        tokenizer: folder with CLIP's vocab.json and merges.txt, where the base has none.
        config: folder of component configs for an unusual single file; default: the family's, shipped here.
        parts: diffusers folder, bundled base or hub id that supplies the VAE and the encoders that a file lacks.
        prediction, zero_terminal_snr: where the base does not say; they may not contradict it.
        null: see `Base`.
        in_turn: network and text encoders are on the device in turn, and wait on the CPU.
        Raises FileNotFoundError or ValueError, naming what was looked for and what to do.
        """
        if is_single_file(path):
            contents = single_file_parts(cls, Path(path), config, parts, tokenizer, dtype)
        else:
            contents = folder_parts(cls, path, tokenizer, dtype)

        betas, default = predictions.found_in_scheduler(contents.scheduler)
        kind, zero_snr = predictions.settle(contents.mark or default, default, prediction, zero_terminal_snr)
        contents.unet.to(memory_format=torch.channels_last)

        for module in (contents.unet, contents.vae, *contents.text_encoders):
            module.to("cpu" if in_turn else device).requires_grad_(False).eval()
        return cls(
            network=contents.unet,
            vae=contents.vae,
            text_encoders=contents.text_encoders,
            tokenizers=contents.tokenizers,
            schedule=VPSchedule.from_betas(**betas, zero_terminal_snr=zero_snr),
            prediction=kind,
            zero_terminal_snr=zero_snr,
            null=null or cls.usual_null,
            path=path,
            base_hash=contents.base_hash,
            supplied=contents.supplied,
            turns=torch.device(device) if in_turn else None,
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
    ) -> BaseFacts:
        mark = None
        if is_single_file(path):
            places = find_in_file(cls, Path(path), config, parts, download=False)
            if places.other or not parts:  # else its tokenizers come from the hub, with the rest of `parts`
                clip_tokenizers(tokenizer, [places.other, places.configs], path)
            scheduler, mark = places.scheduler, places.mark
        elif Path(path).is_dir() or not is_hub_id(path):
            root = find_folder(cls, path)
            check_weights(root, weights_of(cls))
            clip_tokenizers(tokenizer, [root], path)
            scheduler = root / "scheduler" / "scheduler_config.json"
        else:
            scheduler = cls.configs / "scheduler" / "scheduler_config.json"

        _, default = predictions.found_in_scheduler(scheduler)
        kind, zero_snr = predictions.settle(mark or default, default, prediction, zero_terminal_snr)
        return BaseFacts(cls, path, kind, zero_snr, assumed=not Path(path).exists())

    def misread(self) -> UNetBase:
        other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[self.prediction]
        # an eps network holds no picture where nothing but noise is left
        schedule = VPSchedule.from_betas() if self.zero_terminal_snr else self.schedule
        return replace(self, prediction=other, schedule=schedule, zero_terminal_snr=False)

    def check_prediction(self, x0: Tensor, condition: Condition) -> None:
        predictions.check(self, x0, condition)

    def _denoise(self, x: Tensor, tick: Tensor, condition: Condition) -> Tensor:
        dtype = self.dtype
        target_time = condition.get("target_time")
        return self.network(
            x.to(dtype),
            self.schedule.network_time(tick).to(x.device),
            condition["hidden"].to(dtype),
            timestep_cond=None if target_time is None else target_time.to(dtype),
            added_cond_kwargs=self.added_conditions(x, condition),
        ).sample.float()

    def target_time(self, tick: Tensor) -> Condition:
        """The end of a jump, as UNets with `time_cond_proj_dim` take it (LCM's full models put guidance there)."""
        width = self.network.config.time_cond_proj_dim
        if width is None:
            return {}
        return {"target_time": get_timestep_embedding(self.schedule.network_time(tick), width)}

    def added_conditions(self, x: Tensor, condition: Condition) -> dict[str, Tensor] | None:
        """Further inputs of the UNet besides time and prompt: SDXL's."""
        return None

    @staticmethod
    def feature_blocks(network: UNet2DConditionModel) -> list[nn.Module]:
        """The down blocks and the middle, as in PCM's SDXL discriminator: the up blocks are never run."""
        return [*network.down_blocks, network.mid_block]

    @staticmethod
    def feature_map(network: UNet2DConditionModel, output, x: Tensor) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    @staticmethod
    def latent_shape_of(network_config, resolution: int) -> tuple[int, int, int]:
        side_multiple(resolution, 8 * 2 ** (len(network_config.block_out_channels) - 1))
        return network_config.in_channels, resolution // 8, resolution // 8

    @staticmethod
    def dummy_condition(network_config, make: Callable[..., Tensor], tokens: int | None = None) -> Condition:
        return {"hidden": make(1, tokens or TOKENS, network_config.cross_attention_dim)}

    @classmethod
    def dummy_inputs(
        cls, network_config, resolution: int, make: Callable[..., Tensor], tokens: int | None = None
    ) -> dict[str, Any]:
        return {
            "sample": make(1, *cls.latent_shape_of(network_config, resolution)),
            "timestep": make(1),
            "encoder_hidden_states": cls.dummy_condition(network_config, make, tokens)["hidden"],
        }

    @staticmethod
    def lora_key(module: str) -> str:
        """UNet module path -> kohya's module name."""
        return "lora_unet_" + module.replace(".", "_")

    @classmethod
    def dora_names(cls, module: str) -> dict[str, str]:
        # of kohya's names diffusers drops the magnitudes, and of PEFT's ComfyUI drops attention; these, of attention's
        # processors, are older than both and read by both
        path = f"{cls.component}.{module}".replace(".to_out.0", ".to_out").replace(".to_", ".processor.to_")
        half = f"{path}_lora" if ".processor." in path else f"{path}.lora"
        return super().dora_names(module) | {
            "lora_A": f"{half}.down.weight",
            "lora_B": f"{half}.up.weight",
            "dora_scale": f"{path}.dora_scale",
        }

    def load_lora(self, state: dict[str, Tensor], metadata: dict[str, Any] | None, name: str) -> None:
        state, alphas = self.pipeline.lora_state_dict(state, unet_config=self.network.config)
        # diffusers takes one of the two: kohya's files have alphas, PEFT's have metadata
        metadata = None if alphas else metadata
        self.pipeline.load_lora_into_unet(state, alphas, self.network, adapter_name=name, metadata=metadata)
