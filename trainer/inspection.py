"""Looking inside LoRA files and trying them: what `pcm inspect`, `pcm check` and `pcm sample` do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..samplers import Recipe
from ..samplers.lora_file import (
    FLOATS,
    LoraHeader,
    family_title,
    file_hash,
    not_finite,
    read_header,
    split_key,
    tensor_hash,
)
from ..samplers.lora_info import facts, recipe_of, sentences
from ..samplers.texts import printable
from .export import DTYPES, install
from .families import Base, Condition, family_of, load_base
from .generate import generate
from .objectives import tells_target_time
from .previews import check_png, draw_grid, save_image

ADAPTER = "file"
# kohya's names of SDXL's and SD3's blocks in the original layout
OTHER_LAYOUT = re.compile(
    r"^lora_(unet|transformer)_(input_blocks|middle_block|output_blocks|joint_blocks|time_embed|label_emb|out)_\d"
)


def describe(file: Path) -> dict[str, Any]:
    """`facts` of a LoRA's header, its hashes, and the names of its tensors with numbers that are not finite.

    Raises ValueError or FileNotFoundError for a bad file.
    """
    header = read_header(file)
    own, stored = tensor_hash(file), header.metadata.get("sshs_model_hash")
    hashes = {"sha256": file_hash(file), "autov3": own[:12]}
    hashes["hash_matches_header"] = None if stored is None else stored == own
    return facts(header) | hashes | {"not_finite": broken_tensors(header)}


def broken_tensors(header: LoraHeader) -> list[str]:
    """The names of a LoRA's tensors with numbers that are not finite, read one by one."""
    with safe_open(header.path, "pt") as file:
        names = [name for name, info in header.tensors.items() if info.dtype in FLOATS]
        return not_finite((name, file.get_tensor(name)) for name in names)


def describe_text(d: dict[str, Any]) -> str:
    """`describe` for people."""
    hashes = {True: "matches", False: "DOES NOT MATCH", None: "is not in"}[d["hash_matches_header"]]
    lines = [d["file"], *(f"  {line}" for line in sentences(d))]
    if broken := d["not_finite"]:
        lines[1:1] = [f"  BROKEN: {_broken(broken)} Get the file again."]
    if d["recipe"]:
        told = {k: v for k, v in d["recipe"].items() if k != "source" and v not in (None, "")}
        lines.append("  recipe: " + ", ".join(f"{k} {v}" for k, v in told.items()))
    lines += [f"  SHA256 {d['sha256']}", f"  AutoV3 {d['autov3']}, which {hashes} the header", "  metadata"]
    lines += [f"    {printable(k, 100)}: {printable(v, 100)}" for k, v in sorted(d["metadata"].items())]
    return "\n".join(lines)


def _broken(names: list[str]) -> str:
    return f"numbers in {len(names)} of its tensors are not finite, such as in {names[0]}: every picture is black."


def load_for_sample(base: str, dtype: str, lora: Path | None, **options) -> Base:
    """A base on the best device, with the shift that the LoRA's recipe tells of.

    Where the recipe in its header says that the LoRA's base had v-prediction or zero terminal SNR, so has this one.
    "epsilon" tells nothing: it is what every recipe has that says no other, and the base knows better.
    options: of `load_base`; those that are None are left to the recipe, else to the base.
    """
    options["family"] = family = options.get("family") or family_of(base)
    recipe = recipe_of(read_header(lora)) if lora else None
    if recipe and recipe.family == family:
        told = {"shift": recipe.shift}
        if recipe.source == "header" and recipe.prediction == "v_prediction":
            told |= {"prediction": "v_prediction", "zero_terminal_snr": recipe.zero_terminal_snr or None}
        options = told | {k: v for k, v in options.items() if v is not None}
    return _load(base, dtype, **options)


def load_for_check(base: str, **options) -> Base:
    """A base in fp32 on the best device; SD3 without T5, 19 GB of which parity needs nothing."""
    options["family"] = options.get("family") or family_of(base)
    return _load(base, "fp32", **options | ({"t5": False} if options["family"] == "sd3" else {}))


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


@torch.no_grad()
def check_parity(file: Path, base: Base) -> dict[str, Any]:
    """Compare a LoRA loaded by diffusers with the same LoRA added to the weights by hand, on one noisy point.

    A file with numbers that are not finite fails without being loaded. By hand: W + alpha / rank * up @ down for each
    module that is, by its name, one of the network's. A file that names blocks in the original layout, which diffusers
    and ComfyUI both map, is loaded by diffusers and not compared. The base is changed by what is added by hand.
    """
    header = header_of_family(file, base.name)
    if broken := broken_tensors(header):
        text = f"FAILED: {file.name}: {_broken(broken)} Get it again."
        return {"modules": len(header.modules), "not_finite": broken[:20], "passed": False, "text": text}
    modules = {_name_in_header(base, n): m for n, m in base.network.named_modules() if hasattr(m, "weight")}
    fits = lambda n, m: n in modules and m.fits(tuple(modules[n].weight.shape))  # noqa: E731
    other_layout = [n for n in header.modules if OTHER_LAYOUT.search(n)]
    unmatched = sorted(n for n, m in header.modules.items() if n not in other_layout and not fits(n, m))
    found = {"modules": len(header.modules), "unmatched": len(unmatched), "unmatched_names": unmatched[:20]}
    found["other_layout"] = len(other_layout)
    x, tick, condition = _probe(base)
    bare = base.denoise(x, tick, condition)
    try:
        _, not_installed = install(file, base, ADAPTER)
    except ValueError as error:
        return found | {"passed": False, "not_loaded_by_diffusers": len(header.modules), "text": f"FAILED: {error}"}
    by_diffusers = base.denoise(x, tick, condition)
    base.network.delete_adapters(ADAPTER)
    if not by_diffusers.isfinite().all():
        text = f"FAILED: with {file.name} the output is not finite: its numbers are too large. Get it again."
        return found | {"passed": False, "not_loaded_by_diffusers": not_installed, "text": text}
    failed = f"; unmatched: {', '.join(unmatched[:5])}" if unmatched else ""
    loaded = (
        f"{len(unmatched)} keys unmatched of {len(header.modules)} modules, {not_installed} not loaded by diffusers"
    )
    passed = not unmatched and not not_installed
    if other_layout:
        effect = (by_diffusers - bare).abs().max().item()
        return found | {
            "passed": passed,
            "not_loaded_by_diffusers": not_installed,
            "max_difference": None,
            "max_effect": effect,
            "text": f"{'OK' if passed else 'FAILED'}: {loaded}; {len(other_layout)} names of another layout, loaded by "
            f"diffusers, not compared by hand (the LoRA's effect is {effect:.2g}){failed}",
        }
    _add_by_hand(file, header, modules, unmatched)
    by_hand = base.denoise(x, tick, condition)
    difference = (by_diffusers - by_hand).abs().max().item()
    effect = (by_hand - bare).abs().max().item()
    passed = passed and difference <= 1e-3 * by_hand.abs().max().item() + 0.01 * effect
    return found | {
        "passed": passed,
        "not_loaded_by_diffusers": not_installed,
        "max_difference": difference,
        "max_effect": effect,
        "text": f"{'OK' if passed else 'FAILED'}: {loaded}, max output difference {difference:.2g} "
        f"(the LoRA's effect is {effect:.2g}){failed}",
    }


def _add_by_hand(file: Path, header: LoraHeader, modules: dict[str, torch.nn.Module], without: list[str]) -> None:
    """Add the LoRA to the weights of these modules, by name, all but those `without`."""
    weights, alphas = load_file(file), header.alphas()
    for name, entry in header.modules.items():
        if name in without:
            continue
        up, down = (weights[entry.keys[part]].float() for part in ("up", "down"))
        alpha = alphas.get(name, entry.rank)
        target = modules[name].get_base_layer() if hasattr(modules[name], "get_base_layer") else modules[name]
        delta = (up.flatten(1) @ down.flatten(1)).view_as(target.weight) * (alpha / entry.rank)
        target.weight += delta.to(target.weight)


def sample_grid(
    base: Base,
    prompts: list[str],
    out: Path,
    lora: Path | None,
    steps: list[int],
    guidance: float | None,
    negative: str | None,
    strength: float | None,
    gamma: float | None,
    seed: int,
    resolution: int | None,
) -> dict[str, Any]:
    """Draw a row for each number of steps and write the grid; returns what was used, with the recipe's warnings.

    guidance, strength, gamma: None is the recipe's. Without a recipe they are those of the base alone, and strength 1.
    """
    check_png(out)
    recipe, strength = install_for_sample(lora, base, strength)
    usual = recipe or base.alone
    grid = usual.grid()
    guidance = usual.guidance if guidance is None else guidance
    gamma = usual.gamma if gamma is None else gamma
    shape = base.latent_shape(resolution or base.default_resolution)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)).repeat(len(prompts), 1, 1, 1)
    condition = base.encode_prompts(prompts)
    null = null_of(base, negative)
    rows, pictures, warnings = [], [], mismatches(recipe, base)
    for n in steps:
        plan = grid.plan(n)
        warnings += [*(recipe.warnings(n, guidance) if recipe else []), *plan.notes]
        told = recipe is not None and tells_target_time(recipe.objective)
        how = {"min_alpha": usual.min_alpha, "seed": seed, "target_time": told}
        latents = generate(base, condition, null, noise, plan.ticks, guidance, gamma, **how)
        pictures.append((f"{n} step{'s' * (n > 1)}\nCFG {guidance:g}", base.decode(latents)))
        rows.append({"steps": n, "guidance": guidance, "gamma": gamma, "ticks": plan.ticks})
    save_image(draw_grid(pictures, prompts), out)
    facts = {"out": str(out), "rows": rows, "strength": strength}
    return facts | {"recipe": recipe and asdict(recipe), "warnings": list(dict.fromkeys(warnings))}


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
        raise ValueError(f"{lora.name}: {_broken(broken)} Get it again.")
    modules, missing = install(lora, base, ADAPTER)
    if missing:
        which = f"{missing} of {modules} modules do not fit {Path(base.path).name}"
        raise ValueError(f"{lora.name}: {which}. It was made for another model.")
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


def _name_in_header(base: Base, module: str) -> str:
    """What `LoraHeader.modules` calls one of the network's modules, whatever key style the file has."""
    return split_key(base.lora_key(module) + ".alpha")[0]


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


def _probe(base: Base) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One noisy point halfway up the schedule, and the empty prompt's encoding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *base.latent_shape(base.default_resolution), generator=generator).to(base.device)
    tick = torch.tensor([base.schedule.ticks // 2], device=base.device)
    return x, tick, base.encode_prompts([""])
