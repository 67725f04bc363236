"""The memory that a pass through a network keeps and holds, block by block, without a weight or a GPU.

The pass is run on torch's meta device, whose tensors have shapes and no numbers: every tensor that autograd
saves, or that is alive, is counted by its storage.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from .blocks import LEAVING, blocks_of

OUTSIDE = ""  # the path of all that is in no block
# A storage's number -> its bytes. Tensors that share a storage count once.
Storages = dict[int, int]


@dataclass(frozen=True)
class Activations:
    """One forward pass, by block path ("" for what is in no block).

    kept: the tensors that autograd keeps for the backward pass. entered: each block's inputs, which are all
    that is kept of a block that is computed again; movable: those of them that gradients go to. flops: the FLOPs of
    each block, which that costs.
    """

    kept: dict[str, Storages]
    entered: dict[str, Storages]
    movable: Storages
    flops: dict[str, int]

    def bytes(self, recomputed: Collection[str], offloaded: bool = False) -> int:
        """Bytes at the peak of the backward pass, where the blocks at these paths are computed again.

        They are the inputs of those blocks, everything that the others keep, and the largest of those blocks,
        whose activations are there while it is computed again. offloaded: what is movable of the inputs is in main
        memory, but for as many of the largest as are on their way.
        """
        union: Storages = {}
        for path, storages in self.kept.items():
            union |= self.entered[path] if path in recomputed else storages
        if offloaded:
            elsewhere = {n for path, storages in self.kept.items() if path not in recomputed for n in storages}
            moved = sorted(union.pop(number) for number in self.movable.keys() & union.keys() - elsewhere)
            union[-1] = sum(moved[-LEAVING:])
        largest = max((sum(self.kept[path].values()) for path in recomputed if path in self.kept), default=0)
        return sum(union.values()) + largest

    def saving(self, path: str) -> float:
        """The bytes that a block saves for each FLOP of computing it again."""
        return (sum(self.kept[path].values()) - sum(self.entered[path].values())) / max(1, self.flops[path])


@dataclass(eq=False)
class _Saved:
    """A tensor as autograd's graph keeps it: gone with that part of the graph."""

    tensor: Tensor


def kept_activations(network: nn.Module, run: Callable[[], object]) -> Activations:
    """Watch `run`, a forward pass through the network on the meta device, for what its backward pass would need."""
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    saved: dict[str, list[weakref.ref[_Saved]]] = {OUTSIDE: []}
    # the storages themselves, until the end: a number may come again once its storage is freed
    entered: dict[str, dict[int, torch.UntypedStorage]] = {}
    movable: dict[int, torch.UntypedStorage] = {}
    flops: dict[str, int] = {}
    inside = [OUTSIDE]  # paths of the blocks that the pass is in, the innermost last
    counter, gpu = Operations(), AsOnGPU()
    done = lambda: counter.flops + gpu.attention_flops  # noqa: E731

    def note(tensor: Tensor, into: dict[int, torch.UntypedStorage]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            into[storage._cdata] = storage

    def pack(tensor: Tensor) -> _Saved:
        held = _Saved(tensor)
        saved[inside[-1]].append(weakref.ref(held))
        return held

    def watch(path: str, block: nn.Module):
        def enter(_, args, kwargs) -> None:
            inside.append(path)
            saved[path], entered[path], flops[path] = [], {}, -done()
            for tensor in (*args, *kwargs.values()):
                if isinstance(tensor, Tensor) and tensor.ndim > 2:
                    note(tensor, entered[path])
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    note(tensor, movable)

        def leave(*_) -> None:
            flops[inside.pop()] += done()

        return block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)

    handles = [handle for path, block in blocks_of(network).items() for handle in watch(path, block)]
    try:
        with gpu, counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            graph = run()  # held, and with it what its backward pass needs
    finally:
        for handle in handles:
            handle.remove()
    kept: dict[str, dict[int, torch.UntypedStorage]] = {path: {} for path in saved}
    for path, references in saved.items():
        for held in filter(None, (reference() for reference in references)):  # not of a part that was detached
            note(held.tensor, kept[path])
    del graph
    return Activations(_sizes(kept), _sizes(entered), _sizes({OUTSIDE: movable})[OUTSIDE], flops)


def _sizes(by_path: dict[str, dict[int, torch.UntypedStorage]]) -> dict[str, Storages]:
    """The storages' bytes in place of the storages."""
    return {path: {number: s.nbytes() for number, s in storages.items()} for path, storages in by_path.items()}


def most_bytes(run: Callable[[], object]) -> int:
    """The most bytes that are alive at once in `run`, a pass without gradients on the meta device."""
    live = LiveBytes()
    with torch.no_grad(), AsOnGPU(), live:
        run()
    return live.most


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations in its block make, while they are alive.

    On a CPU and on the meta device no allocator tells. device: the type of device whose tensors count; None: all of
    them. now: bytes alive; most: the most that were alive at once.
    """

    def __init__(self, device: str | None = None):
        super().__init__()
        self.device = device
        self.numbers: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._note_new(tensors_of((args, kwargs)), tensors_of(result))
        return result

    def _note_new(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Count what an operation has made; a view of what it was given, or an operation in place, makes nothing."""
        given = {x.untyped_storage()._cdata for x in inputs}
        for x in outputs:
            storage = x.untyped_storage()
            number = storage._cdata
            if number not in given and number not in self.numbers and self.device in (None, x.device.type):
                self.numbers.add(number)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, number, storage.nbytes())
        self.most = max(self.most, self.now)

    def _freed(self, number: int, size: int) -> None:
        self.numbers.discard(number)
        self.now -= size


class Operations(TorchDispatchMode):
    """Counts the FLOPs of what runs in its block, and the operations that make something or change it in place."""

    def __init__(self):
        super().__init__()
        self.flops = self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.flops += flops_of(func, args, kwargs, result)
        self.launches += not (func.is_view or "empty" in func._schema.name)
        return result


def flops_of(func, args: tuple, kwargs: dict, result: object) -> int:
    """Floating-point operations of one of torch's own, as its counter has them; 0 for what it does not count.

    A product of integers, which it does not, counts as one of the same shape.
    """
    kind = torch.ops.aten.mm if func._overloadpacket == torch.ops.aten._int_mm else func._overloadpacket
    count = flop_registry.get(kind)
    return 0 if count is None else count(*args, **kwargs, out_val=result)


def tensors_of(tree: object) -> list[Tensor]:
    """The tensors among what an operation is given, or returns."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    # not torch's pytree, which takes a tenth of all the time of a count
    return [tensor for leaf in tree for tensor in tensors_of(leaf)]


class AsOnGPU(TorchFunctionMode):
    """A pass on the meta device as it runs on a GPU: attention by fused kernels, where torch falls back without them to
    the form of attention that keeps its matrices."""

    def __init__(self):
        super().__init__()
        self.attention_flops = 0  # of fused kernels, which torch's own counter does not see
        self.largest: tuple[int, list[torch.Size]] = 0, []  # FLOPs, and shapes of query and key, of the one with most

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            arguments = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = (arguments[name] for name in ("query", "key", "value"))
            flops = sdpa_flop_count(query.shape, key.shape, value.shape)
            self.attention_flops += flops
            self.largest = max(self.largest, (flops, [query.shape, key.shape]))
            return _Attention.apply(query, key, value)
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps: query, key, value and the result. It is never run backward."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result)
        return result
