"""The presets: one table, each row with where its numbers come from and what it costs.

Their names are there without torch, whose import takes a second: `pcm --help` and the shell's completion ask for them.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One preset.

    layers: settings by section, each over those before. source: where the numbers come from. cost: what a run takes,
    and how that is known. needs: settings that it is nothing without, and that only the user knows.
    """

    layers: tuple[dict[str, Any], ...]
    source: str
    cost: str
    needs: tuple[str, ...] = ()

    @cached_property
    def values(self) -> dict[str, Any]:
        """What it sets; another objective keeps what it knows of the settings before it."""
        from ..objectives import known_to  # imports torch

        first, *others = self.layers
        values = deepcopy(first)
        for layer in others:
            for section, new in layer.items():
                before = values.get(section, {})
                values[section] = (known_to(new["name"], before) if "name" in new else before) | new
        return values


# family -> the settings that its presets share: the published launch scripts' numbers, for one GPU.
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
        "validation": {"every": 1000},  # an update is of few samples
    },
}
SOURCES = {
    "sd15": "Published SD1.5 launch script, one GPU's batch; its 50 solver points are 40 here, so that trained edges "
    "and sampled levels agree.",
    "sdxl": "Published SDXL launch script (which is adversarial only), one GPU's batch of 10 as 5 times 2.",
    "sd3": "Published SD3 launch scripts, one GPU's batch; CFG 4 is what their code really uses; our LoRA also adapts "
    "the context stream's q, k, v. 8 phases are on 200 points: 100 do not divide by 8.",
}
STEPS = (1, 2, 4, 8)  # phases of the PCM presets, which are also the steps to sample with
# (family, phases) -> points, where the family's own do not divide into phases of one length: no other program samples
# at such edges
POINTS = {("sd3", 8): 200}
# Settings by which a kind of preset differs from its family's, and a sentence on them for `Preset.source`.
ADVERSARIAL = {"adversarial": {"weight": 0.1, "lr": 1e-4}}
# ComfyUI's empty negative prompt is the encoding of "", so a dropped prompt must be that too.
NORMALCFG = {"objective": {"guidance_mode": "normalcfg"}, "base": {"null": "empty"}}
REFINE = {"train": {"steps": 1000}, "validation": {"every": 100}}
NOTES = {
    "adv": " Heads' weight and lr: docs/measurements/demo.md.",
    "normalcfg": " No guidance in the teacher's step, 10 % of the prompts dropped.",
}


# PCM's relatives: objective -> (settings by which its presets differ from their family's, where these come
# from).
LCM_LORA = {"train": {"lr": 1e-4}}  # LCM-LoRA's; alpha = rank, which it has too, is set for all relatives below
RELATIVES: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "lcm": (
        LCM_LORA | {"objective": {"name": "lcm", "points": 50, "guidance": [6.0, 16.0]}},
        "diffusers' LCM-LoRA scripts: lr 1e-4, alpha = rank, skipping step 20, CFG 6 to 16.",
    ),
    "tcd": (
        LCM_LORA | {"objective": {"name": "tcd", "points": 50, "guidance": [3.0, 15.0]}},
        "TCD's README: skipping step 20, CFG 3 to 15; lr and alpha are LCM-LoRA's.",
    ),
    "ctm": (
        LCM_LORA | {"objective": {"name": "ctm", "points": 50}},
        "LCM-LoRA's lr and alpha.",
    ),
    "cd": (LCM_LORA | {"objective": {"name": "cd"}}, "The paper's levels, solver and target; LCM-LoRA's lr and alpha."),
    "dscd": (
        LCM_LORA | {"objective": {"name": "dscd"}},
        "The paper's levels (sCD on latents) and normalisation; LCM-LoRA's lr and alpha.",
    ),
    "progressive": (
        LCM_LORA | {"objective": {"name": "progressive", "phases": 4}},
        "From 32 steps to 4 in three stages; LCM-LoRA's lr and alpha.",
    ),
    "ct": (
        LCM_LORA | {"objective": {"name": "ct"}, "base": {"null": "empty"}},
        "ECT's curriculum on the base; LCM-LoRA's lr and alpha. Wants your pictures in data.images.",
    ),
    "ufogen": (
        LCM_LORA | {"objective": {"name": "ufogen"}, "base": {"null": "empty"}} | ADVERSARIAL,
        "PCM's discriminator, LCM-LoRA's lr and alpha. Wants your pictures, many of them, in data.images.",
    ),
    "lcf": (
        {"objective": {"name": "lcf", "points": 50}, "train": {"lr": 1e-5, "steps": 1000}},
        "The paper's skipping step 20. Wants your pictures in data.images, and a few-step LoRA in lora.init.",
    ),
}


# Distribution matching: objective -> (the setting that says in how many steps, the numbers of them, the rest, where
# the numbers come from).
MATCHING_TRAIN = {"steps": 2000, "warmup": 50, "lr_schedule": "cosine", "weight_decay": 0.0, "ema": 0.98}
MATCHING: dict[str, tuple[str, tuple[int, ...], dict[str, dict[str, Any]], str]] = {
    "dmd": (
        "steps",
        (1, 4),
        {
            "objective": {"name": "dmd", "critic_updates": 4, "critic_warmup": 50},
            "train": MATCHING_TRAIN | {"lr": 5e-5},
        },
        "DMD2's script for an SDXL LoRA: lr 5e-5 of both; its critic's updates and head start are anima_lora's.",
    ),
    "tdm": (
        "phases",
        (2, 4),
        {
            "objective": {"name": "tdm", "critic_updates": 4, "critic_warmup": 50},
            "train": MATCHING_TRAIN | {"lr": 2e-5},
        },
        "TDM's command: lr 2e-5 of both, levels within the phase; the critic's updates and start are anima_lora's.",
    ),
}
# family -> the CFG scale that is matched, and where it comes from
MATCHED_SCALES = {
    "sd15": (1.75, "Scale 1.75 as in DMD2's SD1.5 script."),
    "sdxl": (8.0, "Scale 8 as in DMD2's SDXL scripts."),
    "sd3": (4.5, "Scale 4.5 as in TDM's command, for PixArt; none is published for SD3."),
}


# (relative, family) -> what differs there from `RELATIVES`, and a sentence on it.
ELSEWHERE: dict[tuple[str, str], tuple[dict[str, dict[str, Any]], str]] = {
    ("lcm", "sdxl"): ({"objective": {"guidance": [4.0, 16.0]}}, " The SDXL script's CFG is 4 to 16."),
    **{
        (name, "sd3"): (
            {"objective": {"guidance": [3.0, 8.0]}},
            " None is published for SD3: CFG 3 to 8, by choice.",
        )
        for name in ("lcm", "tcd")
    },
}


def _preset(name: str, lora: str, family: str, note: str, *changes: dict[str, dict[str, Any]]) -> tuple[str, Preset]:
    """A row of the table: the preset's name, and the family's settings with changes by section, the later ones last.

    lora: the name of the LoRA that it makes. note: the preset's `source`.
    """
    memory = {"train": {"gradient_checkpointing": True}}  # so that it fits one GPU
    layers = ({"name": lora, **FAMILIES[family]}, memory, *changes)
    train = {key: value for layer in layers for key, value in layer.get("train", {}).items()}
    samples = train["steps"] * train["batch_size"] * train.get("accumulation", 1)
    return name, Preset(layers, note, f"{samples:,} samples")


def _pcm(family: str, kind: str, *changes: dict[str, dict[str, Any]]) -> tuple[str, Preset]:
    """A row for a family's PCM preset of a kind, such as "4step-adv"."""
    note = SOURCES[family] + NOTES.get(kind.rsplit("-", 1)[-1], "")
    return _preset(f"{family}-{kind}", f"pcm-{family}-{kind}", family, note, *changes)


def _presets_of(family: str) -> dict[str, Preset]:
    """All presets of a family by name: PCM's by phases and kind, then the relatives'."""
    rows = []
    for steps in STEPS:
        points = {"points": POINTS[family, steps]} if (family, steps) in POINTS else {}
        phases = {"objective": {"phases": steps} | points}
        rows += [_pcm(family, f"{steps}step", phases), _pcm(family, f"{steps}step-adv", phases, ADVERSARIAL)]
        if steps >= 4:  # without guidance in the teacher the phases must be fine (arXiv 2405.18407, Sec. 3.2)
            rows.append(_pcm(family, f"{steps}step-normalcfg", phases, NORMALCFG))

    stochastic = {"objective": {"phases": 1, "mode": "stochastic"}}
    rows += [_pcm(family, "stochastic", stochastic), _pcm(family, "stochastic-adv", stochastic, ADVERSARIAL)]

    note = SOURCES[family] + " 1000 updates from a LoRA that is there: docs/measurements/refine.md."
    name, refine = _preset(f"refine-{family}", f"refined-{family}", family, note, {"objective": {"phases": 4}}, REFINE)
    rows.append((name, replace(refine, needs=("lora.init",))))

    alpha = {"lora": {"alpha": float(FAMILIES[family]["lora"]["rank"])}}
    for name, (changes, note) in RELATIVES.items():
        elsewhere, sentence = ELSEWHERE.get((name, family), ({}, ""))
        lora = f"{name}-{family}"
        rows.append(_preset(lora, lora, family, note + sentence, alpha, changes, elsewhere))

    scale, sentence = MATCHED_SCALES[family]
    for name, (key, counts, changes, note) in MATCHING.items():
        for steps in counts:
            preset, settings = f"{family}-{steps}step-{name}", {"objective": {"name": name, key: steps, "scale": scale}}
            rows.append(
                _preset(preset, f"{name}-{family}-{steps}step", family, f"{note} {sentence}", alpha, changes, settings)
            )
    return dict(rows)


# Settings of `make demo`.
DEMO: dict[str, Any] = {
    "base": {"path": "tiny-emoji", "dtype": "fp32"},
    "data": {"resolution": 128, "count": 512, "teacher_steps": 10, "teacher_guidance": 4.0, "batch_size": 64},
    "lora": {"rank": 32, "alpha": 32.0},
    "objective": {"name": "pcm", "points": 20, "phases": 4, "guidance": [4.0, 4.0]},
    "train": {
        "steps": 400,
        "batch_size": 32,
        "lr": 2e-3,
        "lr_schedule": "cosine",
        "warmup": 20,
        "weight_decay": 0.0,
        "ema": 0.98,
        "save_every": 200,
    },
    "preview": {"every": 200},
    "validation": {"count": 0, "every": 100},  # its figures, and what is shown of it, are of all samples
}

PRESETS: dict[str, Preset] = {
    **_presets_of("sd15"),
    **_presets_of("sdxl"),
    **_presets_of("sd3"),
    "demo": Preset(
        ({"name": "lora", "output": "out/demo/run", **DEMO},),
        source="Tuned on the bundled emoji base (docs/measurements/demo.md).",
        cost="7.5 minutes on 2 CPU cores, 9.5 with the report",
    ),
    "demo-1step": Preset(
        ({"name": "demo-1step", "output": "out/demo-1step", **DEMO}, {"objective": {"phases": 1, "points": 8}}),
        source="As demo, with one phase on the coarse grid of the family's study (docs/measurements/family.md).",
        cost="about as long as demo",
    ),
    "demo-2step": Preset(
        ({"name": "demo-2step", "output": "out/demo-2step", **DEMO}, {"objective": {"phases": 2, "points": 8}}),
        source="As demo, with two phases on the coarse grid of the family's study (docs/measurements/family.md).",
        cost="about as long as demo",
    ),
    "demo-sd15": Preset(
        (
            {"name": "demo-sd15", "output": "out/demo-sd15", **DEMO},
            {"base": {"path": "tiny-sd15"}, "train": {"steps": 600}, "preview": {"every": 300}},
        ),
        source="Tuned on the bundled base of SD1.5's type (docs/measurements/demo.md).",
        cost="6 minutes on 2 CPU cores",
    ),
    "tdm-demo": Preset(
        (
            {"name": "tdm-demo", "output": "out/tdm-demo/run", **DEMO},
            {
                "objective": {"name": "tdm", "phases": 4, "scale": 2.0},
                "train": {"steps": 300, "batch_size": 8, "lr": 1e-3, "save_every": 100},
                "preview": {"every": 100},
            },
        ),
        source="A trial's settings on a base like it, not tuned on this one.",
        cost="as many evaluations as the demo's and a third more",
    ),
    "lcf-demo": Preset(
        (
            {
                "name": "lcf-demo",
                "output": "out/lcf",
                "base": {"path": "tiny-emoji", "dtype": "fp32"},
                "data": {"images": "out/style", "resolution": 128},
                "lora": {"rank": 32, "alpha": 32.0, "init": "out/demo/lora.safetensors"},
                "objective": {"name": "lcf", "points": 20, "phases": 4},
                "train": {
                    "steps": 60,
                    "batch_size": 20,
                    "lr": 3e-4,
                    "weight_decay": 0.0,
                    "ema": 0.8,
                    "save_every": 100,
                },
                "preview": {"every": 0},
            },
        ),
        source="The demo's LoRA and ten pictures of the emoji base's own (docs/measurements/family.md).",
        cost="1 minute of CPU time with one thread",
    ),
    "digits": Preset(
        (
            {
                "name": "digits",
                "base": {"path": "digits", "dtype": "fp32"},
                "data": {"images": "digits", "resolution": 16, "count": 6000, "batch_size": 256},
                "objective": {"name": "ct", "curriculum": "ict", "s0": 10, "s1": 80},
                "train": {
                    "steps": 1600,
                    "batch_size": 64,
                    "lr": 2e-3,
                    "lr_schedule": "cosine",
                    "warmup": 50,
                    "weight_decay": 0.0,
                    "ema": 0.99,
                    "save_every": 400,
                },
                "preview": {"every": 400, "steps": [1, 2, 4], "prompts": list("0123456789")},
                "validation": {"count": 0},
            },
        ),
        source="Tuned in short runs (docs/measurements/isolation.md).",
        cost="8.5 minutes of CPU time with one thread",
    ),
}


def preset_names() -> str:
    """The names of all presets, in a few words."""
    first, *families = FAMILIES
    kinds = [f"-{name.removeprefix(f'{first}-')}" for name in PRESETS if name.startswith(f"{first}-")]
    of_families = {name for family in FAMILIES for name in _presets_of(family)}
    alone = [name for name in PRESETS if name not in of_families]
    others = "-, ".join([*RELATIVES, "refine"])
    return (
        f"{first}, {' or '.join(families)}, then one of {', '.join(kinds)}; {others}- and a family; or "
        f"{', '.join(alone)}"
    )
