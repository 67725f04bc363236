"""A frozen base in 8 bits, by torchao: which of its weights, and what that does to its predictions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...samplers import jump
from ..families import Base, Condition
from ..lora.adapter import Learner
from ..system.machine import lacking_capability
from .blocks import blocks_of
from .products import WIDTHS, fits, product

# Bytes that each row of a weight takes beside one byte a number: a scale in fp32, and int8's zero point.
ROW_BYTES = {"int8": 5, "fp8": 4}
COMPUTE = "-compute"  # how a format ends whose products are in 8 bits too
# Of products in 8 bits: the base's dtypes in which they can answer, and the least compute capability of a GPU.
PRODUCTS = {"int8": (("bf16", "fp16"), (8, 0)), "fp8": (("bf16",), (8, 9))}
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


def storage(format: str) -> str:
    """Which of "int8" and "fp8" weights are stored in, by a value of base.quantize."""
    return format.removesuffix(COMPUTE)


def check_products(format: str, dtype: str, device: torch.device) -> None:
    """Raise ValueError where a value of base.quantize asks for products in 8 bits that this base.dtype or device has
    not; other values pass."""
    if not format.endswith(COMPUTE):
        return
    stored = storage(format)
    dtypes, needed = PRODUCTS[stored]
    instead = f"base.quantize={stored}, whose products are in base.dtype"
    if dtype not in dtypes:
        raise ValueError(
            f"base.quantize={format} is for a base in {' or '.join(dtypes)}, and base.dtype is {dtype}. Set "
            f"base.dtype={dtypes[0]}, or {instead}."
        )
    if device.type not in ("cuda", "cpu") or (device.type == "cuda" and torch.version.hip):
        kind = "an AMD GPU" if device.type == "cuda" else device.type
        raise ValueError(f"base.quantize={format} is for NVIDIA GPUs, and this run is on {kind}. Set {instead}.")
    if device.type == "cuda" and (lack := lacking_capability(device, needed)):
        wanted, here = lack
        raise ValueError(
            f"base.quantize={format} needs a GPU of compute capability {wanted} or later for products in {stored}, and "
            f"this one has {here}. Set {instead}."
        )


def quantize(network: nn.Module, format: str) -> str:
    """Turn the weights of the `quantizable` layers into "int8" or "fp8" with a scale for each row.

    With "int8-compute" and "fp8-compute" their products are in 8 bits too: a layer's input is rounded on the way.
    Returns a sentence on how many. What comes out keeps its dtype, and gradients reach the input. A LoRA on top is left
    alone. Raises ValueError where no layer has sides for products in 8 bits.
    """
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    layers, computes = quantizable(network), format.endswith(COMPUTE)
    fitting = {path for path, layer in layers.items() if computes and fits(layer)}
    if computes and not fitting:
        raise ValueError(
            f"base.quantize={format}: no layer of this base has sides that are multiples of {WIDTHS}, as products in 8 "
            f"bits need. Set base.quantize={storage(format)}."
        )
    before = _bytes(network)
    share = sum(layer.weight.nbytes for layer in layers.values()) / before
    settings = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[storage(format)]()
    quantize_(network, settings, filter_fn=lambda _, path: path in layers)
    for path in layers:
        layer = network.get_submodule(path)
        layer.forward = product(layer, in_8_bits=path in fitting)
    multiplied = f" {len(fitting)} of them multiply in {storage(format)}." if computes else ""
    return (
        f"{format} base: {len(layers)} layers, {share:.0%} of its weights, "
        f"{before / 2**20:.1f} MiB -> {_bytes(network) / 2**20:.1f} MiB.{multiplied}"
    )


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
