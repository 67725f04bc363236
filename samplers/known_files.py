"""Few-step LoRAs that carry no recipe, known by their names, and how their authors sample them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import PurePath

from .families import family_title
from .known_flow import DIT_FILES
from .known_table import OWN, PLAIN, UNET_FILES
from .recipe import HEADER_KEY, Recipe

KNOWN_FILES = (*UNET_FILES, *DIT_FILES)
# Patterns of the family in a file's name. SSD-1B is a small SDXL; PCM's SD3 files tell their shift instead.
FAMILY_MARKS = (
    ("flux2", r"\bflux ?2"),
    ("flux", r"flux"),
    ("qwen_image", r"\bqwen"),
    ("lumina2", r"\bz ?image"),
    ("wan2.1", r"\b(?:fast ?)?wan ?(?:2|video)|\blightx2v [ti]2v"),
    ("ltxav", r"\bltx ?2"),
    ("anima", r"\banima\b"),
    ("krea2", r"\bkrea ?2"),
    ("hidream", r"\bhidream i1"),
    ("sdxl", r"sd ?xl|ssd ?1b"),
    ("sd3", r"sd ?35?\b|\bp[cd]m .*shift"),
    ("sd2", r"sd ?v?2 ?[01]\b"),
    ("sd15", r"sd ?v?1 ?5\b|\bflash ?sd\b"),
)
EXPERTS = ("high_noise_model", "low_noise_model")  # names of the two files in a folder that has the release's
UNNAMED = ("pytorch_lora_weights", "adapter_model")  # as libraries save LoRAs: the folder has the name
LONGEST = 255  # characters of a name, as file systems have it: the patterns' time grows with its square
TITLES = ("ss_output_name", "modelspec.title")  # where kohya's tools put the name that a file was first written under
# A method, as people choose it -> names of its files: the first that `KNOWN_FILES` has for the family and the steps.
METHOD_FILES = {
    "PCM": ("pcm smallcfg {}step", "pcm deterministic {}step shift3"),
    "PCM with CFG": ("pcm normalcfg {}step",),
    "PCM stochastic": ("pcm lcmlike", "pcm stochastic shift3"),
    "LCM": ("lcm lora",),
    "TCD": ("tcd lora",),
    "Hyper-SD": ("hyper sd {}step", "hyper flux {}step"),
    "Hyper-SD with CFG": ("hyper sd cfg {}step",),
    "Lightning": ("lightning {}step", "qwen image lightning {}step"),
    "DMD2": ("dmd2",),
    "Flash Diffusion": ("flash sd",),
    "Turbo": ("sdxl turbo", "flux 1 turbo alpha", "flux 2 turbo", "anima turbo lora"),
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


def recipe_for_file(
    name: str, metadata: dict[str, str], family: str | None = None, certain: bool = False, whole: bool = False
) -> Recipe | None:
    """The recipe in a LoRA's header, else that of a known public file of this name or title, else None.

    name: file name or path; a file called as libraries save it goes by its folder, in the Hugging Face cache
        by its repository.
    metadata: the safetensors `__metadata__`; its `TITLES` tell what a renamed file was called.
    family: the family of the file's tensors (`LoraHeader.family`), where known: a name that tells no family
        takes it, and one that tells another is not believed.
    certain: only by a name that has no words of its own, as titles must not have: one such as
        "comic_style_dmd2" may tell what a style's LoRA is for.
    whole: whether the file is a whole model.
    Raises ValueError for an unreadable header.
    """
    if HEADER_KEY in metadata:
        return Recipe.from_header(metadata[HEADER_KEY])
    if recipe := _recipe_for_words(_plain(_name(name)), family, certain, whole):
        return recipe
    recipes = (_recipe_for_words(_plain(metadata.get(key, "")), family, certain=True, whole=whole) for key in TITLES)
    recipe = next(filter(None, recipes), None)
    return recipe and replace(recipe, source="known title")


def _recipe_for_words(words: str, family: str | None, certain: bool, whole: bool) -> Recipe | None:
    """The recipe of the first of `KNOWN_FILES` that a name's words match; the rest: see `recipe_for_file`."""
    if certain and not re.fullmatch(rf"(?:{PLAIN}|{OWN})(?: (?:{PLAIN}|{OWN}))*", words):
        return None
    named = next((mark for mark, pattern in FAMILY_MARKS if re.search(pattern, words)), None)
    if family and named and family != named:
        return None
    return _recipe_in_table(words, family or named, whole)


def _recipe_in_table(words: str, family: str | None, whole: bool = False) -> Recipe | None:
    """The recipe of the first of `KNOWN_FILES` that there is for this family and that these words match."""
    for kind in KNOWN_FILES:
        suits = family in kind.families and (whole or not kind.is_checkpoint)
        if suits and (match := re.search(kind.words, words)):
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
            f"{method} for {family_title(family)} is known in {', '.join(counts)} steps, not {steps}: take one of "
            "these, or set the recipe by hand."
        )
    methods = [name for name in METHOD_FILES if any(_of_method(name, family, n) for n in range(1, MOST_STEPS + 1))]
    raise ValueError(
        f"{method} is not known for {family_title(family)}; known: {', '.join(methods) or 'none'}. Take one of these, "
        "or set the recipe by hand."
    )


def _of_method(method: str, family: str, steps: int) -> Recipe | None:
    """As `recipe_for_method`; None where there is none."""
    for name in METHOD_FILES[method]:
        if recipe := _recipe_in_table(name.format(steps), family):
            # A method whose files are for any number of steps is recommended the one that was asked for.
            takes_any = not recipe.has_own_steps and "{}" not in name
            if takes_any or recipe.steps == steps:
                return replace(recipe, steps=steps, source="method")
    return None


def recipe_for_checkpoint(name: str, metadata: dict[str, str], family: str) -> Recipe | None:
    """The recipe of a whole model that a few-step LoRA is merged into, or that was distilled, by header or name.

    family: of the model. A name may have words of its own beside the method, as merges have; where it tells no number
    of steps, the recipe is for 4, else for the next that there is.
    Raises ValueError for an unreadable header.
    """
    if recipe := recipe_for_file(name, metadata, family, whole=True):
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
    if path.stem.lower() in EXPERTS:
        return f"{folder.name} {path.stem}"
    if path.stem.lower() not in UNNAMED:
        return path.stem
    if folder.parent.name == "snapshots":  # the cache has models--OWNER--REPOSITORY/snapshots/COMMIT/FILE
        return folder.parent.parent.name.split("--")[-1]
    return folder.name


def _plain(name: str) -> str:
    """A name in lower case with one space between its words, which is what the patterns here match."""
    return re.sub(r"[^a-z0-9]+", " ", name[:LONGEST].lower()).strip()
