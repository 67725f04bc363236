"""Sentences as nodes say them, with figures and names: those of docs/symptoms.md, and others that need no host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from host.mistakes import Mistake
from host.symptoms import MISTAKES
from phased_consistency.samplers import PhaseGrid, Recipe
from phased_consistency.samplers.emoji_words import parse
from phased_consistency.samplers.known_files import recipe_for_file, recipe_for_method
from phased_consistency.samplers.recipe import SOURCES

BAD_RECIPES = (
    {"gamma": 3},
    {"mode": "wild", "gamma": 0.5},
    {"guidance": 9.0},
    {"strength": 0},
    {"steps": 50},
    {"points": 30},
    {"phases": 50},
    {"family": "no such"},
    {"phases": "four"},
    {"points": 10**7},
    {"base_name": "x" * 2000},
    {"sigmas": [1, 2]},
    {"sigmas": [], "timesteps": [[1]]},
    {"mu_by_size": [1]},
    {"min_alpha": 2},
    {"prediction": "flow"},
    {"prediction": "flow", "shift": -1.0},
    {"prediction": "flow", "shift": 3.0, "boundary": 2.0, "embedded_guidance": -1.0},
)
FILES = (  # of the table of known files, with what is special in how they are sampled
    "pcm_sd15_smallcfg_4step_converted",
    "pcm_sdxl_normalcfg_8step_converted",
    "pcm_sd15_lcmlike_lora_converted",
    "lcm-lora-sdv1-5",
    "TCD-SDXL-LoRA",
    "Hyper-SD15-1step-lora",
    "Hyper-SDXL-8steps-CFG-lora",
    "FLUX.1-Turbo-Alpha",
    "FLUX.2-dev-Turbo",
    "Qwen-Image-Lightning-4steps-V1.0",
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise",
)
ORDINARY = (  # what no symptom has
    "4 steps, CFG 1 (1 to 2), deterministic.",
    "4 steps at CFG 1, stochastic, gamma 0.3.",
    "8 steps at CFG 4.5 on steps 1 to 4 of 8, else 1, deterministic.",
    "CFG 2 on step 1 of 4: 8 evaluations, since another node wants the negative prompt at CFG 1 too.",
    "CFG 4.5 on steps 1 to 4 of 8, else 1: 12 evaluations; with CFG on all 16, with none 8.",
    "2 of 4 steps, stochastic, gamma 0.3, CFG 1: 1 evaluation.",
    "2 steps, deterministic: The latent is empty: set denoise to 1, or connect a picture by VAE Encode.",
    "60 of step_counts is left out: steps must be between 1 and 40, the number of solver points; got 60.",
    "modes is 'wild, gamma 3', of which 'gamma 3' is none. Write from recipe, deterministic, stochastic, or gamma and "
    "a number from 0 to 1, such as: deterministic, stochastic, gamma 0.3.",
    "4 steps, sigmas 14.61, 4.082, 1.613, 0.6932, 0.",
    "2 steps by the high-noise model, 2 by the low-noise one.",
    "SD1.5 PCM, 73 of 73 modules matched.",
    "5 of 9 modules match this SD1.5 model.",
    "SDXL (NoobAI, v-prediction) PCM LoRA, 722 modules (720 LoRA, 2 DoRA), 394.1 MB.",
    "SD1.5 LoRA, 1 module, 0.1 MB.",
    "an unknown family LoRA, 2 modules, 0.1 MB.",
    "Rank 64; alpha none (strength 1); stored as F16 (3), F32 (2) and 2 others.",
    "Author: somebody, by hand: 4 steps.",
    "sub/kohya.safetensors: PCM, by the table of known files.",
    "Written: fast/style.safetensors.",
    "style.safetensors is a web page, such as a site's for signing in, and no .safetensors file. Download the file "
    "itself again.",
    "style.safetensors has a damaged safetensors header (an alpha is 'x', which is no number). Get it again.",
    "100x60 is worked on as 104x64, then cut.",
    "The noise was estimated: 25.5 levels of 255.",
    "strength 0.4 starts at the nearest phase edge, which is 0.5: 2 of 4 steps.",
    "From the level of this noise on there is 1 step, not 4.",
)


def examples() -> list[str]:
    """Sentences as nodes say them, with figures and names."""
    mistakes = [row for symptom in MISTAKES.values() for row in symptom if isinstance(row, Mistake)]
    said = [*ORDINARY, *(row.said for row in mistakes if not row.tooltip)]
    said += [error_of(Recipe, **{"family": "sd15"} | bad) for bad in BAD_RECIPES]
    said += [error_of(recipe_for_method, "Lightning", family, 3) for family in ("sdxl", "sd15")]
    said += error_of(parse, "a spaceship on a plaid wall").splitlines()
    for name in FILES:
        family = next((key for key in ("sdxl", "sd15") if key in name.lower()), None)
        recipe = recipe_for_file(f"{name}.safetensors", {}, family)
        said += [recipe.usage_hint(), f"Recipe from {SOURCES[recipe.source]}."]
        said += recipe.warnings(31, 20.0, "sd3", 9.0) + recipe.warnings(2, 1.0)
    for phases in (4, 1):
        grid = PhaseGrid(40, phases)
        said += [*grid.plan_at_most(50, 0.4).notes, *grid.plan(4, 0.13).notes]
        said += [error_of(grid.plan, 41), error_of(grid.plan, 4, 2)]
    return list(dict.fromkeys(said))


def error_of(call: Callable[..., Any], *given: Any, **keywords: Any) -> str:
    """The sentence that a call fails with."""
    try:
        call(*given, **keywords)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{call} took {given} {keywords}")
