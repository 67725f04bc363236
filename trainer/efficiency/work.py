"""How long updates take before any has been made: their operations, counted, and the device's speed, measured."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..config.config import Config
from ..families import Base
from ..families.base import DTYPES, outputs_of
from .activations import AsOnGPU, Operations
from .footprint import CountedPass

# What of a device's speed in large products updates are taken to reach, the rest of it lost in copies and small
# operations. On a GPU an assumption: from the bytes that full-size updates move (docs/measurements/speed.md), at 55 %
# of the products' speed and 75 % of the copies', on cards as different as an RTX 4090 and an H200. On a CPU measured.
SHARE = {"cpu": 0.5}
SHARE_OF_GPU = 0.35
LAUNCH = 10e-6  # seconds that the host needs for an operation on a GPU, by assumption: small networks wait for that
SECONDS = 0.02  # at least, for which products are measured


@dataclass(frozen=True)
class Work:
    """What one sample's pass through the frozen network takes, without the LoRA: FLOPs in products and convolutions,
    those of attention itself, operations. largest: shapes (B, heads, tokens, width) of query and key in the attention
    with the most; () where there is none."""

    products: int
    attention: int
    launches: int
    largest: tuple[torch.Size, ...] = ()

    @property
    def forward(self) -> int:
        """FLOPs of the pass."""
        return self.products + self.attention

    def backward(self, whole: bool = False) -> float:
        """FLOPs of its backward pass, to the activations, or where all of it is trained to the weights as well.

        Fused attention computes its matrix anew.
        """
        return self.products * (2 if whole else 1) + 2.5 * self.attention


def work_of(config: Config, family: type[Base], features: bool = False) -> Work:
    """The work of one sample's pass; features: of the pass that a discriminator looks at, which ends early.

    Takes up to a second with a network of full size. Raises ValueError for a resolution that it cannot take.
    """
    return _count(CountedPass.of(config, family), features)


@lru_cache(maxsize=32)
def _count(counted: CountedPass, features: bool) -> Work:
    inputs, network = counted.inputs(), counted.network()
    counter, gpu = Operations(), AsOnGPU()
    run = lambda: network(**inputs)  # noqa: E731
    with torch.no_grad(), gpu, counter:
        outputs_of(counted.family.feature_blocks(network), run) if features else run()
    return Work(counter.flops, gpu.attention_flops, counter.launches, tuple(gpu.largest[1]))


def product_speed(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """FLOP/s that the device reaches in products of large square matrices, by default such as take a moment.

    Raises what torch does where there is no memory for them.
    """
    side = side or (512 if device.type == "cpu" else 4096)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best, begun = 0.0, time.perf_counter()
    # the best of several: the first ones choose a kernel, and others may be at work meanwhile
    while not best or time.perf_counter() - begun < SECONDS:
        start = time.perf_counter()
        for _ in range(4):
            c = a @ b
        c[0, 0].item()  # waits for the device
        best = max(best, 4 * 2 * side**3 / (time.perf_counter() - start))
    return best


@lru_cache(maxsize=8)
def usual_speed(device: torch.device, dtype: str) -> tuple[float, float]:
    """FLOP/s that the device reaches in products, measured once, and the share of it that updates are taken to."""
    return product_speed(device, DTYPES[dtype]), SHARE.get(device.type, SHARE_OF_GPU)
