"""`train.attention`: a kernel that is preferred in updates and nowhere else, and how fast each is here."""

import pytest
import torch
import torch.nn.functional as F

from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.efficiency.attention import KERNELS, kernel_seconds, preferring
from phased_consistency.trainer.efficiency.work import work_of
from phased_consistency.trainer.families import FAMILIES
from phased_consistency.trainer.training import checks
from phased_consistency.trainer.training.loop import train
from support.runs import small_config

CPU = torch.device("cpu")
SHAPE = torch.Size((2, 2, 16, 8))


def order() -> list[int]:
    """Torch's kernels in the order in which they are tried."""
    return torch._C._get_sdp_priority_order()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_preferred_and_the_others_follow_in_torch_s_order(kernel):
    before, first = order(), KERNELS[kernel].value
    with preferring(kernel):
        others = [KERNELS[name].value for name in KERNELS if name != kernel]
        assert order()[:3] == [first, *others]
        q, mask = torch.randn(SHAPE), torch.zeros(16, 16)
        assert F.scaled_dot_product_attention(q, q, q, mask).shape == SHAPE, "another kernel takes what it does not"
    assert order() == before
    with preferring(None):
        assert order() == before


def test_updates_alone_prefer_it(monkeypatch, tmp_path):
    """On a CPU, where the gate is left open for it, it changes no byte."""
    seen, attention = [], F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        seen.append((torch.is_grad_enabled(), order()[0]))
        return attention(*args, **kwargs)

    monkeypatch.setattr(checks, "_check_attention", lambda config, device: None)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    train(small_config(tmp_path, train__attention="cudnn", train__steps=1, preview__every=1))
    cudnn = KERNELS["cudnn"].value
    assert {first for learning, first in seen if learning} == {cudnn}
    assert {first for learning, first in seen if not learning} == {cudnn, order()[0]}, "teacher, and preview"


def test_a_kernel_s_time_or_none():
    assert kernel_seconds("flash", SHAPE, SHAPE, torch.float32, CPU) > 0
    assert kernel_seconds("cudnn", SHAPE, SHAPE, torch.float32, CPU) is None
    assert kernel_seconds("flash", torch.Size((10**5, 10**3, 10**4, 64)), SHAPE, torch.float32, CPU) is None


def test_the_largest_attention_of_a_network():
    """By hand: SD1.5's first level has 64 x 64 points for 8 heads, SDXL's second as many for 10; digits have none."""
    config = load_config(preset="sd15-4step")
    assert work_of(config, FAMILIES["sd15"]).largest == (torch.Size((1, 8, 4096, 40)),) * 2
    assert work_of(load_config(preset="demo-sd15"), FAMILIES["sd15"]).largest == (
        torch.Size((1, 4, 64, 24)),
        torch.Size((1, 4, 77, 24)),
    )
    assert work_of(load_config(preset="digits"), FAMILIES["pixels"]).largest == ()


@pytest.mark.parametrize(
    ("settings", "device", "message"),
    [
        (
            ["train.attention=flash"],
            "cpu",
            "flash is a kernel for CUDA GPUs, and this runs on the CPU: leave",
        ),
        (
            ["train.attention=cudnn", "base.dtype=fp32"],
            "cuda",
            "cudnn takes bf16 and fp16, and base.dtype=fp32: .*=eff",
        ),
        (["train.attention=efficient", "base.dtype=fp32"], "cuda", None),
        (["train.attention=cudnn"], "cuda", None),
    ],
)
def test_a_kernel_that_can_take_nothing_is_refused(settings, device, message):
    config = load_config(preset="sdxl-4step", overrides=settings)
    if message is None:
        return checks.check_prepare(config, FAMILIES["sdxl"], torch.device(device), 1)
    with pytest.raises(ValueError, match=message):
        checks.check_prepare(config, FAMILIES["sdxl"], torch.device(device), 1)
