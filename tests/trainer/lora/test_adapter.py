"""The LoRA on the one base: the identity at first, gone when off, and averaged as the formula says."""

import json
from contextlib import ExitStack

import pytest
import torch
from diffusers import UNet2DConditionModel

from phased_consistency.trainer.families import FAMILIES
from phased_consistency.trainer.families.sd15 import SD15
from phased_consistency.trainer.lora.adapter import Adapter, Average


def small_unet(dtype=torch.float32):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        sample_size=8,
    )
    return unet.to(dtype).requires_grad_(False).eval()


def output(unet):
    generator = torch.Generator().manual_seed(5)
    x, hidden = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)
    return unet(x.to(unet.dtype), torch.tensor([10, 900]), hidden.to(unet.dtype)).sample


def adapt(unet, rank=4, alpha=2.0, seed=0):
    return Adapter(unet, SD15.lora_targets, rank, alpha, seed)


@torch.no_grad()
def disturb(adapter, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_a_new_adapter_is_the_identity():
    unet = small_unet()
    plain = output(unet)
    adapter = adapt(unet)
    assert torch.equal(output(unet), plain)
    ups = [p for name, p in adapter.named_parameters().items() if name.endswith("lora_B")]
    assert ups and not any(p.any() for p in ups)


def test_the_teacher_is_the_plain_base_to_the_bit():
    """Before any update, between updates, and after them."""
    unet = small_unet()
    plain = output(unet)
    adapter = adapt(unet)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    for _ in range(3):
        with adapter.off(), torch.no_grad():
            assert torch.equal(output(unet), plain)
        optimizer.zero_grad()
        output(unet).square().sum().backward()
        optimizer.step()
    assert not torch.equal(output(unet), plain)
    with adapter.off():
        assert torch.equal(output(unet), plain)


def test_only_the_adapter_learns():
    unet = small_unet()
    adapter = adapt(unet)
    with adapter.off(), torch.no_grad():
        output(unet)
    output(unet).square().sum().backward()
    learning = {id(p) for p in unet.parameters() if p.grad is not None}
    assert learning == {id(p) for p in adapter.parameters()}


def test_off_ends_with_an_exception():
    unet = small_unet()
    adapter = adapt(unet)
    disturb(adapter)
    student = output(unet)
    with pytest.raises(RuntimeError, match="in the teacher"), adapter.off():
        raise RuntimeError("in the teacher")
    assert torch.equal(output(unet), student)


def test_off_is_a_flag_on_its_own_layers(monkeypatch):
    """Not a walk through the network: a backward pass may switch at every block."""
    unet = small_unet()
    plain = output(unet)
    adapter = adapt(unet)
    disturb(adapter)
    student = output(unet)
    switched = ExitStack()

    def without_a_walk(switch, *arguments):
        with monkeypatch.context() as patch:
            for walk in ("modules", "named_modules", "disable_adapters", "enable_adapters", "apply"):
                patch.setattr(unet, walk, None)
            switch(*arguments)

    without_a_walk(switched.enter_context, adapter.off())
    without_a_walk(switched.enter_context, adapter.off())
    assert torch.equal(output(unet), plain)
    assert all(p.requires_grad for p in adapter.parameters())
    without_a_walk(switched.close)
    assert torch.equal(output(unet), student)


def test_other_weights_are_seen_inside_one_autocast_block():
    """Autocast keeps low-precision copies by parameter, whatever it holds by then."""
    unet = small_unet(torch.bfloat16)
    adapter = adapt(unet)
    disturb(adapter)
    own, other = adapter.copy(), {name: 3 * w for name, w in adapter.copy().items()}

    def alone(state):
        with torch.no_grad(), adapter.using(state), torch.autocast("cpu", dtype=torch.bfloat16):
            return output(unet)

    meant = [alone(state) for state in (own, other, own)]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        first = output(unet)
        with adapter.using(other):
            second = output(unet)
        third = output(unet)
    assert not meant[0].equal(meant[1])
    assert [a.equal(b) for a, b in zip((first, second, third), meant, strict=True)] == [True] * 3


def test_the_number_that_switches_stays_one_after_another_adapter():
    unet = small_unet()
    adapter = adapt(unet)
    adapter.switch_by_number()
    strength = adapter.layers[next(iter(adapter.layers))].scaling["default"]
    unet.add_adapter(unet.peft_config["default"], "second")
    unet.set_adapters("second")
    adapter.activate()
    unet.delete_adapters("second")
    assert all(layer.scaling["default"] is strength for layer in adapter.layers.values())
    assert all(layer.active_adapters == ["default"] for layer in adapter.layers.values())


def test_alpha_over_rank_is_the_strength():
    unet = small_unet()
    adapter = adapt(unet, rank=4, alpha=2.0)
    assert {layer.scaling["default"] for layer in adapter.layers.values()} == {0.5}


@pytest.mark.parametrize(("family", "modules", "parameters"), [("sd15", 278, 67_252_224), ("sdxl", 788, 196_751_360)])
def test_full_size_unets_have_the_published_modules_with_names_of_their_own(family, modules, parameters):
    """As many weights at rank 64 as PCM's published LoRAs."""
    kind = FAMILIES[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((kind.configs / "unet" / "config.json").read_text()))
        adapter = Adapter(unet, kind.lora_targets, rank=64, alpha=8.0, seed=0)
    names = {kind.lora_key(module) for module in adapter.layers}
    assert len(adapter.layers) == len(names) == modules
    assert sum(p.numel() for p in adapter.parameters()) == parameters
    assert all(name.startswith("lora_unet_") and "." not in name for name in names)


def test_a_seed_fixes_the_start_and_leaves_the_global_one():
    first, again, other = (adapt(small_unet(), seed=seed).state() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    unet = small_unet()
    state = torch.get_rng_state()
    adapt(unet)
    assert torch.equal(torch.get_rng_state(), state)


def test_lora_weights_are_fp32_over_a_bf16_base():
    unet = small_unet(torch.bfloat16)
    adapter = adapt(unet)
    disturb(adapter)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    output(unet).float().square().sum().backward()
    assert {p.grad.dtype for p in adapter.parameters()} == {torch.float32}
    assert {m.weight.dtype for m in unet.modules() if isinstance(m, torch.nn.GroupNorm)} == {torch.bfloat16}


def test_state_and_load_are_inverse():
    adapter, copy = adapt(small_unet()), adapt(small_unet(), seed=9)
    disturb(adapter)
    copy.load(adapter.state())
    assert torch.equal(output(copy.network), output(adapter.network))


def test_load_refuses_another_adapters_weights():
    adapter = adapt(small_unet(), rank=4)
    before = adapter.state()
    name = next(iter(before))
    for wrong, count in (
        (adapt(small_unet(), rank=8).state(), len(before)),
        ({n: w for n, w in before.items() if n != name}, 1),
        (before | {"elsewhere.lora_A": torch.zeros(1)}, 1),
    ):
        with pytest.raises(ValueError, match=f"of another run: {count} tensors differ, such as"):
            adapter.load(wrong)
    assert all(torch.equal(before[n], w) for n, w in adapter.state().items())


def test_using_puts_the_present_weights_back():
    adapter = adapt(small_unet())
    present = adapter.state()
    other = {name: torch.ones_like(w) for name, w in present.items()}
    with pytest.raises(RuntimeError, match="inside"), adapter.using(other):
        assert all((p == 1).all() for p in adapter.parameters())
        raise RuntimeError("inside")
    assert all(torch.equal(present[name], w) for name, w in adapter.state().items())


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_average_follows_its_closed_form(decay):
    """m_n is the sum over k of w_k (1 - d_k) d_(k+1) ... d_n, with d_k = min(decay, (k - 1) / (k + 9))."""
    adapter = adapt(small_unet())
    average, updates = Average(adapter, decay), 12
    rates = [min(decay, (k - 1) / (k + 9)) for k in range(1, updates + 1)]
    expected = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in adapter.named_parameters().items()}
    for k in range(updates):
        disturb(adapter, seed=k)
        weight = (1 - rates[k]) * torch.tensor(rates[k + 1 :], dtype=torch.float64).prod()
        for name, parameter in adapter.named_parameters().items():
            expected[name] += weight * parameter.detach().double()
        average.update(k + 1)
    for name, weight in average.weights.items():
        torch.testing.assert_close(weight.double(), expected[name], atol=1e-6, rtol=1e-5)
    assert max(rates) == (decay if decay == 0.5 else pytest.approx(11 / 21)), "both branches of the law are met"
