"""Every preset trains, saves and tests itself on the tiny base of its family; only its size is changed."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from phased_consistency.samplers import recipe_for_file
from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.config.presets import PRESETS
from phased_consistency.trainer.training.loop import train
from support.runs import metadata

SIZE = {
    "base.dtype": "fp32",
    "data.count": 3,
    "data.teacher_steps": 2,
    "data.resolution": 64,
    "data.batch_size": 3,
    "lora.rank": 2,
    "train.batch_size": 2,
    "train.accumulation": 1,
    "train.steps": 1,
    "train.lr": 1e-2,
    "train.trackers": "[]",
    "train.report": "false",
    "preview.every": 0,
    "validation.every": 0,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


FAMILIES = {"sd15": "epsilon", "sdxl": "v_prediction", "sd3": "flow"}


def family_of(preset):
    """The family whose full-size base a preset is for; None for the demos."""
    parts = preset.split("-")
    return next((family for family in FAMILIES if family in parts and "demo" not in parts), None)


@pytest.mark.parametrize("preset", sorted(filter(family_of, PRESETS)))
def test_a_preset_on_the_tiny_base_of_its_family(preset, cache, tmp_path):
    family, kind = family_of(preset), preset.replace(f"{family_of(preset)}-", "")
    changes = SIZE | {"base.path": f"tiny-{family}", "data.cache": cache, "output": tmp_path / "run"}
    config = load_config(overrides=[f"{k}={v}" for k, v in changes.items()], preset=preset)
    lora = train(config)  # ends with the self-test: every key loaded by diffusers, and the trained output
    learnt = [t for name, t in load_file(lora).items() if name.endswith(("lora_up.weight", "lora_B.weight"))]
    assert learnt and sum(t.abs().sum().item() > 0 for t in learnt) > 0.9 * len(learnt)
    recipe = recipe_for_file(lora.name, metadata(lora))
    assert recipe.source == "header" and recipe.family == family and recipe.objective == config.objective.name
    assert recipe.negative_prompts == (recipe.guidance_mode == "normalcfg")
    assert recipe.prediction == FAMILIES[family]
    assert (recipe.shift is not None) == (family == "sd3")
    if recipe.objective == "pcm":
        assert recipe.steps == (4 if kind.startswith("stochastic") else int(kind[0]))
        assert recipe.guidance_mode == ("normalcfg" if "normalcfg" in kind else "smallcfg")
        assert recipe.gamma == (1 if kind.startswith("stochastic") else 0)
