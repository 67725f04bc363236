"""Instruments: passes through the networks by hooks, floating-point operations, bytes at the peak."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..efficiency.activations import LiveBytes
from ..families import Base

# The kinds of passes that are counted, each in samples.
NO_GRADIENT, GRADIENT, FIRST_BLOCKS = "forward without gradient", "forward with gradient", "of both, first blocks only"
BACKWARD, IMAGES, PROMPTS = "backward", "pictures encoded", "prompts encoded"
PASSES = (NO_GRADIENT, GRADIENT, FIRST_BLOCKS, BACKWARD, IMAGES, PROMPTS)


@contextmanager
def passes_counted(bases: Iterable[Base]) -> Iterator[Counter[str]]:
    """Count, inside this block, the samples that pass through the bases' networks and encoders, by `PASSES`.

    A pass that ends before the network's last block, as a discriminator's may, counts as one of the first blocks only.
    """
    counts: Counter[str] = Counter()

    def enters(_, args, kwargs) -> None:
        x = _first(args, kwargs)
        counts[GRADIENT if torch.is_grad_enabled() else NO_GRADIENT] += len(x)
        counts[FIRST_BLOCKS] += len(x)  # taken back where the pass comes to the end
        if x.requires_grad:  # through the network to its input: the body of a discriminator
            x.register_hook(lambda _: counts.update({BACKWARD: len(x)}))

    def leaves(_, args, kwargs, output) -> None:
        x = _first(args, kwargs)
        counts[FIRST_BLOCKS] -= len(x)
        if output[0].requires_grad and not x.requires_grad:
            output[0].register_hook(lambda _: counts.update({BACKWARD: len(x)}))

    def encodes(what: str) -> Callable:
        return lambda _, args, kwargs: counts.update({what: len(_first(args, kwargs))})

    handles = []
    for base in bases:
        handles.append(base.network.register_forward_pre_hook(enters, with_kwargs=True))
        handles.append(base.network.register_forward_hook(leaves, with_kwargs=True))
        encoders: list[tuple[str, nn.Module]] = [(PROMPTS, encoder) for encoder in base.text_encoders[:1]]
        if base.vae is not None:
            encoders.append((IMAGES, base.vae.encoder))
        handles += [m.register_forward_pre_hook(encodes(what), with_kwargs=True) for what, m in encoders]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of `run` in matrix products, convolutions and attention, backward passes included."""
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


def alive_bytes(device: torch.device) -> int:
    """Bytes of all tensors that are held now, by CUDA's allocator, or on a CPU as far as Python can reach them."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)

    # exact types: the parts of a quantised weight are tensors too, and those that torch.compile leaves hold nothing
    tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and o.device.type == "cpu"]
    # a tensor that no Python object is a view of, such as a parameter's gradient, is not among them
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Bytes of the tensors that `run` makes and holds at its peak, beyond those held before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    live = LiveBytes()
    with live:
        run()
    return live.most


def _first(args: tuple, kwargs: dict) -> Tensor:
    """The first tensor among a module's arguments, which has a row for each sample."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
