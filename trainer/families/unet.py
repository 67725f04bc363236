"""What the two UNet families, SD1.5 and SDXL, share: the targets of their LoRAs, their features, their latents."""

from __future__ import annotations

from pathlib import Path

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from .base import Base, Condition, side_multiple

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
    """A base whose network is a `UNet2DConditionModel` on the VP schedule."""

    network: UNet2DConditionModel
    network_class = UNet2DConditionModel
    component = "unet"
    lora_targets = LORA_TARGETS
    lora_parts = {"lora_A": "lora_down", "lora_B": "lora_up"}

    def denoise(self, x: Tensor, tick: Tensor, condition: Condition) -> Tensor:
        dtype = self.network.dtype
        return self.network(
            x.to(dtype),
            self.schedule.network_time(tick).to(x.device),
            condition["hidden"].to(dtype),
            added_cond_kwargs=self.added_conditions(x, condition),
        ).sample.float()

    def added_conditions(self, x: Tensor, condition: Condition) -> dict[str, Tensor] | None:
        """What the UNet is told besides time and prompt."""
        return None

    def feature_blocks(self) -> list[nn.Module]:
        """The down blocks and the middle, as in PCM's SDXL discriminator: the up blocks are never run."""
        return [*self.network.down_blocks, self.network.mid_block]

    def feature_map(self, output, x: Tensor) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    @staticmethod
    def latent_shape_of(network_config, resolution: int) -> tuple[int, int, int]:
        side_multiple(resolution, 8 * 2 ** (len(network_config.block_out_channels) - 1))
        return network_config.in_channels, resolution // 8, resolution // 8

    @staticmethod
    def lora_key(module: str) -> str:
        """UNet module path -> kohya's module name."""
        return "lora_unet_" + module.replace(".", "_")

    def load_lora(self, path: Path, name: str) -> None:
        state, alphas = self.pipeline.lora_state_dict(str(path), unet_config=self.network.config)
        self.pipeline.load_lora_into_unet(state, alphas, self.network, adapter_name=name)
