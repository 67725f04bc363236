"""The network's repeated blocks, where nearly all of its weights, activations and time are, and how each is run.

A block can be computed again for the backward pass, compiled, have its frozen weights in main memory, or
share them among processes. Each of these puts another `forward` on the block, so that the order in which they
are called is the order from the inside out (see `prepare.py`).
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ..lora.adapter import Learner
from ..system.machine import same_device

KINDS = (ResnetBlock2D, BasicTransformerBlock, JointTransformerBlock)
# Graphs of one kind of block that torch.compile may make before it gives up in silence: one for each size of
# the picture inside the network, with and without gradients, for the batches of teacher, target and student.
GRAPHS = 64
LEAVING = 2  # inputs of blocks that may be on their way to main memory at once
ALIGNED = 256  # numbers, to a multiple of which a weight begins in its piece, as it would in memory of its own
Pass = Callable[..., object]  # a block's forward
Pieces = dict[torch.dtype, Tensor]  # a block's frozen weights, those of a dtype in a row
Placed = tuple[torch.Size, tuple[int, ...], int]  # shape, strides and first number of a tensor in its piece


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """Path -> block, in the network's order."""
    return {path: module for path, module in network.named_modules() if isinstance(module, KINDS)}


def recompute(learner: Learner, paths: Collection[str] | None = None, inputs: InputOffload | None = None) -> None:
    """Keep no activations of the blocks at these paths (default: all) for the backward pass, only their inputs.

    Each is computed again with the learner as it was in the forward pass: a discriminator's body ran without
    the adapter, which is on again by the time of its backward pass. inputs: has the inputs wait in main memory.
    """
    for path, block in blocks_of(learner.network).items():
        if paths is None or path in paths:
            block.forward = _recomputed(block.forward, learner, inputs)


def _recomputed(run: Pass, learner: Learner, inputs: InputOffload | None) -> Pass:
    @wraps(run)
    def forward(*args, **kwargs):
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        # Arguments by name become others by place: those torch keeps as autograd keeps tensors, which can be moved.
        # What is made here holds on to none of them.
        first, names, given = len(args), tuple(kwargs), (*args, *kwargs.values())

        def by_place(*given):
            return run(*given[:first], **dict(zip(names, given[first:], strict=True)))

        with inputs.of(given) if inputs else nullcontext():
            # nothing is left to chance in these passes (no dropout), so no state of it is kept
            return checkpoint(
                by_place, *given, use_reentrant=False, context_fn=learner.as_it_is, preserve_rng_state=False
            )

    return forward


@dataclass(eq=False)
class _Waiting:
    """A tensor in main memory, and the event after which it is there."""

    tensor: Tensor
    landed: torch.cuda.Event | None


class InputOffload:
    """Keeps the inputs of blocks that are computed again in main memory, from their forward to their backward pass.

    Only those that gradients go to, which are each block's own: what all of them are given, such as a prompt's
    encoding, stays. On a GPU they leave on a stream of their own, for pinned memory, and come back for the backward
    pass on that of the work. moved: bytes that have left so far.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.moved = 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.leaving: deque[torch.cuda.Event] = deque()

    def of(self, inputs: Collection[object]) -> saved_tensors_hooks:
        """What makes autograd keep these in main memory, where it keeps them."""
        numbers = {x.untyped_storage()._cdata for x in inputs if isinstance(x, Tensor) and x.requires_grad}
        return saved_tensors_hooks(lambda x: self._away(x) if x.untyped_storage()._cdata in numbers else x, self._back)

    def _away(self, tensor: Tensor) -> _Waiting:
        self.moved += tensor.nbytes
        waiting = torch.empty_like(tensor, device="cpu", pin_memory=self.stream is not None)
        if not self.stream:
            return _Waiting(waiting.copy_(tensor), None)

        # The host does not run on ahead by more than LEAVING copies: what they are made of keeps its place on the GPU.
        while len(self.leaving) >= LEAVING:
            self.leaving.popleft().synchronize()
        self.stream.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self.stream):
            waiting.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)
        landed = self.stream.record_event()
        self.leaving.append(landed)
        return _Waiting(waiting, landed)

    def _back(self, kept: Tensor | _Waiting) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if kept.landed:
            torch.cuda.current_stream(self.device).wait_event(kept.landed)
        return kept.tensor.to(self.device, non_blocking=True, copy=True)


def shard(network: nn.Module, learner: Learner) -> int:
    """Leave each process a share of the frozen weights (FSDP, arXiv 2304.11277); what is learnt stays whole everywhere.

    For its pass every block is put together from all shares, so all processes must run every pass together.
    Returns the bytes of frozen weights that this process still holds.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    learnt = set(learner.parameters())
    network.to(memory_format=torch.contiguous_format)  # the only one that fully_shard takes
    # the blocks first: what they have taken, the network as a whole leaves alone
    for module in (*blocks_of(network).values(), network):
        fully_shard(module, ignored_params={p for p in module.parameters() if p in learnt})
    return sum(p.to_local().nbytes for p in network.parameters() if isinstance(p, DTensor))


class Offload:
    """Keeps the blocks' frozen weights in main memory, and copies a block's to `device` for every pass of it.

    A block's weights of a dtype are one piece of memory, which takes one copy. On a GPU the pieces are pinned, and the
    copies are made on a stream of their own: while a block is at work the one that came after it last time, forward or
    backward, is on its way. bytes: how much of the weights there is. copies: how many pieces have been copied so far.
    To be followed by `recompute`, without which autograd would hold on to every copy until the backward pass.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        self.device = device
        self.copies = 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.stored = {path: _Stored(block, self.stream is not None) for path, block in blocks_of(network).items()}
        self.bytes = sum(stored.bytes for stored in self.stored.values())
        # what is on its way, by block; the passes by which the next one is known; events after each block's work
        self.coming: dict[str, tuple[Pieces, torch.cuda.Event | None]] = {}
        self.place: tuple[str | None, str | None, bool] = (None, None, False)  # block before, block now, with gradients
        self.follower: dict[tuple[str | None, str | None, bool], str] = {}
        self.worked: deque[torch.cuda.Event] = deque()
        for path, block in blocks_of(network).items():
            block.forward = self._fetching(path, block)

    def _fetching(self, path: str, block: nn.Module) -> Pass:
        """The block's forward with weights that are fetched first."""
        call, stored = _Call(block), self.stored[path]

        @wraps(call.run)
        def forward(*args, **kwargs):
            weights = stored.weights(self._fetch(path))
            # an adapter that was loaded since lies beside the weights, in main memory
            for name, weight in block.named_parameters():
                if name not in weights and not same_device(weight.device, self.device):
                    weights[name] = weight.to(self.device)
            try:
                return functional_call(call, {f"block.{name}": w for name, w in weights.items()}, args, kwargs)
            finally:
                if self.stream:
                    self.worked.append(torch.cuda.current_stream(self.device).record_event())

        return forward

    def _fetch(self, path: str) -> Pieces:
        """The block's pieces on the device; those of the block that is expected next are on their way afterwards."""
        self.follower[self.place] = path
        self.place = (self.place[1], path, torch.is_grad_enabled())
        pieces, landed = self.coming.pop(path, None) or self._copy(path)
        self.coming.clear()  # of another block than came
        if not self.stream:
            return pieces

        # The host does not run on ahead by more than a block: what is copied waits in the GPU's memory for its turn.
        while len(self.worked) > 1:
            self.worked.popleft().synchronize()
        if upcoming := self.follower.get(self.place):
            self.coming[upcoming] = self._copy(upcoming)
        work = torch.cuda.current_stream(self.device)
        work.wait_event(landed)
        for piece in pieces.values():
            piece.record_stream(work)
        return pieces

    def _copy(self, path: str) -> tuple[Pieces, torch.cuda.Event | None]:
        """The block's pieces on their way to the device, and the event after which they are there."""
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            waiting = self.stored[path].pieces
            self.copies += len(waiting)
            pieces = {dtype: piece.to(self.device, non_blocking=True, copy=True) for dtype, piece in waiting.items()}
        return pieces, self.stream.record_event() if self.stream else None


class _Stored:
    """A block's frozen weights in main memory: those of a dtype in one piece, of which the block's own are views.

    A quantised weight is several tensors, each with its place in the piece of its dtype.
    """

    def __init__(self, block: nn.Module, pinned: bool):
        self.frozen = {path: p for path, p in block.named_parameters() if not p.requires_grad}
        leaves = {path: _leaves(weight.data) for path, weight in self.frozen.items()}
        self.bytes = sum(leaf.nbytes for some in leaves.values() for leaf in some)

        sizes: Counter[torch.dtype] = Counter()
        self.places: dict[str, list[tuple[torch.dtype, Placed]]] = {}
        for path, some in leaves.items():
            self.places[path] = []
            for leaf in some:
                self.places[path].append((leaf.dtype, (leaf.shape, _dense_stride(leaf), sizes[leaf.dtype])))
                sizes[leaf.dtype] += -(-leaf.numel() // ALIGNED) * ALIGNED
        self.pieces = {
            dtype: torch.empty(n, dtype=dtype, device="cpu", pin_memory=pinned) for dtype, n in sizes.items()
        }

        views = self.weights(self.pieces)
        for path, some in leaves.items():
            for view, leaf in zip(_leaves(views[path]), some, strict=True):
                view.copy_(leaf)
            parent, _, name = path.rpartition(".")
            setattr(block.get_submodule(parent), name, nn.Parameter(views[path], requires_grad=False))
        self.frozen = views

    def weights(self, pieces: Pieces) -> dict[str, Tensor]:
        """The weights by path, as views of these pieces."""
        return {
            path: _rebuilt(weight, iter([pieces[dtype].as_strided(*placed) for dtype, placed in self.places[path]]))
            for path, weight in self.frozen.items()
        }


def _leaves(weight: Tensor) -> list[Tensor]:
    """The plain tensors that a weight is made of: several for a quantised one."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    return [leaf for name in weight.__tensor_flatten__()[0] for leaf in _leaves(getattr(weight, name))]


def _rebuilt(weight: Tensor, leaves: Iterator[Tensor]) -> Tensor:
    """A weight like this one of other plain tensors, in the order of `_leaves`."""
    if not hasattr(weight, "__tensor_flatten__"):
        return next(leaves)
    names, context = weight.__tensor_flatten__()
    inner = {name: _rebuilt(getattr(weight, name), leaves) for name in names}
    return type(weight).__tensor_unflatten__(inner, context, weight.size(), weight.stride())


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's strides without gaps: its own where it has none, in whatever order its dimensions lie."""
    return torch.empty_like(tensor, device="meta").stride()


class _Call(nn.Module):
    """A block's first forward as a module, as functional_call wants one: the block's own now leads to that call."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.run = block.forward

    def forward(self, *args, **kwargs):
        return self.run(*args, **kwargs)


def compile_blocks(network: nn.Module, backend: str = "inductor") -> int:
    """Compile every block's forward; returns how many blocks there are. Comes before `Offload` and `recompute`.

    Blocks of a kind share their graphs. The adapter must be switched by a number
    (`Adapter.switch_by_number`): a switch of modules would compile them anew.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    blocks = blocks_of(network)
    for block in blocks.values():
        block.forward = torch.compile(block.forward, backend=backend)
    return len(blocks)


def check_compiler(device: torch.device) -> None:
    """Raise ValueError where torch.compile lacks what it needs on this device."""
    if problem := compiler_problem(device):
        raise ValueError(f"train.compile=true, but {problem}, or set train.compile=false.")


def compiler_problem(device: torch.device) -> str:
    """Compile and run something small: what torch.compile lacks on this device, "" where it works."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of every kind, by what is missing
        triton = "triton-windows" if sys.platform == "win32" else "triton"
        needs = f"Triton (pip install {triton})" if device.type == "cuda" else "a C++ compiler (apt-get install g++)"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"torch.compile does not work on this {device.type}: {reason}. Install {needs}"
    return ""
