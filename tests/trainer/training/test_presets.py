"""Every preset trains, saves and tests itself on a small base of its family; only its size is changed.

One preset of each kind has a test of its own, which is fast; the others are trained one after another, by objective.
"""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import chain

import pytest
from safetensors.torch import load_file

from phased_consistency.samplers import recipe_for_file
from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.config.presets import PRESETS
from phased_consistency.trainer.training.loop import train
from support.runs import metadata, settings, speck

# What a preset itself decides, in place of a small run's settings.
SIZE = {
    "data__count": 3,
    "data__teacher_steps": 1,
    "lora__rank": 2,
    "train__batch_size": 2,
    "train__accumulation": 1,
    "train__steps": 1,
} | dict.fromkeys(("data__teacher_guidance", "lora__alpha", "objective__guidance", "train__save_every"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


FAMILIES = {"sd15": "epsilon", "sdxl": "v_prediction", "sd3": "flow"}


def family_of(preset):
    """The family whose full-size base a preset is for; None for the demos."""
    parts = preset.split("-")
    return next((family for family in FAMILIES if family in parts and "demo" not in parts), None)


# One an objective, one PCM a family, and one each of what changes the loss.
KINDS = [f"{objective}-sd15" for objective in ("cd", "ct", "ctm", "dscd", "lcf", "lcm", "progressive", "tcd", "ufogen")]
KINDS += ["sd15-4step-dmd", "sd15-4step-tdm"]
KINDS += ["sd15-4step", "sdxl-4step", "sd3-4step", "sd15-2step-adv", "sd15-4step-normalcfg"]
REFINING = [f"refine-{family}" for family in FAMILIES]
OTHERS = defaultdict(list)
for _preset in sorted(filter(family_of, PRESETS.keys() - {*KINDS, *REFINING})):
    OTHERS[re.sub(r"-?(sd15|sdxl|sd3)-?|\d", "", _preset)].append(_preset)


@pytest.mark.parametrize("preset", KINDS)
def test_a_preset_of_each_kind(preset, cache, tmp_path):
    check_preset(preset, cache, tmp_path)


@pytest.mark.parametrize("presets", OTHERS.values(), ids=OTHERS)
def test_the_other_presets(presets, cache, tmp_path):
    for preset in presets:
        check_preset(preset, cache, tmp_path / preset)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_preset_that_goes_on_from_another_s_lora(family, cache, tmp_path):
    check_preset(f"{family}-4step", cache, tmp_path / "start")
    start = tmp_path / "start" / "run" / f"pcm-{family}-4step.safetensors"
    check_preset(f"refine-{family}", cache, tmp_path / "refined", lora__init=start)


def test_every_preset_is_among_them():
    assert sorted([*KINDS, *REFINING, *chain(*OTHERS.values())]) == sorted(filter(family_of, PRESETS))


def check_preset(preset, cache, folder, **more):
    """Train one on a small base of its family, and read what it has made."""
    family, kind = family_of(preset), preset.replace(f"{family_of(preset)}-", "")
    changes = SIZE | {"data__cache": cache, "base__path": speck(family).name} | more
    if kind.endswith("adv"):
        changes |= {"adversarial__width": 16, "data__resolution": 64}  # maps large enough for its discriminator
    if kind.endswith(("dmd", "tdm")):  # of one update, in which the LoRA is to learn
        changes["objective__critic_warmup"] = 0
    config = load_config(overrides=settings(folder / "run", **changes), preset=preset)
    lora = train(config)  # ends with the self-test: every key loaded by diffusers, and the trained output
    learnt = [t for name, t in load_file(lora).items() if name.endswith(("lora_up.weight", "lora_B.weight"))]
    assert learnt and sum(t.abs().sum().item() > 0 for t in learnt) > 0.9 * len(learnt)
    recipe = recipe_for_file(lora.name, metadata(lora))
    assert recipe.source == "header" and recipe.family == family and recipe.objective == config.objective.name
    assert recipe.negative_prompts == (recipe.guidance_mode == "normalcfg")
    assert recipe.prediction == FAMILIES[family]
    assert (recipe.shift is not None) == (family == "sd3")
    if recipe.objective == "pcm":
        assert recipe.steps == (4 if kind.startswith(("stochastic", "refine")) else int(kind[0]))
        assert recipe.guidance_mode == ("normalcfg" if "normalcfg" in kind else "smallcfg")
        assert recipe.gamma == (1 if kind.startswith("stochastic") else 0)
