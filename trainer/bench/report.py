"""The result of `pcm bench` as text, and the machine it was measured on."""

from __future__ import annotations

import re
from typing import Any

import torch

from ..system.machine import examine
from .measure import PASSES

# Dense bf16 and fp16 operations per second with fp32 sums, by the device's whole name (NVIDIA's data sheets).
PEAKS = {
    r"NVIDIA A100.*": 312e12,
    r"NVIDIA H100 80GB HBM3|NVIDIA H200": 989e12,
    r"NVIDIA GeForce RTX 4090": 165e12,
    r"NVIDIA GeForce RTX 3090": 71e12,
}
PARTS = ("data", "trajectory", "critic", "teacher", "student", "target", "discriminator")
PARTS += ("backward", "optimizer", "other")
MIB = 2**20


def machine() -> dict[str, Any]:
    """The device and the torch that figures were measured with."""
    return examine()["device"] | {"torch": torch.__version__}


def peak_flops(device: torch.device) -> float | None:
    """Operations per second that the device can do in bf16, or None for a CPU and for one that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, name)), None)


def bench_text(details: dict[str, Any]) -> str:
    """The result of `bench` as text for people."""
    lines = [_line(details["settings"]), _line(details["machine"])]
    for kind in ("plain", "adversarial"):
        if kind in details:
            lines += ["", *_table(kind, details[kind])]
    return "\n".join(lines)


def _line(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())


def _table(kind: str, result: dict[str, Any]) -> list[str]:
    """The lines on one kind of updates: a column for each loop, and their ratio where there are two."""
    loops = [result[name] for name in ("ours", "reference") if name in result]
    ratios = result.get("ratios")

    def row(title: str, numbers: list[float], form: str, ratio: float | None = None) -> str:
        cells = "".join(f"{number:>12{form}}" for number in numbers)
        return f"{title:34}{cells}" + (f"{ratio:>10.2f}" if ratio is not None else "")

    values = lambda name: [loop[name] for loop in loops]  # noqa: E731
    ratio = lambda name: ratios and ratios[name]  # noqa: E731
    head = f"{kind:34}{'ours':>12}" + (f"{'reference':>12}{'ratio':>10}" if ratios else "")
    lines = [
        head,
        row("student updates/s", values("updates_per_second"), ".3f", ratio("updates_per_second")),
        row("samples/s", values("samples_per_second"), ".2f"),
        row("GFLOP an update", [v / 1e9 for v in values("flops_per_update")], ".1f", ratio("flops")),
        row("peak of tensors, MiB", [v / MIB for v in values("peak_bytes")], ".1f", ratio("peak_bytes")),
    ]
    if loops[0]["utilisation"] is not None:
        lines.append(row("of the device's FLOP/s", values("utilisation"), ".1%"))
    if loops[0]["host_seconds"] is not None:
        lines.append(row("host busy, ms an update", [1000 * v for v in values("host_seconds")], ".1f"))
    lines.append("passes for a sample of an update")
    lines += [row(f"  {name}", [passes[name] for passes in values("passes_per_sample")], ".2f") for name in PASSES]
    lines.append("ms an update")
    times = values("milliseconds")
    lines += [
        row(f"  {name}", [t.get(name, 0.0) for t in times], ".1f") for name in PARTS if any(name in t for t in times)
    ]
    ours = times[0]
    shares = ", ".join(f"{name} {ours[name] / sum(ours.values()):.0%}" for name in PARTS if name in ours)
    lines.append(f"our time: {shares}")
    if ratios:
        lines.append(f"speed ratio in the rounds: {ratios['least']:.2f} to {ratios['greatest']:.2f}")
    return lines
