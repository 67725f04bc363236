"""Facts about this machine: versions, device, memory, optional packages."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .comfyui import hosts

REQUIRED = (
    *("torch", "diffusers", "transformers", "peft", "accelerate"),
    *("safetensors", "numpy", "pydantic", "typer", "rich", "pillow", "matplotlib", "webdataset", "psutil"),
)
OPTIONAL = (
    {"tensorboard": "logs of the run", "wandb": "train.trackers", "trackio": "train.trackers"}
    | {"bitsandbytes": "train.optimizer=adamw8bit", "torchao": "base.quantize"}
    | {name: "FID's features in pcm evaluate" for name in ("torchmetrics", "torch-fidelity")}
    | {name: "T5's tokenizer where it is a spiece.model, SD3 only" for name in ("sentencepiece", "protobuf")}
)
GIB = 2**30  # bytes
NO_BF16 = "This GPU only emulates bf16, and has no fast convolutions in it: add base.dtype=fp16, which it computes in."
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the settings of torch's allocator, by both their names
WHOLE = 0.95  # of a GPU's memory: the rest is the context's, and what draws the screen


def examine() -> dict[str, Any]:
    """Facts about this machine as JSON-ready values, for `pcm doctor` and reports; touches no network."""
    cuda = torch.cuda.is_available()
    device = {"name": platform.processor() or platform.machine(), "kind": "cpu", "threads": torch.get_num_threads()}
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        device = {
            "name": properties.name,
            "kind": "cuda",
            "count": torch.cuda.device_count(),
            "memory_gib": round(properties.total_memory / GIB, 1),
            "bf16": native_bf16(),
        }
    host = next(iter(hosts()), None)
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("phased-consistency", *REQUIRED)},
        "optional": {name: _version(name) for name in OPTIONAL},
        "device": device,
        "free_disk_gib": round(shutil.disk_usage(".").free / GIB, 1),
        "hub": "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else "on",
        "comfyui": str(host) if host else None,
        "missing": [name for name in REQUIRED if _version(name) is None],
    }


def _version(name: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_version() -> str:
    """The installed version of this package, or "unknown" in a source tree."""
    try:
        return version("phased-consistency")
    except PackageNotFoundError:
        return "unknown"


def native_bf16() -> bool:
    """Whether the GPU computes in bf16 itself. Cards before Ampere emulate it, and cuDNN has no convolutions in it for
    them, which torch's own answer leaves out."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def unseen_gpu() -> str:
    """A sentence where torch is built for CUDA and finds no GPU to use; "" where it has one, or is built for CPUs."""
    if not torch.version.cuda or torch.cuda.is_available():
        return ""
    return (
        f"This torch is built for CUDA {torch.version.cuda} and can use no GPU. If there is one, nvidia-smi tells "
        "whether its driver works and which CUDA it is for: update the driver, install a torch for that CUDA, or mend "
        "CUDA_VISIBLE_DEVICES."
    )


def lacking_capability(device: torch.device, needed: tuple[int, int]) -> tuple[str, str] | None:
    """The compute capability that is needed and the one of this GPU, as people write them, where its own is less."""
    there = torch.cuda.get_device_capability(device)
    if there >= needed:
        return None
    return ".".join(map(str, needed)), ".".join(map(str, there))


def let_segments_grow() -> None:
    """Have CUDA's memory taken in segments that grow, so that batches of several sizes leave no holes in it.

    On Linux, where torch has that; before the GPU is first used. What the user has set of the allocator stays.
    """
    if sys.platform == "linux" and torch.version.cuda and not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def limit_to_gpu() -> None:
    """On Windows, keep what this process takes within the GPU's own memory.

    There the driver would go on in main memory, at a small part of the speed and without a word; so memory that runs
    out is an error, which names what would save some.
    """
    if sys.platform == "win32" and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(WHOLE)


def best_device() -> torch.device:
    """Where networks compute unless somebody says otherwise: the GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two names mean one device: a process has one GPU, which "cuda" and "cuda:0" both name."""
    return one.type == other.type and (None in (one.index, other.index) or one.index == other.index)


def peak_memory() -> float | None:
    """The most memory in use so far, in GiB: on the GPU, else by this process. None where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    with suppress(ImportError):  # not on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    return None


def lost_gpu(error: BaseException) -> bool:
    """Whether an error says that a GPU has failed or is gone; this process can use it no more."""
    failed = isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
    return isinstance(error, RuntimeError) and failed and not out_of_memory(error)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short, on a GPU or in main memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("out of memory", "allocate memory", "ALLOC_FAILED")  # CUDA's, a CPU's, cuBLAS'
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
