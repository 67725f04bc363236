"""Plans of full size, made without a weight but in seconds, and a checkpoint with every layer of an SD1.5."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.families.sd15 import SD15
from phased_consistency.trainer.training.plan import plan
from support.ldm_checkpoint import save_single_file

# By part, what makes an SD1.5 a tenth as wide: its text conditioning stays, by which a file's family is told.
NARROW = {
    "unet": {"block_out_channels": [32, 64, 128, 128], "sample_size": 8},  # and what self-test and check look at
    "vae": {"block_out_channels": [32, 64, 128, 128]},
    "text_encoder": {"intermediate_size": 320},
}


def planned(preset: str) -> dict[str, Any]:
    """The plan of a preset as it is shipped."""
    return plan(load_config(preset=preset))


def whole_sd15(path: Path, configs: Path) -> Path:
    """Write an SD1.5 as one file in fp16, and its configs into a folder: with all of its layers, each a tenth as wide.
    Returns the path."""
    shutil.copytree(SD15.configs, configs)
    for part, narrow in NARROW.items():
        file = configs / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | narrow))
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    return save_single_file(path, **{part: _random(kind, configs / part) for part, kind in kinds.items()})


def _random(kind: type[nn.Module], folder: Path) -> nn.Module:
    """One of SD1.5's networks in fp16 with cheap random weights; the norms stay what they are."""
    config = json.loads((folder / "config.json").read_text())
    make = (
        partial(CLIPTextModel, CLIPTextConfig(**config)) if kind is CLIPTextModel else partial(kind.from_config, config)
    )
    with torch.device("meta"):
        module = make()
    module.half().to_empty(device="cpu")
    noise = (0.02 * torch.randn(2**20)).half()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if tensor.ndim == 1:
                tensor.fill_(name.endswith("weight"))
            else:
                tensor.copy_(noise.repeat(-(-tensor.numel() // len(noise)))[: tensor.numel()].view_as(tensor))
    return module
