"""A frozen base in 8 bits, by torchao: which of its weights, and what that does to its predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...samplers import jump
from ..families import Base, Condition
from ..lora.adapter import Learner
from .blocks import blocks_of

# Bytes that each row of a weight takes beside one byte a number: a scale in fp32, and int8's zero point.
ROW_BYTES = {"int8": 5, "fp8": 4}
# At which levels of the schedule predictions are compared, and on how many latents.
LEVELS, ROWS = (0.2, 0.4, 0.6, 0.8), 4


class Probe(NamedTuple):
    """Some of the run's own data, on which a base's predictions are compared before and after.

    x0: clean latents (B, C, h, w). condition: their prompts' encodings. null: what stands for no prompt.
    """

    x0: Tensor
    condition: Condition
    null: Condition


def quantizable(network: nn.Module) -> dict[str, nn.Linear]:
    """Path -> layer, for the layers whose weights are quantised: the frozen Linear ones within a block.

    The rest is small, and every prediction goes through it: the projections in and out and the embeddings of
    time, size and prompt, which are outside of the blocks, and what tells a block the time (`time_emb_proj`,
    the norms' modulation).
    """
    layers = {}
    for block, module in blocks_of(network).items():
        for path, layer in module.named_modules():
            of_time = path.startswith("norm") or "time_emb_proj" in path
            if isinstance(layer, nn.Linear) and not of_time and not layer.weight.requires_grad:
                layers[f"{block}.{path}"] = layer
    return layers


def check_quantizer(format: str) -> None:
    """Raise ValueError where torchao is not installed."""
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"base.quantize={format} needs torchao: pip install torchao, or leave base.quantize out."
        ) from error


def quantize(network: nn.Module, format: str) -> str:
    """Turn the weights of the `quantizable` layers into "int8" or "fp8" with a scale for each row.

    Returns a sentence on how many. Activations keep their dtype, and gradients reach them. A LoRA on top is
    left alone.
    """
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    layers = quantizable(network)
    before = _bytes(network)
    share = sum(layer.weight.nbytes for layer in layers.values()) / before
    settings = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[format]()
    quantize_(network, settings, filter_fn=lambda _, path: path in layers)
    for path in layers:
        layer = network.get_submodule(path)
        layer.forward = _product(layer)
    return (
        f"{format} base: {len(layers)} layers, {share:.0%} of its weights, "
        f"{before / 2**20:.1f} MiB -> {_bytes(network) / 2**20:.1f} MiB."
    )


def _product(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """A quantised layer's forward, with its input in the dtype that its weight was of: autocast, which would see to
    that, passes it by, and what comes in as fp32, such as a norm's output, would go out so."""

    def forward(x: Tensor) -> Tensor:
        x = x.to(layer.weight.dtype)
        if torch.compiler.is_compiling():  # what it makes of torchao's own product is fused
            return F.linear(x, layer.weight, layer.bias)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, _widened(layer.weight), layer.bias)
        return _Product.apply(x, layer.weight, layer.bias)

    return forward


def _widened(weight: Tensor) -> Tensor:
    """A quantised weight in the dtype that it was of: as its `dequantize`, which takes several steps in fp32."""
    return weight.qdata.to(weight.dtype).mul_(weight.scale)


class _Product(torch.autograd.Function):
    """x W^T + b, of which nothing is kept but W in its 8 bits: it is widened once more for the gradient of x.

    Of torch's own product autograd keeps W as it was widened, twice the bytes or more.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, _widened(weight), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ _widened(weight).to(gradient.dtype), None, None


def stored_bytes(weight: Tensor) -> int:
    """Bytes that a weight takes. A quantised one is several tensors, and says so to torch by `__tensor_flatten__`."""
    if hasattr(weight, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])
    return weight.nbytes


def _bytes(network: nn.Module) -> int:
    """Bytes of the network's frozen weights."""
    return sum(stored_bytes(p) for p in network.parameters() if not p.requires_grad)


@torch.no_grad()
def predictions(base: Base, learner: Learner, probe: Probe, guidance: float) -> tuple[Tensor, Tensor]:
    """The bare base's outputs (L, B, C, h, w) at L levels of noise: for the prompts alone, and under CFG."""
    x0, schedule = probe.x0[:ROWS], base.schedule
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
    both = base.with_null({name: value[:ROWS] for name, value in probe.condition.items()}, probe.null)

    plain, guided = [], []
    with learner.off():
        for level in LEVELS:
            tick = torch.full((len(x0),), round(level * schedule.ticks), device=x0.device)
            x = jump(x0, noise, schedule.alpha(tick), schedule.sigma(tick))
            with_prompt, without = base.denoise(torch.cat([x, x]), tick.repeat(2), both).chunk(2)
            plain.append(with_prompt)
            guided.append(without + guidance * (with_prompt - without))

    return torch.stack(plain), torch.stack(guided)


def guided_error(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """How far `predictions` moved, relative to their size (L2): the plain ones, and those under CFG."""
    plain, guided = (((b - a).norm() / a.norm()).item() for a, b in zip(before, after, strict=True))
    return plain, guided
