"""`pcm bench --count`: what one update asks of a GPU, counted on a machine that need not have one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..config.config import Config
from ..config.write import config_text
from ..efficiency.memory import CONTEXT, TRAINING, check_network_settings, estimate_memory
from ..families import Base, look_at_base
from ..system.files import write_text
from ..system.machine import GIB
from ..training.settle import settle
from .emulated import GUARD
from .report import PARTS

REFUSED = {
    "compile": "what torch.compile makes of an update can be told only where it runs: set train.compile=false",
    "shard": "it counts one process: set train.shard=false",
}


def count(*configs: Config) -> list[dict[str, Any]]:
    """For each configuration one pass of an update with its networks at full size, and the optimizer's step, on a CUDA
    device that is not there. All are counted in one process, since to start it takes as long as a small update.

    A result is JSON-ready: "parts" by name and "total", each with launches, flop, bytes moved, peak bytes, copies
    between host and GPU with their bytes, and waits of the host; "operations", those that move the most bytes;
    "places", the lines that copy or wait; "resident", bytes before the update; "passes" that an update has; "estimate",
    the bytes that `estimate_memory` says it takes, with the context that no count sees.

    Raises ValueError for settings, a system or a build of torch that it cannot count on, and what a run refuses of its
    base and resolution; RuntimeError where the counting itself fails.
    """
    settled = [settle(config, torch.device("cpu"))[0] for config in configs]
    families = [_family(config) for config in settled]  # and all that can be refused before anything is compiled
    with TemporaryDirectory(prefix="pcm-count-") as folder:
        guard, files = Path(folder) / "guard.so", [Path(folder) / f"{i}.toml" for i in range(len(settled))]
        _compile(guard)
        for config, file in zip(settled, files, strict=True):
            write_text(file, config_text(config))
        command = [sys.executable, "-m", f"{__package__}.emulated", str(guard), *map(str, files)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip() or "no reason given").splitlines()[-1]
        raise RuntimeError(f"Counting stopped: {reason}. PCM_DEBUG=1 shows where.") from RuntimeError(result.stderr)

    lines = result.stdout.splitlines()[-len(settled) :]
    estimates = [estimate_memory(*pair)["gib"][TRAINING] for pair in zip(settled, families, strict=True)]
    return [
        {"settings": _settings(config), "estimate": int(estimate * GIB), **json.loads(line)}
        for config, estimate, line in zip(settled, estimates, lines, strict=True)
    ]


def _family(config: Config) -> type[Base]:
    """The family of a configuration's base. Raises ValueError for what cannot be counted here, or cannot be run."""
    _check(config)
    family = look_at_base(config.base.path, **config.base.reading()).family
    check_network_settings(config, family)
    return family


def _check(config: Config) -> None:
    """Raise ValueError for what cannot be counted here."""
    for key, reason in REFUSED.items():
        if getattr(config.train, key):
            raise ValueError(f"pcm bench --count: train.{key}=true, but {reason}.")
    if config.train.optimizer != "adamw":
        raise ValueError(
            f"pcm bench --count: train.optimizer={config.train.optimizer} has kernels that only a GPU can run: set "
            "train.optimizer=adamw."
        )
    if not sys.platform.startswith("linux") or torch.version.cuda or torch.version.hip:
        raise ValueError(
            f"pcm bench --count works on Linux with torch's build for CPUs; here is torch {torch.__version__} on "
            f"{sys.platform}. Make an environment of its own with "
            "`pip install torch --index-url https://download.pytorch.org/whl/cpu`."
        )


def find_compiler() -> str | None:
    """The C++ compiler of this machine; None where there is none."""
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def _compile(target: Path) -> None:
    """Compile the emulated device's guard. Raises ValueError where there is no C++ compiler, or one that cannot."""
    compiler = find_compiler()
    if compiler is None:
        raise ValueError("pcm bench --count needs a C++ compiler: apt-get install g++, or name one in CXX.")
    root = Path(torch.__file__).parent
    source = target.with_suffix(".cpp")
    write_text(source, GUARD)
    options = ["-shared", "-fPIC", "-std=c++20", "-w", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
    command = [compiler, *options, str(source), "-o", str(target), "-lc10", "-ltorch_cpu"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"pcm bench --count cannot start the C++ compiler {compiler}: {error.strerror}.") from error
    if result.returncode:
        reason = next((line for line in result.stderr.splitlines() if "error" in line), "no reason given")
        raise ValueError(
            f"pcm bench --count: {compiler} does not compile what it needs ({reason}). It takes C++20: g++ 11 or clang "
            "14 or later; name another in CXX."
        )


def _settings(config: Config) -> dict[str, Any]:
    """The settings that the figures depend on."""
    train = config.train
    return {
        "preset": config.preset,
        "dtype": config.base.dtype,
        "quantize": config.base.quantize,
        "resolution": config.data.resolution,
        "batch_size": train.batch_size,
        "accumulation": train.accumulation,
        "rank": config.lora.rank,
        "adversarial": config.adversarial.weight,
        "gradient_checkpointing": train.gradient_checkpointing,
        "offload": train.offload,
        "torch": torch.__version__,
    }


def count_text(details: dict[str, Any]) -> str:
    """The result of `count` as text for people."""
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in details["settings"].items() if value)
    of_more = f"one of an update's {details['passes']} passes" if details["passes"] > 1 else "one update"
    head = ("", "launches", "TFLOP", "GiB moved", "peak GiB", "copies", "MiB copied", "waits")
    rows = [(name, details["parts"][name]) for name in PARTS if name in details["parts"]]
    lines = [
        settings,
        *(f"note: {note}" for note in details["notes"]),
        f"Counted, not measured: {of_more}, with the optimizer's step.",
        _row(*head),
        *(_figures(name, part) for name, part in [*rows, ("in all", details["total"])]),
        f"{details['resident'] / GIB:.2f} GiB are there before the update. With {CONTEXT / GIB:g} GiB for CUDA's "
        f"context the peak is {(details['total']['peak'] + CONTEXT) / GIB:.2f} GiB; the estimate says "
        f"{details['estimate'] / GIB:.2f}.",
        "What moves the most bytes:",
        *(f"  {o['name']:52}{o['launches']:>10,}{o['moved'] / GIB:>12.1f} GiB" for o in details["operations"][:8]),
    ]
    if details["places"]:
        lines.append("Copies between host and GPU, and waits:")
        lines += [f"  {p['line']:52}{p['times']:>10,} {p['kind']}" for p in details["places"]]
    return "\n".join(lines)


def _figures(name: str, part: dict[str, int]) -> str:
    return _row(
        name,
        f"{part['launches']:,}",
        f"{part['flop'] / 1e12:.2f}",
        f"{part['moved'] / GIB:.1f}",
        f"{part['peak'] / GIB:.2f}",
        f"{part['copies']:,}",
        f"{part['copied'] / 2**20:.1f}",
        f"{part['waits']:,}",
    )


def _row(title: str, *cells: str) -> str:
    return f"{title:14}" + "".join(f"{cell:>12}" for cell in cells)
