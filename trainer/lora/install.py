"""A LoRA file put into a base's network, by diffusers: for sampling, for comparing, and to go on training from."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ...samplers import Recipe
from ...samplers.lora_file import LoraHeader, family_title, read_header
from ...samplers.lora_info import recipe_of
from ...samplers.texts import brief
from ..families import Base, Condition, family_class, family_of, load_base
from ..families.base import DTYPES
from .describe import broken_sentence, broken_tensors

ADAPTER = "file"


def load_for_sample(base: str, dtype: str, lora: Path | None, **options) -> Base:
    """A base on the best device, read as the recipe of the LoRA says: its shift, v-prediction, zero terminal SNR.

    options: of `load_base`; those that are None are left to the recipe, else to the base. Raises as `load_base`.
    """
    options["family"] = family = options.get("family") or family_of(base)
    recipe = recipe_of(read_header(lora)) if lora else None
    if recipe and recipe.family == family:
        by_recipe = {"shift": recipe.shift}
        # "epsilon" tells nothing: it is what every recipe has that says no other, and the base knows better
        if recipe.source == "header" and recipe.prediction == "v_prediction":
            by_recipe |= {"prediction": "v_prediction", "zero_terminal_snr": recipe.zero_terminal_snr or None}
        options = by_recipe | {k: v for k, v in options.items() if v is not None}
    return _load(base, dtype, **options)


def load_for_check(base: str, **options) -> Base:
    """A base in fp32 on the best device, without what parity needs nothing of."""
    family = family_class(base, options.get("family"))
    return _load(base, "fp32", **options | {"family": family.name} | family.parity_options)


def _load(base: str, dtype: str, **options) -> Base:
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; available: {', '.join(DTYPES)}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {k: v for k, v in options.items() if v is not None}
    loaded = load_base(base, dtype=DTYPES[dtype], device=device, **options)
    if loaded.untrained:
        raise ValueError(
            f"{base} is a network with random weights. Train it (pcm train --preset {base}), and give the folder that "
            f"the run writes (runs/{base}/{base})."
        )
    return loaded


def mismatches(recipe: Recipe | None, base: Base) -> list[str]:
    """A sentence where the recipe's base predicted another thing than this one."""
    if recipe is None or recipe.prediction == base.prediction:
        return []
    return [
        f"This LoRA was made for a base that predicts {recipe.prediction}; {Path(base.path).name} predicts "
        f"{base.prediction}. Use the LoRA with a base like its own."
    ]


def null_of(base: Base, negative: str | None) -> Condition:
    """What guidance subtracts: a negative prompt's encoding, or (None) what the base has for no prompt."""
    return base.null_condition(base.encode_prompts([""])) if negative is None else base.encode_prompts([negative])


def install_for_sample(lora: Path | None, base: Base, strength: float | None) -> tuple[Recipe | None, float | None]:
    """`install_whole` at this strength (None: what the recipe wants, else 1); returns the recipe and the strength.

    Both are None where there is no LoRA.
    """
    if lora is None:
        return None, None
    recipe = recipe_of(header_of_family(lora, base.name))
    if strength is None:
        strength = recipe.strength if recipe else 1.0
    install_whole(lora, base, strength)
    return recipe, strength


def install_whole(lora: Path, base: Base, strength: float = 1.0) -> Recipe | None:
    """Put a LoRA into the base, as `ADAPTER`; returns the recipe of its header or of a known file of its name.

    Raises ValueError for a LoRA of another family, with modules that the base has not, or with numbers that are not
    finite.
    """
    header = header_of_family(lora, base.name)
    if broken := broken_tensors(header):
        raise ValueError(f"{lora.name}: {broken_sentence(broken)} Get it again.")
    modules, missing = install(lora, base, ADAPTER)
    if missing:
        raise ValueError(
            f"{lora.name}: {missing} of {modules} modules do not fit {Path(base.path).name}. "
            "It was made for another model."
        )
    base.network.set_adapters(ADAPTER, weights=strength)
    return recipe_of(header)


@contextmanager
def installed(lora: Path, base: Base, strength: float = 1.0) -> Iterator[Recipe | None]:
    """`install_whole` for this block alone."""
    try:
        yield install_whole(lora, base, strength)
    finally:
        if ADAPTER in getattr(base.network, "peft_config", {}):
            base.network.delete_adapters(ADAPTER)


def header_of_family(file: Path, family: str) -> LoraHeader:
    """A LoRA's header; ValueError where it is for a base of another family, or an alpha in it is no number."""
    header = read_header(file)
    if header.family not in (None, family):
        raise ValueError(
            f"{file.name} is a LoRA for {family_title(header.family)}, the base is {family_title(family)}. "
            "Use a matching pair."
        )
    header.alphas()
    return header


def install(path: Path, base: Base, name: str) -> tuple[int, int]:
    """Load a LoRA file into the base's network through diffusers as adapter `name`.

    Returns (modules in the file, modules that diffusers did not install). Raises ValueError when it takes none of it.
    """
    try:
        with warnings.catch_warnings():
            # a second adapter is what the self-test wants
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            base.load_lora(path, name)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:  # PEFT's, for its metadata
        raise ValueError(f"diffusers cannot load {path.name} into {Path(base.path).name}: {brief(error)}") from error
    modules = len(read_header(path).modules)
    adapted = sum(name in layer.lora_A for layer in base.network.modules() if hasattr(layer, "lora_A"))
    return modules, modules - adapted
