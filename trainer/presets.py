"""The presets: one table, each row with where its numbers come from and what it costs."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """values: what it sets. source: where the numbers come from. cost: what a run takes, and how that is known."""

    values: dict[str, Any]
    source: str
    cost: str = field(default="not measured yet")


# What a family's presets share: the published launch scripts' numbers, for one GPU.
FAMILIES: dict[str, dict[str, Any]] = {
    "sd15": {
        "base": {"family": "sd15", "path": "stable-diffusion-v1-5/stable-diffusion-v1-5", "dtype": "bf16"},
        "data": {"resolution": 512, "count": 1000},
        "lora": {"rank": 64, "alpha": 8.0},
        "objective": {"points": 40, "guidance": [5.0, 6.0]},
        "train": {"steps": 5000, "batch_size": 20, "lr": 5e-6, "weight_decay": 1e-3},
    },
    "sdxl": {
        "base": {"family": "sdxl", "path": "stabilityai/stable-diffusion-xl-base-1.0", "dtype": "bf16"},
        "data": {"resolution": 1024, "count": 1000, "teacher_guidance": 7.0, "batch_size": 2},
        "lora": {"rank": 64, "alpha": 8.0},
        "objective": {"points": 40, "guidance": [7.0, 8.0]},
        "train": {"steps": 10_000, "batch_size": 2, "accumulation": 5, "lr": 2e-6, "weight_decay": 0.0},
    },
    "sd3": {
        "base": {"family": "sd3", "path": "stabilityai/stable-diffusion-3-medium-diffusers", "dtype": "bf16"},
        "data": {"resolution": 1024, "count": 1000, "teacher_steps": 28, "teacher_guidance": 5.0, "batch_size": 2},
        "lora": {"rank": 32, "alpha": 8.0},
        "objective": {"points": 100, "guidance": [4.0, 4.0]},
        "train": {"steps": 10_000, "batch_size": 2, "lr": 5e-6, "weight_decay": 1e-3},
    },
}
SOURCES = {
    "sd15": "Published SD1.5 launch script, one GPU's batch; its 50 solver points are 40 here, so that trained edges "
    "and sampled levels agree.",
    "sdxl": "Published SDXL launch script (which is adversarial only), one GPU's batch of 10 as 5 times 2.",
    "sd3": "Published SD3 launch scripts, one GPU's batch; CFG 4 is what their code really uses; our LoRA also adapts "
    "the context stream's q, k, v.",
}
STEPS = (1, 2, 4, 8)
# What each kind of preset changes, by section, and what it says of that.
ADVERSARIAL = {"adversarial": {"weight": 0.1, "lr": 1e-4}}
# ComfyUI's empty negative prompt is the encoding of "", so a dropped prompt must be that too.
NORMALCFG = {"objective": {"guidance_mode": "normalcfg"}, "base": {"null": "empty"}}
NOTES = {
    "adv": " Heads' weight and lr: BENCHMARKS.md.",
    "normalcfg": " No guidance in the teacher's step, 10 % of the prompts dropped.",
}


def _preset(family: str, kind: str, *changes: dict[str, dict[str, Any]]) -> tuple[str, Preset]:
    """A family's preset of a kind ("4step-adv"), with changes by section."""
    values = {"name": f"pcm-{family}-{kind}", **deepcopy(FAMILIES[family])}
    for change in ({"train": {"gradient_checkpointing": True}}, *changes):
        for section, new in change.items():
            values[section] = values.get(section, {}) | new
    train = values["train"]
    seen = train["steps"] * train["batch_size"] * train.get("accumulation", 1)
    note = NOTES.get(kind.rsplit("-", 1)[-1], "")
    return f"{family}-{kind}", Preset(values, SOURCES[family] + note, f"{seen:,} samples; not measured on a GPU yet")


def _presets_of(family: str) -> dict[str, Preset]:
    rows = []
    for steps in STEPS:
        phases = {"objective": {"phases": steps}}
        rows += [_preset(family, f"{steps}step", phases), _preset(family, f"{steps}step-adv", phases, ADVERSARIAL)]
        if steps >= 4:  # without guidance in the teacher the phases must be fine (arXiv 2405.18407, Sec. 3.2)
            rows.append(_preset(family, f"{steps}step-normalcfg", phases, NORMALCFG))
    stochastic = {"objective": {"phases": 1, "mode": "stochastic"}}
    rows += [_preset(family, "stochastic", stochastic), _preset(family, "stochastic-adv", stochastic, ADVERSARIAL)]
    return dict(rows)


PRESETS: dict[str, Preset] = {
    **_presets_of("sd15"),
    **_presets_of("sdxl"),
    **_presets_of("sd3"),
    "demo": Preset(
        {
            "name": "lora",
            "output": "out/demo/run",
            "base": {"path": "tiny-sd15", "dtype": "fp32"},
            "data": {"resolution": 128, "count": 512, "teacher_steps": 10, "teacher_guidance": 4.0, "batch_size": 64},
            "lora": {"rank": 32, "alpha": 32.0},
            "objective": {"name": "pcm", "points": 20, "phases": 4, "guidance": [4.0, 4.0]},
            "train": {
                "steps": 600,
                "batch_size": 32,
                "lr": 2e-3,
                "lr_schedule": "cosine",
                "warmup": 20,
                "weight_decay": 0.0,
                "ema": 0.98,
                "save_every": 200,
            },
            "preview": {"every": 300},
        },
        source="Tuned on the bundled tiny base; the trials are in BENCHMARKS.md.",
        cost="6 minutes on 2 CPU cores, 8 with the report (BENCHMARKS.md)",
    ),
}
