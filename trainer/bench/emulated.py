"""A CUDA device that is not there, in a process of its own: `python emulated.py GUARD CONFIG ...` (see `count`).

The networks are fake tensors, which have a shape, a dtype and a device and hold nothing; autocast, autograd,
checkpointing and the optimizer are the real ones. Nothing is imported at the top that imports torch: what says that
there is a device must be loaded before.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

# What torch asks a device for: which one is at work, and its streams. Whatever is asked, there is nothing to do.
GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
using namespace c10;

struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
}

namespace at { C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, Hooks) }
"""


def load_guard(path: str) -> None:
    """Let torch, which must not have been imported yet, find the compiled guard."""
    libraries = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    for name in ("libc10.so", "libtorch_cpu.so", path):
        ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)


def pretend() -> None:
    """Let torch's Python side say what a GPU that can do everything would."""
    import torch
    from torch import nn

    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "is_bf16_supported": True,
        "get_device_capability": (9, 0),
        "is_current_stream_capturing": False,
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    event = SimpleNamespace(record=lambda *_: None, synchronize=lambda: None)
    stream = SimpleNamespace(record_event=lambda *_: event, wait_event=lambda _: None)
    torch.cuda.Event = lambda *_, **__: event
    torch.cuda.Stream = torch.cuda.current_stream = lambda *_, **__: stream
    torch.cuda.stream = lambda _: nullcontext()
    torch.Tensor.record_stream = lambda *_: None
    nn.Module._apply = _apply


def _apply(self, change, recurse=True):
    """`nn.Module._apply` as far as it is used, with new parameters in place of old: fake ones cannot be swapped."""
    import torch
    from torch import nn

    for child in self.children():
        child._apply(change)
    with torch.no_grad():
        for name, parameter in self._parameters.items():
            if parameter is not None and (changed := change(parameter)) is not parameter:
                self._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = change(buffer)
    return self


def main(guard: str, *configs: str) -> None:
    """Print a line of JSON for each configuration's file."""
    load_guard(guard)
    from accelerate.state import AcceleratorState

    from ..config.load import load_config
    from .full_size import counted

    pretend()  # after the imports: libraries that see a GPU load what a build of torch without CUDA has not
    for config in configs:
        AcceleratorState._reset_state(reset_partial_state=True)  # which is one for a process, whatever it trains
        print(json.dumps(counted(load_config(config))))


if __name__ == "__main__":
    main(*sys.argv[1:])
