"""Every module of the full-size models that a PCM LoRA adapts, by the names written for it: the hosts map them all."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from host.lora_targets import ask
from host.server import hosts
from phased_consistency.trainer import families
from phased_consistency.trainer.families.loading import CONFIGS
from phased_consistency.trainer.tiny.single_file import sd3_transformer
from support.ldm_checkpoint import ldm_unet

# size, a folder of `CONFIGS` -> family, the host's name for it, modules that a LoRA of ours has
MODELS = {
    "sdxl": ("sdxl", "SDXL", 788),
    "sd3": ("sd3", "SD3", 340),
    "sd35-medium": ("sd3", "SD3", 340 + 13 * 4),
    "sd35-large": ("sd3", "SD3", 536),
}


def network(family: str, size: str) -> nn.Module:
    """The full-size network, without weights."""
    kind, folder = (UNet2DConditionModel, "unet") if family == "sdxl" else (SD3Transformer2DModel, "transformer")
    with torch.device("meta"):
        return kind.from_config(kind.load_config(CONFIGS / size / folder))


def names(model: nn.Module, family: type[families.Base]) -> dict[str, tuple[int, ...]]:
    """LoRA name, as the trainer writes it -> shape of the weight, for every module that the trainer adapts."""
    adapted = [m for m, _ in model.named_modules() if any(f".{m}".endswith(f".{t}") for t in family.lora_targets)]
    return {family.lora_key(m): tuple(model.get_submodule(m).weight.shape) for m in adapted}


@pytest.fixture(scope="module", params=hosts() or [None], ids=lambda p: p.parent.name if p else "none")
def mapped(request) -> dict[str, tuple[dict[str, tuple[int, ...]], dict]]:
    """Size -> our names with the shapes of their weights, and what one start of the host says of all of them."""
    ours, questions = {}, []
    for size, (family, kind, _) in MODELS.items():
        model = network(family, size)
        ours[size] = names(model, families.FAMILIES[family])
        weights = ldm_unet(model) if kind == "SDXL" else sd3_transformer(model.state_dict())
        questions.append({"weights": {k: tuple(v.shape) for k, v in weights.items()}, "names": list(ours[size])})
    answers = ask(request.param, questions)
    return {size: (ours[size], answer) for size, answer in zip(MODELS, answers, strict=True)}


@pytest.mark.parametrize("size", MODELS)
def test_the_host_maps_every_module(size, mapped):
    """By name, and to a weight (or rows of a fused one) of the module's own shape."""
    _, kind, count = MODELS[size]
    ours, answer = mapped[size]
    assert len(ours) == count
    assert answer["kind"] == kind
    assert {name: shape for name, shape in answer["shapes"].items() if shape is None} == {}
    flat = {name: (shape[0], torch.Size(shape[1:]).numel()) for name, shape in answer["shapes"].items()}
    assert flat == {name: (shape[0], torch.Size(shape[1:]).numel()) for name, shape in ours.items()}
