"""Few-step LoRAs that carry no recipe, known by their names, and how their authors sample them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from .recipe import DISTILLED_POINTS, FAMILIES, HEADER_KEY, NORMALCFG, Recipe

# Patterns of the family in a file's name. SSD-1B is a small SDXL; PCM's SD3 files tell their shift instead.
FAMILY_MARKS = (
    ("sdxl", r"sd ?xl|ssd ?1b"),
    ("sd3", r"sd ?35?\b|\bp[cd]m .*shift"),
    ("sd2", r"sd ?v?2 ?[01]\b"),
    ("sd15", r"sd ?v?1 ?5\b|\bflash ?sd\b"),
)
FAMILY_SETTINGS = {"sd3": {"prediction": "flow", "shift": 3.0}}
UNNAMED = ("pytorch_lora_weights", "adapter_model")  # as libraries save LoRAs: the folder has the name
LONGEST = 255  # characters of a name, as file systems have it: the patterns' time grows with its square
TITLES = ("ss_output_name", "modelspec.title")  # where kohya's tools put the name that a file was first written under
# Words that make no other LoRA of one: its kind, base, version, rank, steps and precision.
PLAIN = (
    r"(?:loras?|weights|s?sd(?:xl|v?\d+b?)?|xl|1b|base|converted|half|rank|(?:v|r|rank|dim|fp|bf)?\d+|"
    r"\d*(?:dim|steps?))"
)
# Words of the methods' own files. A name of these and PLAIN ones alone is no style's that was made with one.
OWN = (
    r"(?:p[cd]m|(?:small|normal)?cfg|lcmlike|deterministic|stochastic|shift\d|lcm(?:lora)?|tcd|lightning|dmd2?|turbo|"
    r"(?:hyper|flash)(?:sd(?:xl|\d+)?)?)"
)

# A method, as people choose it -> names of its files: the first that `KNOWN_FILES` has for the family and the steps.
METHOD_FILES = {
    "PCM": ("pcm smallcfg {}step", "pcm deterministic {}step shift3"),
    "PCM with CFG": ("pcm normalcfg {}step",),
    "PCM stochastic": ("pcm lcmlike", "pcm stochastic shift3"),
    "LCM": ("lcm lora",),
    "TCD": ("tcd lora",),
    "Hyper-SD": ("hyper sd {}step",),
    "Hyper-SD with CFG": ("hyper sd cfg {}step",),
    "Lightning": ("lightning {}step",),
    "DMD2": ("dmd2",),
    "Flash Diffusion": ("flash sd",),
    "Turbo": ("sdxl turbo",),
}
MOST_STEPS = 16  # that a file of these is made for
# Words that may follow a method's in a checkpoint's name and say how it was saved, not what it draws.
SAVED = r"(?:(?:baked)?vae|baked|merged?|unet|inpaint(?:ing)?|pruned|non?|(?:non?)?ema(?:only)?|only|mini|cfg)"
SHORT = r"(?<![a-z]){}(?=(?:vae)?(?:v?\d|[^a-z]|$))"  # a method's letters, which are parts of other words, too
# A word in common use, as in "hyper realistic" and "flash photography": it tells the method before "sd", and where
# nothing but `PLAIN` and `SAVED` words follows.
COMMON = rf"(?<![a-z]){{}}(?: ?sd(?:xl|v?\d+)?\b|(?:{PLAIN}|{SAVED})?(?: (?:{PLAIN}|{SAVED}))*$)"
# Methods by the words of merged and distilled checkpoints, such as dreamshaperXL_lightningDPMSDE and DreamShaper_8_LCM.
METHOD_WORDS = {
    "Lightning": r"lightning(?! ?(?:bolt|storm|strik))",
    "Turbo": r"turbo",
    "DMD2": r"dmd ?2",
    "LCM": SHORT.format("lcm"),
    "TCD": SHORT.format("tcd"),
    "Hyper-SD": COMMON.format("hyper"),
    "Flash Diffusion": COMMON.format("flash"),
}
HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]{2})")  # between words: HyperVAE, XLHyper
# Methods of which there are models whose recipe is not known here, SD-Turbo and SD3.5 Large Turbo -> their families.
WITHOUT_RECIPE = {"Turbo": ("sd2", "sd3")}

# Timesteps 999 749 499 249 (diffusers' trailing spacing, the host's `simple`), 999 759 499 259 (LCM, TCD).
TRAILING = {"points": 1000, "sampling_points": 1000, "sampling_from_noise": True}
DISTILLED = {"points": DISTILLED_POINTS, "sampling_points": DISTILLED_POINTS, "sampling_from_noise": True}
STOCHASTIC = {"mode": "stochastic", "phases": 1}
HYPER_CFG = dict.fromkeys((8, 12), (5.0, 5.0, 8.0))
HYPER_SD3_CFG = {4: (3.0, 2.0, 4.0), 8: (5.0, 4.0, 6.0), 16: (7.0, 6.0, 8.0)}


def _only(method: str) -> str:
    """Pattern of a name that says nothing but this method and `PLAIN` words.

    A style's LoRA may have the method in its name too, but has words of its own beside it.
    """
    return rf"^(?:{PLAIN} )*{method}(?: {PLAIN})*$"


@dataclass(frozen=True)
class KnownFiles:
    """Published files of one kind.

    words: pattern that the words of a file's name match, in lower case with one space between; its groups
        "steps" (the phases, too) and "shift" are read.
    families: the model families that there are such files for.
    objective, settings: fields of `Recipe`.
    guidance: steps -> CFG (best, low, high), for files that keep CFG and negative prompts.
    """

    words: str
    families: tuple[str, ...]
    objective: str
    settings: Mapping[str, Any]
    guidance: Mapping[int, tuple[float, float, float]] = field(default_factory=dict)

    def recipe(self, family: str, match: re.Match) -> Recipe:
        """The recipe of the file whose name `words` has matched."""
        values = {"family": family, "objective": self.objective} | FAMILY_SETTINGS.get(family, {}) | dict(self.settings)
        groups = match.groupdict()
        if "steps" in groups:
            values["phases"] = int(groups["steps"])
        if "shift" in groups:
            values["shift"] = float(groups["shift"])
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
KNOWN_FILES = (
    KnownFiles(r"\bpcm .*smallcfg (?P<steps>2|4|8|16)steps?\b", ("sd15",), "pcm", TRAILING | {"points": 50}),
    KnownFiles(r"\bpcm .*smallcfg (?P<steps>2|4|8|16)steps?\b", ("sdxl",), "pcm", TRAILING | {"points": 40}),
    KnownFiles(r"\bpcm .*normalcfg (?P<steps>4|8|16)steps?\b", ("sd15",), "pcm", TRAILING | {"points": 50}, NORMALCFG),
    KnownFiles(r"\bpcm .*normalcfg (?P<steps>4|8|16)steps?\b", ("sdxl",), "pcm", TRAILING | {"points": 40}, NORMALCFG),
    KnownFiles(r"\bpcm .*lcmlike\b", ("sd15", "sdxl"), "pcm", DISTILLED | STOCHASTIC),
    KnownFiles(
        r"\bpcm (?:sd3 )?deterministic (?P<steps>2|4)steps? shift(?P<shift>1|3)\b",
        ("sd3",),
        "pcm",
        DISTILLED | {"points": 100, "guidance": 1.2},
    ),
    KnownFiles(
        r"\bp[cd]m (?:sd3 )?stochastic shift(?P<shift>3)\b",
        ("sd3",),
        "pcm",
        DISTILLED | STOCHASTIC | {"points": 100, "guidance": 1.2},
    ),
    KnownFiles(rf"\blcm ?lora|{_only('lcm')}", ("sd15", "sdxl"), "lcm", DISTILLED | STOCHASTIC),
    KnownFiles(
        rf"\btcd (?:sd\w+ (?:base )?)?lora\b|{_only('tcd')}",
        ("sd15", "sd2", "sdxl"),
        "tcd",
        DISTILLED | STOCHASTIC | {"gamma": 0.3},
    ),
    KnownFiles(
        r"^(?!.*\bcfg).*\bhyper ?sd.*\b1 ?steps?\b", ("sd15", "sdxl"), "hyper", DISTILLED | STOCHASTIC | {"steps": 1}
    ),
    KnownFiles(r"^(?!.*\bcfg).*\bhyper ?sd.*\b(?P<steps>2|4|8) ?steps?\b", ("sd15", "sdxl"), "hyper", TRAILING),
    KnownFiles(
        r"^(?=.*\bcfg).*\bhyper ?sd.*\b(?P<steps>8|12) ?steps?\b", ("sd15", "sdxl"), "hyper", TRAILING, HYPER_CFG
    ),
    KnownFiles(
        r"\bhyper ?sd.*\b(?P<steps>4|8|16) ?steps?\b", ("sd3",), "hyper", TRAILING | {"strength": 0.125}, HYPER_SD3_CFG
    ),
    KnownFiles(
        rf"^(?=.*\blightning (?:lora )?\d ?steps?\b|{_only('lightning')}).*\b(?P<steps>2|4|8) ?steps?\b",
        ("sdxl",),
        "lightning",
        TRAILING,
    ),
    KnownFiles(r"\bdmd ?2\b", ("sdxl",), "dmd2", TRAILING | STOCHASTIC),
    KnownFiles(r"\bflash ?sd", ("sd15", "sdxl", "sd3"), "flash", TRAILING | STOCHASTIC),
    KnownFiles(
        rf"^(?=.*\bsd ?xl turbo\b)(?:{PLAIN} )*turbo(?: {PLAIN})*$",
        ("sdxl",),
        "turbo",
        TRAILING | STOCHASTIC | {"guidance_max": 2.5},
    ),
)


def recipe_for_file(
    name: str, metadata: dict[str, str], family: str | None = None, certain: bool = False
) -> Recipe | None:
    """The recipe in a LoRA's header, else that of a known public file of this name or title, else None.

    name: file name or path; a file called as libraries save it goes by its folder, in the Hugging Face cache
        by its repository.
    metadata: the safetensors `__metadata__`; its `TITLES` tell what a renamed file was called.
    family: the family of the file's tensors (`LoraHeader.family`), where known: a name that tells no family
        takes it, and one that tells another is not believed.
    certain: only by a name that has no words of its own, as titles must not have: one such as
        "comic_style_dmd2" may tell what a style's LoRA is for.
    Raises ValueError for an unreadable header.
    """
    if HEADER_KEY in metadata:
        return Recipe.from_header(metadata[HEADER_KEY])
    if recipe := _recipe_for_words(_plain(_name(name)), family, certain):
        return recipe
    recipes = (_recipe_for_words(_plain(metadata.get(key, "")), family, certain=True) for key in TITLES)
    recipe = next(filter(None, recipes), None)
    return recipe and replace(recipe, source="known title")


def _recipe_for_words(words: str, family: str | None, certain: bool) -> Recipe | None:
    """The recipe of the first of `KNOWN_FILES` that a name's words match; family, certain: see `recipe_for_file`."""
    if certain and not re.fullmatch(rf"(?:{PLAIN}|{OWN})(?: (?:{PLAIN}|{OWN}))*", words):
        return None
    named = next((mark for mark, pattern in FAMILY_MARKS if re.search(pattern, words)), None)
    if family and named and family != named:
        return None
    return _recipe_in_table(words, family or named)


def _recipe_in_table(words: str, family: str | None) -> Recipe | None:
    """The recipe of the first of `KNOWN_FILES` that there is for this family and that these words match."""
    for kind in KNOWN_FILES:
        if family in kind.families and (match := re.search(kind.words, words)):
            return kind.recipe(family, match)
    return None


def recipe_for_method(method: str, family: str, steps: int) -> Recipe:
    """The recipe of a method's files, a key of `METHOD_FILES`, for models of this family in so many steps.

    Raises ValueError where there are none, with those that there are.
    """
    recipe = _of_method(method, family, steps)
    if recipe is not None:
        return recipe
    counts = [str(n) for n in range(1, MOST_STEPS + 1) if _of_method(method, family, n)]
    if counts:
        raise ValueError(
            f"{method} for {FAMILIES[family]} is known in {', '.join(counts)} steps, not {steps}: take one of these, "
            "or set the recipe by hand."
        )
    methods = [name for name in METHOD_FILES if any(_of_method(name, family, n) for n in range(1, MOST_STEPS + 1))]
    raise ValueError(
        f"{method} is not known for {FAMILIES[family]}; known: {', '.join(methods) or 'none'}. Take one of these, or "
        "set the recipe by hand."
    )


def _of_method(method: str, family: str, steps: int) -> Recipe | None:
    """As `recipe_for_method`; None where there is none."""
    for name in METHOD_FILES[method]:
        if recipe := _recipe_in_table(name.format(steps), family):
            # A method whose files are for any number of steps is recommended the one that was asked for.
            return replace(recipe, steps=recipe.steps if "{}" in name else steps, source="method")
    return None


def recipe_for_checkpoint(name: str, metadata: dict[str, str], family: str) -> Recipe | None:
    """The recipe of a whole model that a few-step LoRA is merged into, or that was distilled, by header or name.

    family: of the model. A name may have words of its own beside the method, as merges have; where it tells no number
    of steps, the recipe is for 4, else for the next that there is.
    Raises ValueError for an unreadable header.
    """
    if recipe := recipe_for_file(name, metadata, family):
        return recipe
    method, steps = _method_in(name)
    if method is None:
        return None
    counts = sorted(range(1, MOST_STEPS + 1), key=lambda n: (abs(n - steps), n))
    recipe = next(filter(None, (_of_method(method, family, n) for n in counts)), None)
    return recipe and replace(recipe, source="method in a name")


def few_step_source(name: str, metadata: dict[str, str], family: str | None) -> str | None:
    """What tells that a whole model is made for few steps, a key of `recipe.SOURCES`; None for a plain one.

    As `recipe_for_checkpoint`; and a model of which no more than the method is known is no plain one.
    """
    if HEADER_KEY in metadata:  # whether or not it can be read
        return "header"
    if recipe := recipe_for_checkpoint(name, metadata, family):
        return recipe.source
    method, _ = _method_in(name)
    return "method in a name" if family in WITHOUT_RECIPE.get(method, ()) else None


def _method_in(checkpoint: str) -> tuple[str | None, int]:
    """The method that a checkpoint's name tells, a key of `METHOD_WORDS`, and the steps, 4 where it does not."""
    words = _plain(HUMP.sub(" ", _name(checkpoint)))
    number = re.search(r"(?<!\d)(\d+) ?steps?\b", words)
    method = next((method for method, pattern in METHOD_WORDS.items() if re.search(pattern, words)), None)
    return method, int(number[1]) if number else 4


def _name(file: str) -> str:
    """The name of a file without its folder and ending, or that of its folder where a library has named the file."""
    path = PurePath(file.replace("\\", "/"))
    folder = path.parent
    if path.stem.lower() not in UNNAMED:
        return path.stem
    if folder.parent.name == "snapshots":  # the cache has models--OWNER--REPOSITORY/snapshots/COMMIT/FILE
        return folder.parent.parent.name.split("--")[-1]
    return folder.name


def _plain(name: str) -> str:
    """A name in lower case with one space between its words, which is what the patterns here match."""
    return re.sub(r"[^a-z0-9]+", " ", name[:LONGEST].lower()).strip()
