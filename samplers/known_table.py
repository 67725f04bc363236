"""The table of published few-step files: names by which they are known, and how their authors sample them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .recipe import DISTILLED_POINTS, NORMALCFG, Recipe

HUB = "https://huggingface.co/"
PCM_WEIGHTS, HYPER_SD = f"{HUB}wangfuyun/PCM_Weights", f"{HUB}ByteDance/Hyper-SD"
FAMILY_SETTINGS = {"sd3": {"prediction": "flow", "shift": 3.0}}
# Words that make no other LoRA of one: its kind, base, version, rank, steps and precision.
PLAIN = (
    r"(?:loras?|weights|s?sd(?:xl|v?\d+b?)?|xl|1b|base|converted|half|rank|(?:v|r|rank|dim|fp|bf)?\d+|"
    r"\d*(?:dim|steps?))"
)
# Words of the methods' own files. A name of these and PLAIN ones alone is no style's that was made with one.
OWN = (
    r"(?:p[cd]m|(?:small|normal)?cfg|lcmlike|deterministic|stochastic|shift\d|lcm(?:lora)?|tcd|lightning|dmd2?|turbo|"
    r"(?:hyper|flash)(?:sd(?:xl|\d+)?)?|flux\d?|dev|alpha|tdd|adv|qwen|image|edit|distill(?:ed)?|comfyui|(?:fast)?wan\d*|[ti]2v|"
    r"a?\d+b|high|low|noise|lightx2v|seko|ltx|tdm|z|fun|anima|krea\d?|hidream|i1|fast|wo)"
)

# Timesteps 999 749 499 249 (diffusers' trailing spacing, the host's `simple`), 999 759 499 259 (LCM, TCD).
TRAILING = {"points": 1000, "sampling_points": 1000, "sampling_from_noise": True}
DISTILLED = {"points": DISTILLED_POINTS, "sampling_points": DISTILLED_POINTS, "sampling_from_noise": True}
STOCHASTIC = {"mode": "stochastic", "phases": 1}
HYPER_CFG = dict.fromkeys((8, 12), (5.0, 5.0, 8.0))
HYPER_SD3_CFG = {4: (3.0, 2.0, 4.0), 8: (5.0, 4.0, 6.0), 16: (7.0, 6.0, 8.0)}


def only(method: str) -> str:
    """Pattern of a name that says nothing but this method and `PLAIN` words.

    A style's LoRA may have the method in its name too, but has words of its own beside it.
    """
    return rf"^(?:{PLAIN} )*{method}(?: {PLAIN})*$"


@dataclass(frozen=True)
class KnownFiles:
    """Published files of one kind.

    words: pattern that the words of a file's name match, in lower case with one space between; its groups
        "steps" (the phases, too), "shift" and "expert" are read.
    families: the model families that there are such files for.
    address: where the files are published, with their authors' settings.
    objective, settings: fields of `Recipe`.
    guidance: steps -> CFG (best, low, high), for files that keep CFG and negative prompts.
    is_checkpoint: whether they are whole models alone, after which LoRAs for them are called, too.
    """

    words: str
    address: str
    families: tuple[str, ...]
    objective: str
    settings: Mapping[str, Any]
    guidance: Mapping[int, tuple[float, float, float]] = field(default_factory=dict)
    is_checkpoint: bool = False

    def recipe(self, family: str, match: re.Match) -> Recipe:
        """The recipe of the file whose name `words` has matched."""
        values = {"family": family, "objective": self.objective} | FAMILY_SETTINGS.get(family, {}) | dict(self.settings)
        groups = match.groupdict()
        if "steps" in groups:
            values["phases"] = int(groups["steps"])
        if "shift" in groups:
            values["shift"] = float(groups["shift"])
        if "expert" in groups:
            values["expert"] = groups["expert"]
        if self.guidance:
            best, low, high = self.guidance[values["phases"]]
            values |= {"guidance": best, "guidance_min": low, "guidance_max": high}
            values |= {"guidance_mode": "normalcfg", "negative_prompts": True}
        return Recipe(**values, source="known file")


# Names and settings as checked in 2026-11 in copies of the authors' pages and scripts, except those marked
# (*), which are as others quote them. No file was opened.
# - wangfuyun/PCM_Weights. Its training edges (50 points for SD1.5, 40 for SDXL, 100 for SD3) are not always
#   the levels that its authors sample at.
# - latent-consistency/lcm-lora-sdv1-5, -sdxl, -ssd-1b, and h1t/TCD-SD15-, -SD21-base-, -SDXL-LoRA. All of
#   these are called pytorch_lora_weights there and are renamed by everyone. CFG up to 2 (*).
# - ByteDance/Hyper-SD: one file for each number of steps, by DDIM with trailing spacing; the 1-step file by
#   TCD at eta 1, for up to 8 steps; CFG 5 to 8 for SD1.5's and SDXL's "CFG" files. SD3's: strength 0.125, CFG
#   3, 5 and 7 (*), the ranges are ours. Left to itself, diffusers' SD3 scheduler starts the last step at
#   sigma 0.009; these are even.
# - ByteDance/SDXL-Lightning: Euler, trailing (*); its 1-step files are no LoRAs.
# - tianweiy/DMD2: LCM's sampler at timesteps 999, 749, 499, 249; less strength where a merged model wants it.
# - jasperai/flash-sd, -sdxl, -sd3: trained around four even levels. Their example asks diffusers' LCM for
#   trailing spacing, which it does not heed; SD3's levels are even as Hyper-SD's.
# - LoRAs taken out of stabilityai/sdxl-turbo, shiroppo/sd_xl_turbo_lora above all: LCM's sampler at even
#   levels, CFG 1 to 2.5. The model's authors take Euler ancestral, trailing, with 1 to 4 steps: between 4
#   steps 0.90 to 0.96 of its noise is fresh, here all of it. SD-Turbo has no such file that people agree on.
# - RED-AIGC/TDD, README and app.py: SDXL's in 4 to 8 steps, CFG 1.7 (1 to 4), eta 0.2, which is gamma. Its scheduler
#   takes some steps by DPM-Solver++ of order 2; these are of order 1.
UNET_FILES = (
    KnownFiles(
        r"\bpcm .*smallcfg (?P<steps>2|4|8|16)steps?\b", PCM_WEIGHTS, ("sd15",), "pcm", TRAILING | {"points": 50}
    ),
    KnownFiles(
        r"\bpcm .*smallcfg (?P<steps>2|4|8|16)steps?\b", PCM_WEIGHTS, ("sdxl",), "pcm", TRAILING | {"points": 40}
    ),
    KnownFiles(
        r"\bpcm .*normalcfg (?P<steps>4|8|16)steps?\b",
        PCM_WEIGHTS,
        ("sd15",),
        "pcm",
        TRAILING | {"points": 50},
        NORMALCFG,
    ),
    KnownFiles(
        r"\bpcm .*normalcfg (?P<steps>4|8|16)steps?\b",
        PCM_WEIGHTS,
        ("sdxl",),
        "pcm",
        TRAILING | {"points": 40},
        NORMALCFG,
    ),
    KnownFiles(r"\bpcm .*lcmlike\b", PCM_WEIGHTS, ("sd15", "sdxl"), "pcm", DISTILLED | STOCHASTIC),
    KnownFiles(
        r"\bpcm (?:sd3 )?deterministic (?P<steps>2|4)steps? shift(?P<shift>1|3)\b",
        PCM_WEIGHTS,
        ("sd3",),
        "pcm",
        DISTILLED | {"points": 100, "guidance": 1.2},
    ),
    KnownFiles(
        r"\bp[cd]m (?:sd3 )?stochastic shift(?P<shift>3)\b",
        PCM_WEIGHTS,
        ("sd3",),
        "pcm",
        DISTILLED | STOCHASTIC | {"points": 100, "guidance": 1.2},
    ),
    KnownFiles(
        rf"\blcm ?lora|{only('lcm')}",
        f"{HUB}latent-consistency/lcm-lora-sdxl",
        ("sd15", "sdxl"),
        "lcm",
        DISTILLED | STOCHASTIC,
    ),
    KnownFiles(
        rf"\btcd (?:sd\w+ (?:base )?)?lora\b|{only('tcd')}",
        f"{HUB}h1t/TCD-SDXL-LoRA",
        ("sd15", "sd2", "sdxl"),
        "tcd",
        DISTILLED | STOCHASTIC | {"gamma": 0.3},
    ),
    KnownFiles(
        r"^(?!.*\bcfg).*\bhyper ?sd.*\b1 ?steps?\b",
        HYPER_SD,
        ("sd15", "sdxl"),
        "hyper",
        DISTILLED | STOCHASTIC | {"steps": 1},
    ),
    KnownFiles(
        r"^(?!.*\bcfg).*\bhyper ?sd.*\b(?P<steps>2|4|8) ?steps?\b", HYPER_SD, ("sd15", "sdxl"), "hyper", TRAILING
    ),
    KnownFiles(
        r"^(?=.*\bcfg).*\bhyper ?sd.*\b(?P<steps>8|12) ?steps?\b",
        HYPER_SD,
        ("sd15", "sdxl"),
        "hyper",
        TRAILING,
        HYPER_CFG,
    ),
    KnownFiles(
        r"\bhyper ?sd.*\b(?P<steps>4|8|16) ?steps?\b",
        HYPER_SD,
        ("sd3",),
        "hyper",
        TRAILING | {"strength": 0.125},
        HYPER_SD3_CFG,
    ),
    KnownFiles(
        rf"^(?=.*\blightning (?:lora )?\d ?steps?\b|{only('lightning')}).*\b(?P<steps>2|4|8) ?steps?\b",
        f"{HUB}ByteDance/SDXL-Lightning",
        ("sdxl",),
        "lightning",
        TRAILING,
    ),
    KnownFiles(r"\bdmd ?2\b", f"{HUB}tianweiy/DMD2", ("sdxl",), "dmd2", TRAILING | STOCHASTIC),
    KnownFiles(r"\bflash ?sd", f"{HUB}jasperai/flash-sdxl", ("sd15", "sdxl", "sd3"), "flash", TRAILING | STOCHASTIC),
    KnownFiles(
        rf"^(?=.*\bsd ?xl turbo\b)(?:{PLAIN} )*turbo(?: {PLAIN})*$",
        f"{HUB}shiroppo/sd_xl_turbo_lora",
        ("sdxl",),
        "turbo",
        TRAILING | STOCHASTIC | {"guidance_max": 2.5},
    ),
    KnownFiles(
        r"\bsd ?xl tdd\b|\btdd (?:sd ?xl )?lora\b",
        "https://github.com/RedAIGC/Target-Driven-Distillation",
        ("sdxl",),
        "tdd",
        TRAILING | STOCHASTIC | {"gamma": 0.2, "guidance": 1.7, "guidance_max": 4.0},
    ),
)
