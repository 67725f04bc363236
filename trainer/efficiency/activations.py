"""What a pass through a network keeps and holds, block by block, seen on the meta device: without a weight or a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .blocks import blocks_of

# What CUDA's autocast runs in low precision and in fp32, of all that these networks call.
TO_LOW = (F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, torch.bmm)
TO_FULL = (F.group_norm, F.layer_norm, F.rms_norm)
OUTSIDE = ""
# Tensors by their storage's number, with its bytes, so that one that two of them share counts once.
Storages = dict[int, int]


@dataclass(frozen=True)
class Activations:
    """What autograd keeps of a pass for its backward, by block path ("" for outside of all); what enters each block;
    and the FLOPs of each block, which computing it again costs."""

    kept: dict[str, Storages]
    entered: dict[str, Storages]
    flops: dict[str, int]

    def bytes(self, recomputed: Collection[str]) -> int:
        """Bytes kept where these blocks are computed again: their inputs, all of the others, the largest of them."""
        union: Storages = {}
        for path, storages in self.kept.items():
            union |= self.entered[path] if path in recomputed else storages
        return sum(union.values()) + max((sum(self.kept[p].values()) for p in recomputed if p in self.kept), default=0)

    def by_saving(self) -> list[str]:
        """The blocks, those first that save the most bytes for each FLOP of computing them again."""

        def saving(path: str) -> float:
            return (sum(self.kept[path].values()) - sum(self.entered[path].values())) / max(1, self.flops[path])

        return sorted(self.entered, key=saving, reverse=True)


def kept_activations(network: nn.Module, run: Callable[[], object]) -> Activations:
    """What autograd keeps for the backward of `run`, a pass through the network on the meta device."""
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    # held here until the end, so that no number comes twice
    kept: dict[str, dict[int, torch.UntypedStorage]] = {OUTSIDE: {}}
    entered: dict[str, dict[int, torch.UntypedStorage]] = {}
    flops, inside, counter, gpu = {}, [OUTSIDE], FlopCounterMode(display=False), _AsOnGPU(network.dtype)

    def note(tensor: Tensor, into: dict[int, torch.UntypedStorage]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            into[storage._cdata] = storage

    def pack(tensor: Tensor) -> Tensor:
        note(tensor, kept[inside[-1]])
        return tensor

    def watch(path: str, block: nn.Module):
        def enter(_, args, kwargs) -> None:
            inside.append(path)
            kept[path], entered[path], flops[path] = {}, {}, -counter.get_total_flops() - gpu.attention_flops
            for tensor in (*args, *kwargs.values()):
                if isinstance(tensor, Tensor) and tensor.ndim > 2:
                    note(tensor, entered[path])

        def leave(*_) -> None:
            flops[inside.pop()] += counter.get_total_flops() + gpu.attention_flops

        return block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)

    handles = [handle for item in blocks_of(network).items() for handle in watch(*item)]
    try:
        with gpu, counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            graph = run()  # held, so that every storage stays where it is
    finally:
        for handle in handles:
            handle.remove()
    del graph
    return Activations(_sizes(kept), _sizes(entered), flops)


def _sizes(storages: dict[str, dict[int, torch.UntypedStorage]]) -> dict[str, Storages]:
    return {path: {number: s.nbytes() for number, s in some.items()} for path, some in storages.items()}


def most_bytes(network: nn.Module, run: Callable[[], object]) -> int:
    """Most bytes that tensors made by `run`, a pass without gradients on the meta device, take at the same time."""
    live = LiveBytes()
    with torch.no_grad(), _AsOnGPU(network.dtype), live:
        run()
    return live.most


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations inside make, while they are alive: on a CPU and on the meta
    device no allocator tells. most: at the same time."""

    def __init__(self):
        super().__init__()
        self.numbers: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self.numbers:
                self.numbers.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _freed(self, number: int, size: int) -> None:
        self.numbers.discard(number)
        self.now -= size


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class _AsOnGPU(TorchFunctionMode):
    """A pass on the meta device as it runs on a GPU: CUDA's autocast to `dtype`, and attention by fused kernels.

    Without weights torch has no autocast, and falls back to the form of attention that keeps its matrices.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.attention_flops = dtype, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.dtype != torch.float32 and func in TO_LOW + TO_FULL:
            to = self.dtype if func in TO_LOW else torch.float32
            args = [_cast(a, to) for a in args]
            kwargs = {name: _cast(value, to) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            tensors = named["query"], named["key"], named["value"]
            self.attention_flops += sdpa_flop_count(*(t.shape for t in tensors))
            return _Attention.apply(*tensors)
        return func(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class _Attention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: query, key, value and the result. Never run backward."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result)
        return result
