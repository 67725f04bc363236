"""A LoRA folded into its weights gives what it gives beside them, and is folded just where that takes less work."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from phased_consistency.trainer.efficiency import folding
from phased_consistency.trainer.efficiency.folding import cheaper, fold_where_cheaper
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.lora.adapter import NAME, Adapter
from support.runs import TINY

LAYERS = {
    "linear": lambda width: (nn.Linear(width, 48), (2, 8, width)),
    "convolution": lambda width: (nn.Conv2d(width, 48, 3, padding=1), (1, width, 6, 6)),
    "with a stride": lambda width: (nn.Conv2d(width, 48, 3, stride=2, padding=1), (1, width, 12, 12)),
    "of one pixel": lambda width: (nn.Conv2d(width, 48, 1), (1, width, 4, 4)),
}


class Network(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class Peft(Network):
    """A network of one layer with PEFT's methods, as diffusers' models have them."""

    def add_adapter(self, config, name):
        inject_adapter_in_model(config, self, name)


def injected(kind, width, rank):
    torch.manual_seed(0)
    layer, shape = LAYERS[kind](width)
    adapter = Adapter(Peft(layer.requires_grad_(False)), ("layer",), rank, 3.0, seed=1)
    for parameter in adapter.parameters():
        parameter.data = torch.randn_like(parameter) / 10
    return adapter, torch.randn(shape)


def passed(adapter, x, with_gradient):
    """Output and gradients of one pass, and the multiplications that it took."""
    x = x.clone().requires_grad_(with_gradient)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(with_gradient):
        out = adapter.network(x)
        if with_gradient:
            out.square().sum().backward()
    gradients = [p.grad for p in (x, *adapter.parameters())] if with_gradient else []
    for parameter in adapter.parameters():
        parameter.grad = None
    return [out.detach(), *gradients], counter.get_total_flops() // 2


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_cheaper_form_is_taken_and_gives_the_same(kind, with_gradient, monkeypatch):
    """Ranks and widths on both sides of where the choice turns; the work is what torch counts."""
    taken = set()
    for width in (8, 32, 64):
        for rank in (2, 16, 40):
            adapter, x = injected(kind, width, rank)
            x = x.repeat(8, *(1,) * (x.ndim - 1)) if with_gradient else x
            beside, work_beside = passed(adapter, x, with_gradient)
            fold_where_cheaper(adapter)
            chosen, work = passed(adapter, x, with_gradient)
            for one, other in zip(beside, chosen, strict=True):
                torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)
            with monkeypatch.context() as always:
                always.setattr(folding, "cheaper", lambda *_: True)
                work_folded = passed(adapter, x, with_gradient)[1]
            assert work == min(work_beside, work_folded), (width, rank)
            taken.add(work < work_beside)
    assert taken == {False, True}, "the choice turns within these"


def test_full_size_layers_with_a_gradient_stay_unfolded():
    """SD1.5's convolutions and all but its narrowest linear layers, at rank 64; the target's pass folds."""
    for width, side in ((320, 64), (640, 32), (1280, 16), (1280, 8)):
        places = 20 * side * side
        assert not cheaper(places, 9 * width, width, 64, True)
        assert cheaper(places, width, width, 64, True) == (width == 320)
        assert cheaper(places, width, width, 64, False)


def test_only_ones_own_adapter_is_folded():
    """Not under autocast, not while it is off, and not what another one adds."""
    adapter, x = injected("linear", 8, 16)
    layer = adapter.layers["layer"]
    with torch.no_grad():
        fold_where_cheaper(adapter)
        folded, bare = adapter.network(x), layer.get_base_layer()(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert adapter.network(x).dtype == torch.bfloat16
        layer.enable_adapters(False)
        assert torch.equal(adapter.network(x), bare)
        layer.enable_adapters(True)
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["layer"])
        layer.update_layer("other", 4, lora_alpha=4, config=config)
        layer.set_adapter(["other"])
        assert torch.equal(adapter.network(x), bare), "the other one is new: it adds nothing"
        layer.set_adapter([NAME])
        assert torch.equal(adapter.network(x), folded) and not torch.equal(folded, bare)


def test_a_base_in_bf16_is_never_folded():
    outputs = []
    for folds in (False, True):
        base = load_base(TINY, dtype=torch.bfloat16)
        adapter = Adapter(base.network, base.lora_targets, 8, 8.0, seed=0)
        generator = torch.Generator().manual_seed(1)
        adapter.load({n: torch.randn(w.shape, generator=generator) / 30 for n, w in adapter.state().items()})
        if folds:
            fold_where_cheaper(adapter)
        x = torch.randn(2, 4, 4, 4, generator=generator)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs.append(base.denoise(x, torch.tensor([500, 100]), base.encode_prompts(["a star", "a moon"])))
    assert torch.equal(*outputs)
