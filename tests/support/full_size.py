"""Plans of full size, made without a weight but in seconds, and a checkpoint with every layer of an SD1.5."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from phased_consistency.trainer.bench.gpu.bases import random_part
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
    return save_single_file(
        path, **{part: random_part(kind, configs / part, torch.float16) for part, kind in kinds.items()}
    )
