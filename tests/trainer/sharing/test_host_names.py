"""Names that `pcm convert` writes and the trainer does not, SD3's in kohya's style: ComfyUI maps them all."""

import pytest
import torch

from host.lora_targets import ask
from host.server import hosts
from phased_consistency.samplers.lora_file import split_key
from phased_consistency.trainer.families.sd3 import SD3
from phased_consistency.trainer.sharing.names import kohya_name
from phased_consistency.trainer.tiny.single_file import sd3_transformer

SIZES = {"sd3": 340, "sd35-medium": 392, "sd35-large": 536}  # size -> modules that a LoRA of ours has


def network_of(size):
    """The full-size network, without weights."""
    with torch.device("meta"):
        return SD3.network_class.from_config(SD3.network_class.load_config(SD3.configs.parent / size / "transformer"))


@pytest.fixture(scope="module", params=hosts() or [None], ids=lambda path: path.parent.name if path else "none")
def mapped(request):
    """Size -> our names with the shapes of their weights, and those that one start of the host gives all of them."""
    ours, questions = {}, []
    for size in SIZES:
        network = network_of(size)
        ours[size] = names(network)
        weights = {name: tuple(weight.shape) for name, weight in sd3_transformer(network.state_dict()).items()}
        questions.append({"weights": weights, "names": list(ours[size])})
    answers = ask(request.param, questions)
    return {size: (ours[size], answer["shapes"]) for size, answer in zip(SIZES, answers, strict=True)}


def names(network):
    """LoRA name in kohya's style -> shape of the weight, for every module that the trainer adapts."""
    named = {n: m for n, m in network.named_modules() if f".{n}".endswith(tuple(f".{t}" for t in SD3.lora_targets))}
    return {kohya_name(f"transformer.{n}", SD3): list(m.weight.shape) for n, m in named.items()}


@pytest.mark.host
@pytest.mark.skipif(not hosts(), reason="no ComfyUI found: set COMFYUI_PATH to its folder")
@pytest.mark.parametrize("size", SIZES)
def test_the_host_maps_every_sd3_module_by_kohyas_names(size, mapped):
    """To a weight, or rows of a fused one, of the module's own shape."""
    ours, shapes = mapped[size]
    assert len(ours) == SIZES[size] and all(split_key(f"{name}.alpha") == (name, "alpha") for name in ours)
    flat = lambda shape: shape and (shape[0], torch.Size(shape[1:]).numel())  # noqa: E731
    assert {name: flat(shape) for name, shape in shapes.items()} == {name: flat(shape) for name, shape in ours.items()}
