"""Which of torch's fused kernels attention takes on a GPU: the one that a run prefers, and how fast each is."""

from __future__ import annotations

import statistics
import time
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {  # in the order in which torch tries them
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
IN_HALF = ("flash", "cudnn")  # kernels that take fp16 and bf16 alone
TIMES = 5


def preferring(kernel: str | None) -> AbstractContextManager[None]:
    """Attention in this block by a kernel of `KERNELS`, and by the others where it does not take the tensors, as with a
    mask; None: in torch's own order."""
    if kernel is None:
        return nullcontext()
    others = [backend for name, backend in KERNELS.items() if name != kernel]
    return sdpa_kernel([KERNELS[kernel], *others, SDPBackend.MATH], set_priority=True)


def kernel_seconds(
    kernel: str, query: torch.Size, key: torch.Size, dtype: torch.dtype, device: torch.device
) -> float | None:
    """Seconds that attention takes by this kernel, forward and backward: the median of a few, after one that is not
    counted. None where it does not take such tensors here, or there is no memory for them.

    query, key: shapes (B, heads, tokens, width).
    """
    seconds = []
    with warnings.catch_warnings(), sdpa_kernel(KERNELS[kernel]):
        warnings.simplefilter("ignore")  # torch's list of reasons why it cannot
        try:
            q = torch.randn(query, device=device, dtype=dtype, requires_grad=True)
            k, v = (torch.randn(key, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
            for _ in range(1 + TIMES):
                start = time.perf_counter()
                F.scaled_dot_product_attention(q, k, v).sum().backward()
                q.grad[0, 0, 0, 0].item()  # waits for the device
                seconds.append(time.perf_counter() - start)
        except RuntimeError:
            return None
    return statistics.median(seconds[1:])
