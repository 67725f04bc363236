"""What an update asks of a GPU, read off the operations as they are dispatched: nothing of it needs the GPU itself."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..efficiency.activations import LiveBytes, flops_of, tensors_of
from ..system.clock import Clock

ROOT = Path(__file__).parents[2]
GPU = "cuda"
OTHER = "other"  # the part of an update that is in no other, as `Clock` calls it
# Operations whose result the host needs before it can go on: it waits until the GPU has come to them.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")
COPIES = ("_to_copy", "copy_")


@dataclass
class Tally:
    """What a part of an update asks of the GPU.

    launches: operations that make or change a tensor there, one kernel each at least. flop: floating-point operations
    of products, convolutions and attention. moved: bytes of the operands and results of all launches. peak: most bytes
    of tensors that are alive there at once. copies, copied: between host and GPU, and their bytes. waits: how often the
    host waits for the GPU.
    """

    launches: int = 0
    flop: int = 0
    moved: int = 0
    peak: int = 0
    copies: int = 0
    copied: int = 0
    waits: int = 0

    def __add__(self, other: Tally) -> Tally:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Tally(**sums | {"peak": max(self.peak, other.peak)})


class Ledger(LiveBytes):
    """Notes, inside its block, what every operation asks of the GPU, by the part of the update that is under way.

    parts: by name. launched, moved: launches and bytes by operation and dtype. places: copies between host and GPU, and
    waits, by kind and by the line of ours that asked for them. Tensors count as alive from the first operation inside
    the block that makes them. device: the type of device that stands for the GPU.
    """

    def __init__(self, device: str = GPU):
        super().__init__(device)
        self.part = OTHER
        self.pinned: set[int] = set()  # numbers of storages in main memory that a GPU can fetch while the host goes on
        self.clear()

    def clear(self) -> None:
        """Begin again at zero, but for what is alive."""
        self.parts: dict[str, Tally] = {}
        self.launched: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.places: Counter[tuple[str, str]] = Counter()

    def total(self) -> Tally:
        return sum(self.parts.values(), Tally())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # asked more often than all else: answered without the fake mode
            return args[0].device
        if func.namespace == "prim":  # what else a fake tensor is asked of itself
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        inputs = tensors_of((args, kwargs))
        part = self.parts.setdefault(self.part, Tally())
        if name in WAITS and any(map(self._on_gpu, inputs)):
            part.waits += 1
            self.places["wait", _place()] += 1
            if name == "_local_scalar_dense":  # a number that no GPU has computed
                return inputs[0].dtype.is_floating_point and 1.0 or 1

        pins = name == "_pin_memory" or kwargs.get("pin_memory")
        if name == "_pin_memory":  # which fake tensors do not know
            func, args, kwargs = torch.ops.aten.clone.default, args[:1], {}
        result = func(*args, **kwargs)
        outputs = tensors_of(result)
        self._note_new(inputs, outputs)
        if pins:
            self._pin(outputs[0])
        if name in COPIES:
            self._note_copy(part, name, args, kwargs, inputs, outputs)
        if self._launches(func, name, inputs, outputs):
            self._note_launch(part, func, name, args, kwargs, inputs, result, outputs)
        part.peak = max(part.peak, self.now)
        return result

    def _launches(self, func: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        """Whether a kernel runs: something on the GPU is made, or changed in place. Views and bare memory need none."""
        if "empty" in name or not any(map(self._on_gpu, outputs or inputs)):
            return False
        if func._schema.is_mutable:
            return True
        known = {x.untyped_storage()._cdata for x in inputs}
        return any(x.untyped_storage()._cdata not in known for x in outputs)

    def _note_launch(self, part, func, name, args, kwargs, inputs, result, outputs) -> None:
        """Count a launch, its floating-point operations, and the bytes of every tensor that it reads or writes."""
        operands = {
            x.untyped_storage()._cdata: x.numel() * x.element_size() for x in inputs + outputs if self._on_gpu(x)
        }
        moved = sum(operands.values())
        part.launches += 1
        part.moved += moved
        kind = f"{name} {self._dtype(outputs or inputs)}"
        self.launched[kind] += 1
        self.moved[kind] += moved
        part.flop += flops_of(func, args, kwargs, result)

    def _note_copy(self, part, name, args, kwargs, inputs, outputs) -> None:
        """Count a copy between host and GPU; the host waits for it unless it is asked not to, from pinned memory."""
        source, target = (args[1], args[0]) if name == "copy_" else (inputs[0], outputs[0])
        if not isinstance(source, Tensor) or self._on_gpu(source) == self._on_gpu(target):
            return
        part.copies += 1
        part.copied += target.numel() * target.element_size()
        on_host = target if self._on_gpu(source) else source
        unasked = kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
        waits = not (unasked and on_host.untyped_storage()._cdata in self.pinned)
        part.waits += waits
        self.places["copy that waits" if waits else "copy", _place()] += 1

    def _pin(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.pinned.add(storage._cdata)
        weakref.finalize(storage, self.pinned.discard, storage._cdata)

    def _on_gpu(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device

    def _dtype(self, tensors: list[Tensor]) -> str:
        """The dtype of the first of these on the GPU, by its name."""
        return next((str(x.dtype).removeprefix("torch.") for x in tensors if self._on_gpu(x)), "")

    def report(self, most: int = 20) -> dict[str, Any]:
        """All of it as JSON-ready values, with the operations that move the most bytes."""
        return {
            "parts": {name: asdict(part) for name, part in self.parts.items()},
            "total": asdict(self.total()),
            "operations": [
                {"name": name, "launches": self.launched[name], "moved": moved}
                for name, moved in self.moved.most_common(most)
            ],
            "places": [{"kind": kind, "line": line, "times": n} for (kind, line), n in self.places.most_common(most)],
        }


class LedgerClock(Clock):
    """Tells the ledger which part of the update is under way; measures no time."""

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self._inside:
            yield
            return
        self._inside, self.ledger.part = True, name
        try:
            yield
        finally:
            self._inside, self.ledger.part = False, OTHER


def _place() -> str:
    """The line of the code outside of torch that has asked for the operation under way: ours, if any is on the way."""
    frame, outside = sys._getframe(1), ""
    while frame is not None:
        name, ours = _source(frame.f_code.co_filename)
        if name and ours:
            return f"{name}:{frame.f_lineno}"
        if name and not outside:
            outside = f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return outside


@cache
def _source(filename: str) -> tuple[str, bool]:
    """A source file's name in `_place`'s answer, and whether it is ours; no name for torch's and for the counting."""
    path = Path(filename)
    if path.is_relative_to(ROOT / "trainer") or path.is_relative_to(ROOT / "samplers"):
        counting = path == Path(__file__) or path.name == "activations.py"
        return ("" if counting else path.relative_to(ROOT).as_posix()), True
    return ("" if "torch" in path.parts else path.name), False
