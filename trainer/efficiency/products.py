"""The product of a layer whose weight is in 8 bits: with the weight widened, or in 8 bits itself (W8A8).

torchao's own products in 8 bits are not taken: neither has a gradient, and outside of compiled code its int8 one prints
its input to see what kind it is, for which the host waits for the GPU at every layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 16  # rows: a product in int8 takes more on a GPU
WIDTHS = 16  # what both sides of a weight must be a multiple of, for products in fp8; in int8, 8
LEAST = 1e-30  # in place of a row's largest number where that is 0
Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of an input, a quantised weight, and a bias


def fits(layer: nn.Linear) -> bool:
    """Whether a layer's weight has sides that products in 8 bits take."""
    return layer.in_features % WIDTHS == 0 == layer.out_features % WIDTHS


def product(layer: nn.Linear, in_8_bits: bool) -> Callable[[Tensor], Tensor]:
    """A quantised layer's forward, with its input in the dtype that its weight was of: autocast, which would see to
    that, passes it by, and what comes in as fp32, such as a norm's output, would go out so.

    in_8_bits: whether the input is rounded to 8 bits too, each row with a scale of its own. The gradient is that of the
    input as it was, with the weight widened.
    """

    def forward(x: Tensor) -> Tensor:
        x = x.to(layer.weight.dtype)
        if in_8_bits and x.shape[:-1].numel() > FEW:
            multiply = _multiply_in_int8 if layer.weight.qdata.dtype == torch.int8 else _multiply_in_fp8
        elif torch.compiler.is_compiling():  # what it makes of torchao's own product is fused
            return F.linear(x, layer.weight, layer.bias)
        else:
            multiply = _multiply_widened
        if not (torch.is_grad_enabled() and x.requires_grad):
            return multiply(x, layer.weight, layer.bias)
        return _Product.apply(x, layer.weight, layer.bias, multiply)

    return forward


class _Product(torch.autograd.Function):
    """x W^T + b, of which nothing is kept but W in its 8 bits: it is widened once more for the gradient of x.

    Of torch's own product autograd keeps W as it was widened, twice the bytes or more.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, multiply: Multiply) -> Tensor:
        ctx.save_for_backward(weight)
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ _widened(weight).to(gradient.dtype), None, None, None


def _widened(weight: Tensor) -> Tensor:
    """A quantised weight in the dtype that it was of: as its `dequantize`, which takes several steps in fp32."""
    return weight.qdata.to(weight.dtype).mul_(weight.scale)


def _multiply_widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, _widened(weight), bias)


def _multiply_in_int8(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, scale = _rounded(x, torch.int8, torch.iinfo(torch.int8).max)
    total = _int8_product(rows, weight.qdata)
    # by the rows' scales first, with the weight's numbers taken as at most 1: so fp16 holds what the product itself is
    y = torch.mul(total, scale / 127, out=total.new_empty(total.shape, dtype=x.dtype))
    if bias is None:
        y.mul_(weight.scale.flatten() * 127)
    else:
        torch.addcmul(bias, y, weight.scale.flatten(), value=127, out=y)
    return y.view(*x.shape[:-1], -1)


def _int8_product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows (M, K) times weight (N, K) transposed, both int8, in int32 (M, N).

    On a CPU by its sums in fp32: some CPUs lose the largest sums in int8, and there it is not for speed.
    """
    if rows.device.type == "cpu":
        return (rows.float() @ weight.t().float()).to(torch.int32)
    return torch._int_mm(rows, weight.t())


def _multiply_in_fp8(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, scale = _rounded(x, weight.qdata.dtype, torch.finfo(weight.qdata.dtype).max)
    y = torch._scaled_mm(
        rows, weight.qdata.t(), scale, weight.scale.t(), bias=bias, out_dtype=x.dtype, use_fast_accum=True
    )
    return y.view(*x.shape[:-1], -1)


def _rounded(x: Tensor, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """x (..., K) as rows (M, K) in 8 bits and their scales (M, 1) in fp32: each row's largest number is `largest`.

    Numbers that are not finite leave scales that are not.
    """
    x = x.reshape(-1, x.shape[-1])
    scale = torch.linalg.vector_norm(x, ord=torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    scale = scale.clamp_(min=LEAST).div_(largest)
    # in fp16 on the way, which has more digits than bf16 and half the bytes of fp32
    rows = torch.mul(x, scale.reciprocal(), out=x.new_empty(x.shape, dtype=torch.float16))
    return (rows.round_() if dtype == torch.int8 else rows).to(dtype), scale
