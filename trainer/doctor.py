"""What this machine can do: versions, device, optional parts, disk."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .memory import MARGIN, PEAKS, advice

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


def examine() -> dict[str, Any]:
    """Facts about this machine as JSON-ready values; touches no network."""
    cuda = torch.cuda.is_available()
    device = {"name": platform.processor() or platform.machine(), "kind": "cpu", "threads": torch.get_num_threads()}
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        device = {
            "name": properties.name,
            "kind": "cuda",
            "count": torch.cuda.device_count(),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "bf16": torch.cuda.is_bf16_supported(),
        }
    host = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("phased-consistency", *REQUIRED)},
        "optional": {name: _version(name) for name in OPTIONAL},
        "device": device,
        "free_disk_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "hub": "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else "on",
        "comfyui": str(host) if (host / "main.py").is_file() else None,
        "missing": [name for name in REQUIRED if _version(name) is None],
    }


def report(d: dict[str, Any]) -> str:
    """`examine` for people."""
    device = ", ".join(f"{k} {v}" for k, v in d["device"].items())
    host = d["comfyui"] or "not found (COMFYUI_PATH, ~/comfy/ComfyUI)"
    lines = [
        f"python {d['python']}; " + ", ".join(f"{k} {v or 'MISSING'}" for k, v in d["packages"].items()),
        f"device: {device}",
        f"disk: {d['free_disk_gib']} GiB free here; hub: {d['hub']}; ComfyUI: {host}",
        *(f"optional {k}: {v or 'not installed'} ({OPTIONAL[k]})" for k, v in d["optional"].items()),
    ]
    if d["missing"]:
        lines.append(f'missing: {", ".join(d["missing"])}. Run: pip install "phased-consistency[train]"')
    if d["device"]["kind"] == "cpu":
        lines.append(
            f"No CUDA device: {', '.join(_bundled())} and make demo run here; a full-size base would take days."
        )
    if "run" in d:
        lines += ["", d["run"]["text"], _verdict(d)]
    return "\n".join(lines)


def _bundled() -> list[str]:
    """The tiny bases that ship with the pack, as base.path names them."""
    folders = (Path(__file__).parent / "tiny").glob("*/model_index.json")
    return sorted(f"tiny-{file.parent.name}" for file in folders)


def _verdict(d: dict[str, Any]) -> str:
    run = d["run"]
    need = max(gib for name, gib in run["memory_gib"].items() if name.startswith(PEAKS))
    if d["device"]["kind"] != "cuda":
        return f"This run needs at least {need:.1f} GiB of memory."
    have = d["device"]["memory_gib"]
    compared = f"This run needs at least {need:.1f} GiB; the device has {have:.1f} GiB, so it"
    if need * MARGIN < have:
        return f"{compared} fits."
    return f"{compared} will not fit: {advice([*run['would_save_gib'].items()])}."


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
