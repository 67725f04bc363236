"""`pcm doctor`: what this machine can do, versions, device, optional parts, disk, and whether a run fits it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from . import INSTALL
from .options import Json, Settings, answer, configured, preset_option


def doctor(
    settings: Settings = None,
    preset: Annotated[str, preset_option("Also say what this preset would need.")] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine can do, what is missing, and what a given config will need."""
    from ..system.machine import examine

    config = configured(settings, preset) if settings or preset else None
    details = examine()
    if details["device"]["kind"] == "cuda":
        from ..training.settle import fitting_shapes

        details["shapes"] = fitting_shapes()
    if config:
        from ..training.plan import plan

        details["run"] = plan(config)
    answer(details, as_json, examination_text(details))


def examination_text(d: dict[str, Any]) -> str:
    """`examine` of this machine for people, and of `d["run"]`, a plan, whether it fits."""
    from ..system.machine import NO_BF16, OPTIONAL

    device = ", ".join(f"{k} {v}" for k, v in d["device"].items())
    host = d["comfyui"] or "not found (COMFYUI_PATH, ~/comfy/ComfyUI)"
    lines = [
        f"python {d['python']}; " + ", ".join(f"{k} {v or 'MISSING'}" for k, v in d["packages"].items()),
        f"device: {device}",
        f"disk: {d['free_disk_gib']} GiB free here; hub: {d['hub']}; ComfyUI: {host}",
        *(f"optional {k}: {v or 'not installed'} ({OPTIONAL[k]})" for k, v in d["optional"].items()),
    ]
    if d["missing"]:
        lines.append(f"missing: {', '.join(d['missing'])}. Run: {INSTALL}")
    if d["device"]["kind"] == "cpu":
        lines.append(
            f"No CUDA device: {', '.join(_bundled())} and make demo run here; a full-size base would take days."
        )
    if d["device"].get("bf16") is False:
        lines.append(NO_BF16)
    lines += shapes_text(d["shapes"]) if "shapes" in d else []
    if "run" in d:
        lines += ["", d["run"]["text"], _verdict(d)]
    return "\n".join(lines)


def shapes_text(shapes: dict[str, dict[str, Any]]) -> list[str]:
    """What of `fitting_shapes` fits the GPU, for people."""
    lines = ["What fits this GPU's free memory, by estimate (batch x accumulation; train.batch_size=auto takes it):"]
    for preset, shape in shapes.items():
        passes = [shape["batch_size"], shape["accumulation"]]
        if shape["fits"]:
            words = f"{passes[0]} x {passes[1]} in {shape['gib']:.1f} GiB"
        else:
            words = f"not one sample a pass, {shape['gib']:.1f} GiB: {shape['advice']}"
        if passes != shape["preset"]:
            words += f" (the preset has {shape['preset'][0]} x {shape['preset'][1]})"
        lines.append(f"  {preset}: {words}")
    return lines


def _bundled() -> list[str]:
    """The tiny bases that ship with the pack, as base.path names them."""
    folders = (Path(__file__).parents[1] / "tiny").glob("*/model_index.json")
    return sorted(f"tiny-{file.parent.name}" for file in folders)


def _verdict(d: dict[str, Any]) -> str:
    from ..efficiency.memory import MARGIN, PEAKS, advice

    run = d["run"]
    need = max(gib for name, gib in run["memory_gib"].items() if name.startswith(PEAKS))
    if d["device"]["kind"] != "cuda":
        return f"This run needs at least {need:.1f} GiB of memory."
    have = d["device"]["memory_gib"]
    compared = f"This run needs at least {need:.1f} GiB; the device has {have:.1f} GiB, so it"
    if need * MARGIN < have:
        return f"{compared} fits."
    return f"{compared} will not fit: {advice([*run['would_save_gib'].items()])}."
