"""The network's repeated blocks, where nearly all of its weights, activations and time are, and how each is run.

A block can be computed again for the backward pass, compiled, have its frozen weights in main memory, or
share them among processes. Each of these puts another `forward` on the block, so that the order in which they
are called is the order from the inside out (see `prepare.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import wraps

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ..lora.adapter import Learner

KINDS = (ResnetBlock2D, BasicTransformerBlock, JointTransformerBlock)
# Graphs of one kind of block that torch.compile may make before it gives up in silence: one for each size of
# the picture inside the network, with and without gradients, for the batches of teacher, target and student.
GRAPHS = 64
Pass = Callable[..., object]  # a block's forward


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """Path -> block, in the network's order."""
    return {path: module for path, module in network.named_modules() if isinstance(module, KINDS)}


def recompute(learner: Learner, paths: Collection[str] | None = None) -> None:
    """Keep no activations of the blocks at these paths (default: all) for the backward pass, only their inputs.

    Each is computed again with the learner as it was in the forward pass: a discriminator's body ran without
    the adapter, which is on again by the time of its backward pass.
    """
    for path, block in blocks_of(learner.network).items():
        if paths is None or path in paths:
            block.forward = _recomputed(block.forward, learner)


def _recomputed(run: Pass, learner: Learner) -> Pass:
    @wraps(run)
    def forward(*args, **kwargs):
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        # nothing is left to chance in these passes (no dropout), so no state of it is kept
        return checkpoint(
            run, *args, use_reentrant=False, context_fn=learner.as_it_is, preserve_rng_state=False, **kwargs
        )

    return forward


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
    """Keeps the blocks' frozen weights in main memory, and copies each to `device` for every pass of its block.

    The weights are pinned where there is a GPU, so that copying them does not wait. bytes: how much of them
    there is. copies: how many weights have been copied so far. To be followed by `recompute`, without which
    autograd would hold on to every copy until the backward pass.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        self.device = device
        self.copies = 0
        self.bytes = 0
        for block in blocks_of(network).values():
            block.forward = self._fetching(block)

    def _fetching(self, block: nn.Module) -> Pass:
        """The block's forward with weights that are fetched first, once they have been moved to main memory."""
        frozen = {path for path, p in block.named_parameters() if not p.requires_grad}
        for path in frozen:
            parent, _, name = path.rpartition(".")
            weight = getattr(block.get_submodule(parent), name)
            self.bytes += weight.nbytes
            setattr(block.get_submodule(parent), name, nn.Parameter(self._stored(weight), requires_grad=False))
        call = _Call(block)

        @wraps(call.run)
        def forward(*args, **kwargs):
            # an adapter that was loaded since lies beside the weights, in main memory
            waiting = {p: w for p, w in block.named_parameters() if p in frozen or w.device != self.device}
            self.copies += len(waiting)
            copies = {f"block.{p}": w.to(self.device, non_blocking=True, copy=True) for p, w in waiting.items()}
            return functional_call(call, copies, args, kwargs)

        return forward

    def _stored(self, weight: Tensor) -> Tensor:
        """A weight in main memory."""
        weight = weight.detach().cpu()
        # a quantised weight is more than one tensor, which torch cannot pin as one
        return weight.pin_memory() if self.device.type == "cuda" and type(weight) is Tensor else weight


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
    """Compile and run something small. Raises ValueError where torch.compile lacks what it needs on this device."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of every kind, by what is missing
        needs = "Triton (pip install triton)" if device.type == "cuda" else "a C++ compiler (apt-get install g++)"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"train.compile=true, but torch.compile does not work on this {device.type}: {reason}. "
            f"Install {needs}, or set train.compile=false."
        ) from error
