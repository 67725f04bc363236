"""A family of small networks that draw pixels, without a VAE or a text encoder, and start from random weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn

from ...samplers import VPSchedule
from ...samplers.lora_file import file_hash
from ..system.files import write_tensors
from ..tiny.digits import DIGITS, NAME
from . import loading
from . import prediction as predictions
from .base import Alone, Base, BaseFacts, Condition, side_multiple

# Mean and spread of the drawn digits' pixels in [-1, 1]; taken off, latents have about 0 and 1.
MEAN, SPREAD = -0.6, 0.7
# Side of the squares of pixels that are the latents' channels: convolutions are cheaper on fewer, wider
# points.
PATCH = 2
EMPTY = len(DIGITS)  # the label of the empty prompt
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


class Pixels(Base):
    """A class-conditional UNet on grey pixels, on SD1.5's VP schedule, which predicts v.

    With v, x0 = alpha x - sigma v: the boundary condition holds at the clean end, and it is EDM's
    preconditioning (arXiv 2206.00364, Table 1) for data of unit spread. A prompt is one of the digits, or
    empty for any of them. The base "digits" is the network with random weights, always the same ones; a
    folder that `save` wrote is a trained one.
    """

    network: UNet2DModel
    name = "pixels"
    title = "a network for small pictures"
    network_class = UNet2DModel
    component = "unet"
    configs = loading.CONFIGS / "pixels"
    lora_targets = ()
    whole = True
    alone = Alone(guidance=1.0, gamma=1.0)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        in_turn: bool = False,
    ) -> Pixels:
        """Load "digits", with random weights, or a folder. Raises FileNotFoundError or ValueError for a bad one.

        dtype: of the forward pass, by autocast; the weights are to be trained, and stay in fp32. in_turn: as
        for other families, where it has no effect here, as there are no encoders that could wait.
        """
        if path == NAME:
            root = cls.configs
            network = _random(cls.configs)
            base_hash = file_hash(root / "unet" / "config.json")
        else:
            root = loading.diffusers_folder(path, ("unet", "scheduler"), cls.title)
            network = loading.load_part(root, "unet", UNet2DModel, torch.float32)
            base_hash = loading.folder_hash(root, ["unet"])

        betas, mark = predictions.found_in_scheduler(root / "scheduler" / "scheduler_config.json")
        network.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
        schedule = VPSchedule.from_betas(**betas, zero_terminal_snr=mark.zero_terminal_snr)
        return cls(network, None, [], [], schedule, mark.prediction, mark.zero_terminal_snr, "empty", path, base_hash)

    @classmethod
    def look(cls, path: str) -> BaseFacts:
        if path == NAME:
            root = cls.configs
        else:
            root = loading.diffusers_folder(path, ("unet", "scheduler"), cls.title)
            loading.check_weights(root, ["unet"])
        _, mark = predictions.found_in_scheduler(root / "scheduler" / "scheduler_config.json")
        return BaseFacts(cls, path, mark.prediction, mark.zero_terminal_snr, tokens=None)

    @classmethod
    def check_prompts(cls, path: str, prompts: Iterable[str]) -> None:
        other = next((prompt for prompt in prompts if prompt and prompt not in DIGITS), None)
        if other is not None:
            raise ValueError(
                f"{other!r} is no prompt of {Path(path).name}: it knows the digits {', '.join(DIGITS)}, and the "
                "empty prompt for any of them."
            )

    @property
    def untrained(self) -> bool:
        return self.path == NAME

    def save(self, folder: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Write the network with these weights as a diffusers folder.

        All files are written into a folder beside it, which then takes its name: what has the name is whole.
        """
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed here
        self.network.save_config(part / "unet")
        shutil.copytree(self.configs / "scheduler", part / "scheduler")
        write_tensors(part / WEIGHTS, weights, {"format": "pt", **metadata})
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)

    @property
    def default_resolution(self) -> int:
        return self.network.config.sample_size * PATCH

    def drop_encoders(self) -> None:
        """Nothing to drop: this family has no encoders."""

    def _encode_prompts(self, prompts: list[str]) -> Condition:
        """Prompts -> {"label": (B,)}: the digit, or ten for any. Raises ValueError for other words."""
        self.check_prompts(self.path, prompts)
        return {"label": torch.tensor([DIGITS.index(p) if p else EMPTY for p in prompts], device=self.device).float()}

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Pixels (B, 3, H, W) in [-1, 1] -> latents (B, 4, H/2, W/2): grey, scaled, 2 x 2 pixels a point."""
        grey = pixels.mean(1, keepdim=True)
        return F.pixel_unshuffle((grey - MEAN) / SPREAD, PATCH), None

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) -> pixels (B, 3, 2h, 2w) in [0, 1], on the CPU."""
        grey = F.pixel_shuffle(latents.float().cpu(), PATCH) * SPREAD + MEAN
        return grey.add(1).div(2).clamp(0, 1).expand(-1, 3, -1, -1)

    def _denoise(self, x: Tensor, tick: Tensor, condition: Condition) -> Tensor:
        time = self.schedule.network_time(tick).to(x.device)
        return self.network(x, time, class_labels=condition["label"].long()).sample.float()

    @staticmethod
    def latent_shape_of(network_config, resolution: int) -> tuple[int, int, int]:
        side_multiple(resolution, PATCH * 2 ** (len(network_config.block_out_channels) - 1))
        return network_config.in_channels, resolution // PATCH, resolution // PATCH

    @staticmethod
    def dummy_condition(network_config, make: Callable[..., Tensor], tokens: int | None = None) -> Condition:
        return {"label": make(1)}

    @classmethod
    def dummy_inputs(
        cls, network_config, resolution: int, make: Callable[..., Tensor], tokens: int | None = None
    ) -> dict[str, Any]:
        sample = make(1, *cls.latent_shape_of(network_config, resolution))
        label = cls.dummy_condition(network_config, make)["label"]
        return {"sample": sample, "timestep": make(1), "class_labels": label.long()}

    @staticmethod
    def feature_blocks(network: UNet2DModel) -> list[nn.Module]:
        raise ValueError("It is trained whole: there is no frozen network for a discriminator to look with.")

    @staticmethod
    def feature_map(network: UNet2DModel, output, x: Tensor) -> Tensor:
        return output

    @staticmethod
    def lora_key(module: str) -> str:
        raise ValueError("A network for small pictures is trained whole and takes no LoRA.")

    def load_lora(self, state: dict[str, Tensor], metadata: dict[str, Any] | None, name: str) -> None:
        raise ValueError("a network for small pictures is trained whole and takes no LoRA")


def _random(configs: Path) -> UNet2DModel:
    """The network with random weights, the same whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel.from_config(loading.read_config(configs / "unet" / "config.json"))
