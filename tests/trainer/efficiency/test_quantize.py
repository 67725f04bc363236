"""A base in 8 bits: which layers, how much smaller, and how near its outputs and gradients stay."""

import sys

import pytest
import torch
from safetensors.torch import load_file

from phased_consistency.trainer.efficiency import quantize as quantizing
from phased_consistency.trainer.efficiency.blocks import Offload, compile_blocks, recompute
from phased_consistency.trainer.efficiency.quantize import (
    Probe,
    check_products,
    check_quantizer,
    guided_error,
    predictions,
    quantizable,
    quantize,
    stored_bytes,
)
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.lora.adapter import Adapter
from phased_consistency.trainer.reporting.progress import Reporter
from phased_consistency.trainer.training.loop import train
from support.runs import small_config, speck

pytest.importorskip("torchao", reason="torchao is not installed: pip install phased-consistency[quantize]")
TICK = torch.tensor([500, 900])
PROMPTS = ["a star", "a moon"]
# A relative error that a format's rounding explains: half a step of 127 of the row's largest, or of 3 bits of mantissa.
TOLERANCE = {"int8": 0.02, "fp8": 0.06}


def adapted(path="tiny-sd15", dtype=torch.float32):
    base = load_base(path, dtype=dtype)
    adapter = Adapter(base.network, base.lora_targets, rank=2, alpha=2.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters().items():
            if name.endswith("lora_B"):
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return base, adapter


def gradients(base, adapter):
    x = torch.randn(2, *base.latent_shape(64), generator=torch.Generator().manual_seed(0))
    for parameter in adapter.parameters():
        parameter.grad = None
    output = base.denoise(x, TICK, base.encode_prompts(PROMPTS))
    output.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in adapter.parameters()])


def relative(found, meant):
    return ((found - meant).norm() / meant.norm()).item()


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_gradients_of_the_lora_stay_near_the_original_bases(family, format):
    base, adapter = adapted(speck(family).name)
    meant = gradients(base, adapter)
    quantize(base.network, format)
    assert 1e-4 < relative(gradients(base, adapter), meant) < TOLERANCE[format]


@pytest.mark.parametrize("path", ["tiny-sd15", "tiny-sdxl", "tiny-emoji"])
def test_only_the_blocks_own_linear_layers_are_chosen(path):
    base, _ = adapted(path)
    chosen = set(quantizable(base.network))
    linear = {n for n, m in base.network.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in n}
    left = {n.removesuffix(".base_layer") for n in linear - chosen}
    exempt = ("time_emb", "time_text_embed", "add_embedding", "proj_in", "proj_out", "context_embedder", "norm")
    assert chosen and left and all(any(part in name for part in exempt) for name in left), left
    assert not any(part in name for part in exempt for name in chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("format", "row"), [("int8", 5), ("fp8", 4)])
def test_the_weights_take_a_byte_each_and_a_scale_a_row(format, row, dtype):
    base, _ = adapted(dtype=dtype)
    layers = quantizable(base.network)
    numbers, rows = sum(m.weight.numel() for m in layers.values()), sum(m.out_features for m in layers.values())
    others = sum(p.nbytes for p in base.network.parameters()) - sum(m.weight.nbytes for m in layers.values())
    sentence = quantize(base.network, format)
    assert sum(map(stored_bytes, base.network.parameters())) == others + numbers + rows * row
    assert sentence.startswith(f"{format} base: {len(layers)} layers, ")


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_quantised_layers_answer_in_the_base_s_dtype(format):
    """After a norm too, whose output autocast on a GPU leaves in fp32: so do what autograd keeps, and the gradient."""
    base = load_base("tiny-sd15", dtype=torch.bfloat16)
    quantize(base.network, format)
    path, layer = next(iter(quantizable_once(base).items()))
    x = torch.randn(4, layer.in_features, requires_grad=True)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t)
    with torch.autocast("cpu", dtype=torch.bfloat16), hooks:
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.float32 not in kept
    y.float().sum().backward()
    meant = layer.weight.dequantize().float().sum(0).expand(4, -1)
    torch.testing.assert_close(x.grad, meant, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_s_weight_is_widened_as_torchao_does_it(format, dtype):
    """To the bit, with what it answers and the gradient of its input."""
    base = load_base("tiny-sd15", dtype=dtype)
    quantize(base.network, format)
    layer = next(m for m in quantizable_once(base).values() if m.bias is not None)
    x, gradient = torch.randn(4, layer.in_features, dtype=dtype), torch.randn(4, layer.out_features, dtype=dtype)
    weight, x_too = layer.weight.dequantize(), x.clone().requires_grad_()
    layer(x.requires_grad_()).backward(gradient)
    meant = torch.nn.functional.linear(x_too, weight, layer.bias)
    meant.backward(gradient)
    assert layer(x).equal(meant) and x.grad.equal(x_too.grad)
    with torch.no_grad():
        assert layer(x).equal(meant)


COMPUTED = pytest.mark.parametrize("format", ["int8-compute", "fp8-compute"])


@COMPUTED
@pytest.mark.parametrize("bias", [True, False])
def test_products_in_8_bits_round_both_factors_and_nothing_else(format, bias):
    """Against the same rounding done in fp64; rows of very different sizes, one of zeros. The gradient is the widened
    weight's, to the bit, as if the input had not been rounded."""
    layer = torch.nn.Linear(1280, 64, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    quantize_alone(layer, format)
    sizes = torch.logspace(-3, 3, 33).view(3, 11, 1)
    x = (torch.randn(3, 11, 1280) * sizes).bfloat16()
    x[0, 0] = 0
    y = layer(x.requires_grad_())
    assert y.dtype == torch.bfloat16 and y.shape == (3, 11, 64)

    largest = 127 if format.startswith("int8") else 448
    scale = (x.detach().double().abs().amax(-1, keepdim=True) / largest).clamp_min(1e-30)
    rounded = x.detach().double() / scale
    rounded = rounded.round() if largest == 127 else rounded.to(torch.float8_e4m3fn).double()
    weight = layer.weight.qdata.double() * layer.weight.scale.double()
    meant = (rounded * scale) @ weight.t() + (layer.bias.double() if bias else 0)
    off = (y.detach().double() - meant).norm(dim=-1) / meant.norm(dim=-1).clamp_min(1e-9)
    # what bf16 rounds of each product, and in fp8 numbers in the middle of two, which fall to either side
    assert off.max() < (0.006 if largest == 127 else 0.02)

    gradient = torch.randn_like(y)
    y.backward(gradient)
    assert x.grad.equal(gradient @ layer.weight.dequantize())


def test_products_in_int8_hold_what_fp16_does():
    """Sums that are scaled by rows alone would be beyond it."""
    layer = torch.nn.Linear(1280, 64, dtype=torch.float16).requires_grad_(False)
    quantize_alone(layer, "int8-compute")
    x = torch.full((20, 1280), 100.0, dtype=torch.float16) * torch.randn(64, 1280)[0].sign().half()
    meant = x.float() @ layer.weight.dequantize().float().t() + layer.bias.float()
    torch.testing.assert_close(layer(x).float(), meant, atol=0.5, rtol=0.01)


@COMPUTED
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_8_bits(format, value):
    layer = torch.nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False)
    quantize_alone(layer, format)
    x = torch.randn(20, 64, dtype=torch.bfloat16)
    x[3, 5] = value
    bad = ~layer(x).isfinite()
    assert bad[3].all() and bad.sum() == 32


@COMPUTED
def test_few_rows_are_multiplied_with_the_widened_weight(format):
    """A GPU's product in int8 takes more than 16."""
    layer = torch.nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False)
    quantize_alone(layer, format)
    x = torch.randn(17, 64, dtype=torch.bfloat16)
    meant = torch.nn.functional.linear(x, layer.weight.dequantize(), layer.bias)
    assert layer(x[:16]).equal(meant[:16])
    assert 1e-4 < relative(layer(x), meant) < 0.1


def test_sides_that_products_in_8_bits_do_not_take():
    narrow, wide = (torch.nn.Linear(n, 32, dtype=torch.bfloat16).requires_grad_(False) for n in (40, 64))
    with pytest.raises(ValueError, match="no layer of this base has sides that are multiples of 16.*quantize=int8"):
        quantize_alone(narrow, "int8-compute")
    network = torch.nn.Sequential(narrow, wide)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizing, "quantizable", lambda network: {"0": narrow, "1": wide})
        assert quantize(network, "int8-compute").endswith(" 1 of them multiply in int8.")
    x = torch.randn(20, 40, dtype=torch.bfloat16)
    assert narrow(x).equal(torch.nn.functional.linear(x, narrow.weight.dequantize(), narrow.bias))


def quantize_alone(layer, format):
    """Quantise a layer that is in no block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizing, "quantizable", lambda network: {"0": layer})
        return quantize(torch.nn.Sequential(layer), format)


# of the LoRA's gradients, with both factors rounded and the base in bf16, whose own rounding is 0.015
COMPUTED_TOLERANCE = {"int8-compute": 0.02, "fp8-compute": 0.06}


@COMPUTED
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_gradients_stay_near_where_products_are_in_8_bits(family, format):
    meant = gradients(*adapted(speck(family).name))
    base, adapter = adapted(speck(family).name, torch.bfloat16)
    quantize(base.network, format)
    assert 1e-4 < relative(gradients(base, adapter), meant) < COMPUTED_TOLERANCE[format]


@pytest.mark.parametrize(
    ("format", "dtype", "device", "capability", "sentence"),
    [
        ("int8-compute", "fp32", "cpu", None, "is for a base in bf16 or fp16, and base.dtype is fp32. Set base.dtype"),
        (
            "fp8-compute",
            "fp16",
            "cuda",
            (8, 9),
            "is for a base in bf16, and base.dtype is fp16. Set base.dtype=bf16, or",
        ),
        (
            "int8-compute",
            "fp16",
            "cuda",
            (7, 5),
            "compute capability 8.0 or later for products in int8, and .* 7.5. Set",
        ),
        ("fp8-compute", "bf16", "cuda", (8, 6), "compute capability 8.9 or later for products in fp8, and .* 8.6. Set"),
        (
            "int8-compute",
            "bf16",
            "mps",
            None,
            "is for NVIDIA GPUs, and this run is on mps. Set base.quantize=int8, who",
        ),
    ],
)
def test_where_products_in_8_bits_cannot_be(monkeypatch, format, dtype, device, capability, sentence):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(ValueError, match=f"base.quantize={format} .*{sentence}"):
        check_products(format, dtype, torch.device(device))


def test_an_amd_gpu_multiplies_the_widened_weights(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(ValueError, match="is for NVIDIA GPUs, and this run is on an AMD GPU. Set base.quantize=int8"):
        check_products("int8-compute", "bf16", torch.device("cuda"))
    check_products("int8", "fp32", torch.device("cuda"))


def quantizable_once(base):
    """The layers that have been quantised, by path."""
    return {path: m for path, m in base.network.named_modules() if hasattr(getattr(m, "weight", None), "qdata")}


def test_teacher_and_student_share_the_quantised_base():
    """With the adapter off, what is left is the quantised base, to the bit."""
    base, adapter = adapted()
    bare = load_base("tiny-sd15")
    for network in (base.network, bare.network):
        quantize(network, "int8")
    x, condition = torch.randn(2, *base.latent_shape(64)), base.encode_prompts(PROMPTS)
    with torch.no_grad(), adapter.off():
        assert base.denoise(x, TICK, condition).equal(bare.denoise(x, TICK, condition))


@pytest.mark.parametrize(
    ("format", "family", "dtype"),
    [("int8", "sd3", torch.float32), ("int8-compute", "sd15", torch.bfloat16), ("fp8-compute", "sd15", torch.bfloat16)],
)
def test_quantised_blocks_are_offloaded_compiled_and_computed_again(format, family, dtype):
    torch._dynamo.reset()
    base, adapter = adapted(speck(family).name, dtype)
    quantize(base.network, format)
    meant = gradients(base, adapter)
    adapter.switch_by_number()
    compile_blocks(base.network, backend="eager")
    offload = Offload(base.network, base.device)
    recompute(adapter)
    torch.testing.assert_close(gradients(base, adapter), meant, atol=1e-7, rtol=1e-4)
    assert offload.copies


def test_the_guided_error_is_what_guidance_makes_of_both_halves():
    base, adapter = adapted()
    null = base.encode_prompts([""])
    probe = Probe(torch.randn(2, *base.latent_shape(64)), base.encode_prompts(PROMPTS), null)
    original = predictions(base, adapter, probe, 7.5)
    assert guided_error(original, original) == (0, 0)
    same = predictions(base, adapter, probe, 1.0)
    torch.testing.assert_close(same[1], same[0])
    quantize(base.network, "int8")
    plain, guided = guided_error(original, predictions(base, adapter, probe, 7.5))
    assert 1e-4 < plain < guided < 0.1


class Told(Reporter):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def test_a_run_on_a_quantised_base_says_its_error_and_passes_its_self_test(tmp_path):
    reporter = Told()
    path = train(small_config(tmp_path / "run", base__quantize="int8", train__steps=2), reporter)
    assert any(line.startswith("int8 base: ") for line in reporter.lines)
    assert any("Its prediction is off by 0." in line and "at CFG 4 by " in line for line in reporter.lines)
    assert any("0 keys unmatched" in line for line in reporter.lines)
    plain = load_file(train(small_config(tmp_path / "plain", train__steps=2)))
    assert load_file(path).keys() == plain.keys()


def test_without_torchao_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match="base.quantize=fp8 needs torchao: pip install torchao, or leave"):
        check_quantizer("fp8")
