"""The presets: one table, each row with where its numbers come from and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """values: what it sets. source: where the numbers come from. cost: what a run takes, and how that is known."""

    values: dict[str, Any]
    source: str
    cost: str = field(default="not measured yet")


def _sd15(phases: int) -> Preset:
    return Preset(
        {
            "name": f"pcm-sd15-{phases}step",
            "base": {"path": "stable-diffusion-v1-5/stable-diffusion-v1-5", "dtype": "bf16"},
            "data": {"resolution": 512, "count": 1000},
            "lora": {"rank": 64, "alpha": 8.0},
            "objective": {"name": "pcm", "points": 40, "phases": phases, "guidance": [5.0, 6.0]},
            "train": {"steps": 5000, "batch_size": 20, "lr": 5e-6, "gradient_checkpointing": True},
        },
        source="The published SD1.5 launch script: rank 64, alpha 8, lr 5e-6, batch 20, 5000 steps, CFG 5 to 6. "
        "Its 50 solver points are 40 here, so that trained edges and sampled levels agree.",
        cost="100 000 samples; not measured on a GPU yet",
    )


PRESETS: dict[str, Preset] = {
    "sd15-2step": _sd15(2),
    "sd15-4step": _sd15(4),
    "sd15-8step": _sd15(8),
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
