"""A LoRA file put into a base's network: for sampling and to go on training from, and by diffusers for comparing."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from ...samplers import Recipe
from ...samplers.families import family_title
from ...samplers.lora_alphas import PEFT_KEY
from ...samplers.lora_file import LoraHeader, read_header
from ...samplers.lora_info import recipe_of
from ...samplers.lora_modules import LoraModule
from ...samplers.texts import brief
from ..families import Base, Condition, family_class, family_of, load_base
from ..families.base import DTYPES
from ..system.machine import best_device
from .describe import broken_sentence, broken_tensors
from .layers import Targets, targets_of

ADAPTER = "file"
RAW = "base_model.model."  # before names as PEFT writes them by itself


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
    """The base as it is sampled: with no LoRA in it yet."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; available: {', '.join(DTYPES)}.")
    options = {k: v for k, v in options.items() if v is not None}
    loaded = load_base(base, dtype=DTYPES[dtype], device=best_device(), **options)
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


class Installed(NamedTuple):
    """A LoRA as it was put into a base: its recipe and its strength, None without one, and sentences on it."""

    recipe: Recipe | None = None
    strength: float | None = None
    notes: tuple[str, ...] = ()


def install_for_sample(lora: Path | None, base: Base, strength: float | None) -> Installed:
    """`install_whole` at this strength; None is what the recipe wants, else 1."""
    if lora is None:
        return Installed()
    header = header_of_family(lora, base.name)
    recipe = recipe_of(header)
    if strength is None:
        strength = recipe.strength if recipe else 1.0
    install_whole(lora, base, strength)
    return Installed(recipe, strength, (*mismatches(recipe, base), *remarks(header)))


def install_whole(lora: Path, base: Base, strength: float = 1.0) -> Recipe | None:
    """Put a LoRA into the base, as `ADAPTER`; returns the recipe of its header or of a known file of its name.

    Raises ValueError for a LoRA of another family, with numbers that are not finite, and as `install`.
    """
    header = header_of_family(lora, base.name)
    if broken := broken_tensors(header):
        raise ValueError(f"{lora.name}: {broken_sentence(broken)} Get it again.")
    if strength != 1 and is_all_dora(header):
        raise ValueError(
            f"{lora.name} is a DoRA, and strength {strength:g} of it is not {strength:g} times its effect: diffusers "
            "scales its halves and leaves its magnitudes. Take strength 1 here; ComfyUI has others."
        )
    install(header, base, ADAPTER)
    base.network.set_adapters(ADAPTER, weights=strength)
    return recipe_of(header)


@contextmanager
def installed(lora: Path, base: Base, strength: float = 1.0) -> Iterator[Recipe | None]:
    """`install_whole` for this block alone."""
    try:
        yield install_whole(lora, base, strength)
    finally:
        uninstall(base)


def uninstall(base: Base) -> None:
    """Take the LoRA out that `install_whole` has put into a base, if there is one."""
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


@torch.no_grad()
def install(header: LoraHeader, base: Base, name: str) -> int:
    """Put a LoRA's modules for the network, and no others (see `left_out`), into it as adapter `name`, whatever the
    file calls them; returns for how many layers they are.

    A module without an alpha counts as alpha = rank, as every loader takes it. Raises as `check_fit`.
    """
    pairs = {layer.path: pair for layer, pair in check_fit(header, base).pairs(header)}
    ranks = {path: pair.rank for path, pair in pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        target_modules="|".join(map(re.escape, ranks)),
        rank_pattern={f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank},
        use_dora=is_all_dora(header),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter, as is meant
        base.network.add_adapter(config, name)

    for path, pair in pairs.items():
        layer = base.network.get_submodule(path)
        for part, factor in ((layer.lora_A, pair.down), (layer.lora_B, pair.up)):
            weight = part[name].weight
            weight.copy_(factor.view_as(weight))
        if pair.magnitude is not None:
            vector = layer.lora_magnitude_vector[name].weight
            vector.data = pair.magnitude.to(vector.device, torch.float32).view(vector.shape)
        layer.lora_alpha[name] = pair.alpha
        layer.scaling[name] = pair.scale
    return len(pairs)


def is_all_dora(header: LoraHeader) -> bool:
    """Whether all modules of a LoRA for the network have PEFT's magnitudes, by which they are one adapter of PEFT's."""
    return bool(header.network) and all(module.is_dora for module in header.network.values())


def check_fit(header: LoraHeader, base: Base) -> Targets:
    """The layers that a LoRA's modules are for; ValueError as `check_plain` (a DoRA may be one) and `targets_of`, and
    where a module has no layer of its name and shape."""
    check_plain(header, header.network, dora=True)
    targets = targets_of(header, base)
    if missing := targets.unmatched:
        raise ValueError(
            f"{header.path.name}: {len(missing)} of {len(targets.modules)} modules do not fit {Path(base.path).name}, "
            f"such as {missing[0]}. It was made for another model."
        )
    return targets


def install_by_diffusers(path: Path, base: Base, name: str) -> tuple[int, int]:
    """Load a LoRA into the base's network as diffusers reads the file, as adapter `name`: its modules for the network.

    Returns (modules for the network, those of them that diffusers did not install). Raises ValueError for modules that
    are more than a plain LoRA's, and when diffusers takes none of the file.
    """
    header = read_header(path)
    check_plain(header, header.network, dora=True)
    modules = list(header.network.values())
    # ComfyUI's magnitudes diffusers would drop, with a warning of a DoRA that it cannot read
    keys = {key for module in modules for part, key in module.keys.items() if part != "dora_scale"}
    state = {key: tensor for key, tensor in load_file(header.path).items() if key in keys}
    metadata = json.loads(header.metadata.get(PEFT_KEY) or header.config or "null")
    if any(key.startswith(RAW) for key in keys):  # PEFT's own names, which diffusers reads under a component's alone
        state = {key.replace(RAW, f"{base.component}.", 1): tensor for key, tensor in state.items()}
        metadata = metadata and _as_diffusers_writes(metadata, modules, base.component)
    try:
        with warnings.catch_warnings():
            # a second adapter is what the self-test wants, and modules are counted below
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            warnings.filterwarnings("ignore", "While injecting the PEFT adapters")
            base.load_lora(state, metadata, name)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:  # PEFT's, for its metadata
        raise ValueError(f"diffusers cannot load {path.name} into {Path(base.path).name}: {brief(error)}") from error
    adapted = sum(name in layer.lora_A for layer in base.network.modules() if hasattr(layer, "lora_A"))
    return len(modules), len(modules) - adapted


def _as_diffusers_writes(config: dict[str, Any], modules: list[LoraModule], component: str) -> dict[str, Any]:
    """PEFT's settings of an adapter as diffusers writes them into a header: under the component's name, with the file's
    own modules as targets, and none that are of training."""
    ranks = {module.path.removeprefix(RAW): module.rank for module in modules}
    settings = {key.split(".")[-1]: value for key, value in config.items()}
    kept = {
        key: settings[key] for key in ("r", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora") if key in settings
    }
    kept |= {"target_modules": list(ranks), "rank_pattern": {rf"^{re.escape(path)}": r for path, r in ranks.items()}}
    return {f"{component}.{key}": value for key, value in kept.items()}


def check_plain(header: LoraHeader, modules: Mapping[str, LoraModule], dora: bool = False) -> None:
    """Raise ValueError for any of these modules of a file that is not two halves that fit, in floating point, and
    perhaps an alpha: diffusers would take it in part, or as something else; and where there are none.

    dora: whether they may have PEFT's magnitudes, if all have them.
    """
    file = header.path.name
    if not modules:
        raise ValueError(
            f"{file} has nothing for the network: its {len(header.modules)} modules are for text encoders, which are "
            "not used here. Take a LoRA that was trained with the network."
        )
    if dora and is_all_dora(header):
        _check_magnitudes(header, modules)
    elif other := {name: module for name, module in modules.items() if not module.is_plain}:
        kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(module.title for module in other.values()).items())
        raise ValueError(
            f"{file} is no plain LoRA: of its {len(modules)} modules {kinds}, such as {next(iter(other))}. Use it in "
            "ComfyUI (Load PCM LoRA), or bring it to a plain LoRA first: merge it into its base there, and then pcm "
            "extract."
        )
    if integers := {name: module for name, module in modules.items() if module.is_integer}:
        name, module = next(iter(integers.items()))
        raise ValueError(
            f"{file} stores {len(integers)} of its {len(modules)} modules as integers, such as {name} "
            f"({', '.join(sorted(set(module.dtypes.values())))}), without the scales that would make weights of them. "
            "Get the file in 16 bits."
        )
    for name, module in modules.items():
        if module.lacks:
            half = min(module.keys.items(), key=lambda item: item[0] == "alpha")[1]  # the other half, if it is there
            raise ValueError(f"{file} has {half} and no {module.lacks[0]} half of it. Get the file again.")
        if not module.is_whole:
            shapes = " and ".join(str(module.shapes[part]) for part in ("down", "up"))
            raise ValueError(
                f"{file}: the halves of {name} are of shapes {shapes}; expected (rank, in, ...) and (out, rank, ...). "
                "Get the file again."
            )


def _check_magnitudes(header: LoraHeader, modules: Mapping[str, LoraModule]) -> None:
    """Raise ValueError for a DoRA's module with another number of magnitudes than rows."""
    for name, module in modules.items():
        rows, shape = next(iter(module.shapes.get("up", ())), 0), module.shapes["magnitude"]
        if math.prod(shape) != rows:
            raise ValueError(
                f"{header.path.name}: the magnitudes of {name} are of shape {shape}; expected {rows} numbers, one for "
                "each row. Get the file again."
            )


def remarks(header: LoraHeader) -> list[str]:
    """What `install` leaves out of a LoRA, and what it takes another way than the file was made, in sentences."""
    lines = left_out(header)
    if lost := [name for name in header.lost_alphas() if name in header.network]:
        lines.append(
            f"{len(lost)} of {len(header.network)} modules have lost their alpha, such as {lost[0]}, and count as "
            "alpha = rank: get the file again."
        )
    return lines


def left_out(header: LoraHeader) -> list[str]:
    """What `install` leaves out of a LoRA, in sentences: other modules than the network's, and what is no LoRA."""
    encoders = len(header.modules) - len(header.network)
    lines = [f"{encoders} modules for text encoders are left out."] if encoders else []
    if header.unmatched:
        lines.append(f"{len(header.unmatched)} tensors that are no LoRA's are left out, such as {header.unmatched[0]}.")
    return lines
