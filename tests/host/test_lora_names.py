"""Every module of the full-size models that a PCM LoRA adapts, by the names written for it: the hosts map them all."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from host.sd3_checkpoint import sd3_transformer
from host.server import environment, hosts, python_of
from ldm_checkpoint import ldm_unet

SDXL_TARGETS = (
    r"to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|"
    r"resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|(down|up)samplers\.0\.conv"
)
# PCM's for SD3, with the context's q, k, v (its own list misses them by a leading dot) and SD3.5's second attention
SD3_TARGETS = (
    r"to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|ff(_context)?\.net\.(0\.proj|2)|"
    r"norm1(_context)?\.linear|context_embedder|(timestep|text)_embedder\.linear_[12]|^proj_out|pos_embed\.proj"
)


def sdxl() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        sample_size=128,
    )


def sd3(depth: int, **options) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        num_layers=depth,
        num_attention_heads=depth,
        attention_head_dim=64,
        joint_attention_dim=4096,
        caption_projection_dim=64 * depth,
        pooled_projection_dim=2048,
        **options,
    )


MODELS = {
    "sdxl": (sdxl, "SDXL", 788),
    "sd3-medium": (lambda: sd3(24, pos_embed_max_size=192), "SD3", 340),
    "sd3.5-medium": (
        lambda: sd3(24, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
        "SD3",
        340 + 13 * 4,
    ),
    "sd3.5-large": (lambda: sd3(38, pos_embed_max_size=192, qk_norm="rms_norm"), "SD3", 536),
}


def names(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """LoRA name, as the trainer writes it -> shape of the weight, for every module that is adapted."""
    unet = isinstance(model, UNet2DConditionModel)
    targets = re.compile(rf"(^|\.)({SDXL_TARGETS if unet else SD3_TARGETS})\.weight$")
    shapes = {
        k.removesuffix(".weight"): tuple(v.shape)
        for k, v in model.state_dict().items()
        if targets.search(k) and v.ndim > 1
    }
    return {f"lora_unet_{k.replace('.', '_')}" if unet else f"transformer.{k}": v for k, v in shapes.items()}


@pytest.mark.parametrize("folder", hosts() or [None], ids=lambda p: p.parent.name if p else "none")
@pytest.mark.parametrize("size", MODELS)
def test_the_host_maps_every_module(folder, size):
    """By name, and to a weight (or rows of a fused one) of the module's own shape."""
    make, kind, count = MODELS[size]
    with torch.device("meta"):
        model = make()
    ours = names(model)
    assert len(ours) == count
    weights = ldm_unet(model) if kind == "SDXL" else sd3_transformer(model)
    question = {"weights": {k: tuple(v.shape) for k, v in weights.items()}, "names": list(ours)}
    script = str(Path(__file__).with_name("lora_targets.py"))
    command = [python_of(folder), script, str(folder)]
    options = {"capture_output": True, "text": True, "timeout": 240, "cwd": folder, "env": environment()}
    run = subprocess.run(command, input=json.dumps(question), **options)
    assert run.returncode == 0, run.stderr[-2000:]
    answer = json.loads(run.stdout)
    assert answer["kind"] == kind
    assert {name: shape for name, shape in answer["shapes"].items() if shape is None} == {}
    flat = {name: (shape[0], torch.Size(shape[1:]).numel()) for name, shape in answer["shapes"].items()}
    assert flat == {name: (shape[0], torch.Size(shape[1:]).numel()) for name, shape in ours.items()}
