"""Published files, by their names: what their authors sample them with."""

from contextlib import suppress
from dataclasses import replace

import pytest

from phased_consistency.samplers import Recipe, recipe_for_file
from phased_consistency.samplers.known_files import (
    METHOD_FILES,
    few_step_source,
    recipe_for_checkpoint,
    recipe_for_method,
)
from phased_consistency.samplers.recipe import HEADER_KEY

TRAILING = {
    2: [999, 499],
    4: [999, 749, 499, 249],
    8: [999, 874, 749, 624, 499, 374, 249, 124],
    16: [999, 937, 874, 811, 749, 687, 624, 561, 499, 437, 374, 311, 249, 187, 124, 61],
}
FILES = [
    *(("sd15", f"pcm_sd15_smallcfg_{n}step_converted", n, (1, 2)) for n in (2, 4, 8, 16)),
    *(("sdxl", f"pcm_sdxl_smallcfg_{n}step_converted", n, (1, 2)) for n in (2, 4, 8, 16)),
    *(
        ("sd15", f"pcm_sd15_normalcfg_{n}step_converted", n, cfg)
        for n, cfg in ((4, (2.5, 3.5)), (8, (3, 6)), (16, (2, 9)))
    ),
    *(
        ("sdxl", f"pcm_sdxl_normalcfg_{n}step_converted", n, cfg)
        for n, cfg in ((4, (2.5, 3.5)), (8, (3, 6)), (16, (2, 9)))
    ),
]
SD3_FILES = [
    ("pcm_deterministic_2step_shift1", 2, 1.0, [1, 0.5]),
    ("pcm_deterministic_4step_shift1", 4, 1.0, [1, 0.76, 0.5, 0.26]),
    ("pcm_deterministic_4step_shift3", 4, 3.0, [1, 0.76, 0.5, 0.26]),
]


def known(name: str) -> Recipe:
    recipe = recipe_for_file(f"{name}.safetensors", {})
    assert recipe is not None and recipe.source == "known file"
    return recipe


def timesteps(recipe: Recipe, trained: bool = False) -> list[int]:
    return [tick - 1 for tick in recipe.grid(trained).plan(recipe.steps).ticks[:-1]]


@pytest.mark.parametrize(("family", "name", "steps", "cfg"), FILES)
def test_published_unet_files(family, name, steps, cfg):
    recipe = known(name)
    assert (recipe.family, recipe.mode, recipe.steps, recipe.phases) == (family, "deterministic", steps, steps)
    assert (recipe.prediction, recipe.shift, recipe.gamma) == ("epsilon", None, 0)
    assert (recipe.guidance_min, recipe.guidance_max) == cfg
    assert recipe.negative_prompts == ("normalcfg" in name)
    assert recipe.guidance_mode == ("normalcfg" if "normalcfg" in name else "smallcfg")
    # 62.5 timesteps apart, the 16 levels are rounded up where diffusers rounds to even: at most one timestep off
    off = 1 if steps == 16 else 0
    assert all(abs(a - b) <= off for a, b in zip(timesteps(recipe), TRAILING[steps], strict=True))


@pytest.mark.parametrize(
    ("name", "edges"),
    [
        ("pcm_sd15_smallcfg_4step_converted", [999, 739, 499, 239]),
        ("pcm_sd15_normalcfg_8step_converted", [999, 859, 739, 619, 499, 359, 239, 119]),
        ("pcm_sdxl_smallcfg_4step_converted", [999, 749, 499, 249]),
        ("pcm_deterministic_4step_shift3", [999, 749, 499, 249]),
    ],
)
def test_trained_edges_are_an_option(name, edges):
    assert timesteps(known(name), trained=True) == edges


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_published_lcmlike_files(family):
    recipe = known(f"pcm_{family}_lcmlike_lora_converted")
    assert (recipe.family, recipe.mode, recipe.phases, recipe.steps, recipe.gamma) == (family, "stochastic", 1, 4, 1)
    assert timesteps(recipe) == [999, 759, 499, 259]
    assert [t - 1 for t in recipe.grid().plan(8).ticks[:-1]] == [999, 879, 759, 639, 499, 379, 259, 139]


@pytest.mark.parametrize(("name", "steps", "shift", "levels"), SD3_FILES)
@pytest.mark.parametrize("renamed", ["{}", "half_{}", "pcm_sd3_{}"])
def test_published_sd3_files(renamed, name, steps, shift, levels):
    recipe = known(renamed.format(name.removeprefix("pcm_") if "sd3" in renamed else name))
    assert (recipe.family, recipe.prediction, recipe.mode) == ("sd3", "flow", "deterministic")
    assert (recipe.steps, recipe.shift, recipe.guidance) == (steps, shift, 1.2)
    assert [tick / 1000 for tick in recipe.grid().plan().ticks[:-1]] == levels
    sigmas = recipe.schedule().sigma(500)
    assert sigmas.item() == pytest.approx({1.0: 0.5, 3.0: 0.75}[shift])


@pytest.mark.parametrize("name", ["pcm", "pdm", "half_pcm", "pcm_sd3"])
def test_published_stochastic_sd3_file(name):
    recipe = known(f"{name}_stochastic_shift3")
    assert (recipe.family, recipe.mode, recipe.phases, recipe.steps, recipe.shift) == ("sd3", "stochastic", 1, 4, 3.0)
    assert recipe.grid().plan(4).ticks == (1000, 760, 500, 260, 0)


LCM, TCD = ("stochastic", 1.0, [999, 759, 499, 259]), ("stochastic", 0.3, [999, 759, 499, 259])
ONE, RENOISED = ("stochastic", 1.0, [999]), ("stochastic", 1.0, TRAILING[4])
DETERMINISTIC = {n: ("deterministic", 0.0, levels) for n, levels in TRAILING.items()}
TWELVE = ("deterministic", 0.0, [999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82])
PLAIN, KEPT = (1, 1, 2), (5, 5, 8)


@pytest.mark.parametrize(
    ("name", "family", "method", "sampled", "cfg"),
    [
        *((n, "sd15", "LCM", LCM, PLAIN) for n in ("lcm-lora-sdv1-5", "LCM_LoRA_SD15", "lcm_lora_weights_sd1.5")),
        *((n, "sdxl", "LCM", LCM, PLAIN) for n in ("lcm-lora-sdxl", "LCM_LoRA_Weights_SDXL", "lcm-lora-ssd-1b")),
        ("latent-consistency/lcm-lora-sdxl/pytorch_lora_weights", "sdxl", "LCM", LCM, PLAIN),
        ("TCD-SD15-LoRA", "sd15", "TCD", TCD, PLAIN),
        ("TCD-SD21-base-LoRA", "sd2", "TCD", TCD, PLAIN),
        *((n, "sdxl", "TCD", TCD, PLAIN) for n in ("TCD-SDXL-LoRA", "tcd_sdxl", "TCD-SDXL-LoRA\\adapter_model")),
        *((f"Hyper-{f}-1step-lora", f.lower(), "Hyper-SD", ONE, PLAIN) for f in ("SD15", "SDXL")),
        *(
            (f"Hyper-{f}-{n}steps-lora", f.lower(), "Hyper-SD", DETERMINISTIC[n], PLAIN)
            for f in ("SD15", "SDXL")
            for n in (2, 4, 8)
        ),
        ("sdxl_hyper_sd_4step_lora", "sdxl", "Hyper-SD", DETERMINISTIC[4], PLAIN),
        *((f"Hyper-{f}-8steps-CFG-lora", f.lower(), "Hyper-SD", DETERMINISTIC[8], KEPT) for f in ("SD15", "SDXL")),
        *((f"Hyper-{f}-12steps-CFG-lora", f.lower(), "Hyper-SD", TWELVE, KEPT) for f in ("SD15", "SDXL")),
        ("Hyper-SD3-4steps-CFG-lora", "sd3", "Hyper-SD", DETERMINISTIC[4], (3, 2, 4)),
        ("Hyper-SD3-8steps-CFG-lora", "sd3", "Hyper-SD", DETERMINISTIC[8], (5, 4, 6)),
        ("Hyper-SD3-16steps-CFG-lora", "sd3", "Hyper-SD", DETERMINISTIC[16], (7, 6, 8)),
        *((f"sdxl_lightning_{n}step_lora", "sdxl", "Lightning", DETERMINISTIC[n], PLAIN) for n in (2, 4, 8)),
        ("SDXL-Lightning-4steps", "sdxl", "Lightning", DETERMINISTIC[4], PLAIN),
        *((n, "sdxl", "DMD2", RENOISED, PLAIN) for n in ("dmd2_sdxl_4step_lora", "dmd2_sdxl_4step_lora_fp16")),
        ("flash-sd/pytorch_lora_weights", "sd15", "Flash Diffusion", RENOISED, PLAIN),
        ("FlashSDXL", "sdxl", "Flash Diffusion", RENOISED, PLAIN),
        ("flash-sd3/adapter_model", "sd3", "Flash Diffusion", RENOISED, PLAIN),
        *(
            (f"sd_xl_turbo_lora{n}", "sdxl", "Turbo", RENOISED, (1, 1, 2.5))
            for n in ("", "_v1", "_v1-64dim", "_v1-128dim", "_rank01")
        ),
        ("SDXL-turbo-LoRA/pytorch_lora_weights", "sdxl", "Turbo", RENOISED, (1, 1, 2.5)),
        *(
            (f"{n}_weights", "sdxl", "TDD", ("stochastic", 0.2, TRAILING[4]), (1.7, 1, 4))
            for n in ("sdxl_tdd_lora", "realvis_tdd_sdxl_lora")
        ),
    ],
)
def test_published_files_of_other_methods(name, family, method, sampled, cfg):
    recipe = known(name)
    mode, gamma, levels = sampled
    assert (recipe.family, recipe.method, recipe.mode, recipe.gamma) == (family, method, mode, gamma)
    # 12 and 16 steps are not whole timesteps apart: rounded up here, to even in diffusers
    assert len(timesteps(recipe)) == recipe.steps == len(levels)
    assert all(abs(a - b) <= (recipe.steps > 8) for a, b in zip(timesteps(recipe), levels, strict=True))
    assert (recipe.guidance, recipe.guidance_min, recipe.guidance_max) == cfg
    assert recipe.negative_prompts == ("CFG" in name) == (recipe.guidance_mode == "normalcfg")
    assert recipe.strength == (0.125 if "Hyper-SD3" in name else 1)
    assert (recipe.prediction, recipe.shift) == (("flow", 3.0) if family == "sd3" else ("epsilon", None))
    assert recipe.warnings(recipe.steps, recipe.guidance, family) == []


@pytest.mark.parametrize(
    ("name", "published"),
    [
        *((n, "lcm-lora-sdxl") for n in ("lcmlorasdxl", "lcm sdxl", "SDXL_LCM_rank64_fp16", "sdxl lcm-lora mine")),
        *((n, "lcm-lora-sdv1-5") for n in ("lcm_sd15", "LCM-SDv1.5", "sd15-lcm-v2")),
        *((n, "TCD-SDXL-LoRA") for n in ("sdxl_tcd_fp16", "mine_TCD-SDXL-LoRA")),
        *(
            (n, "sdxl_lightning_4step_lora")
            for n in ("sdxl_4step_lightning", "SDXL_lightning_lora_4steps_rank64", "mine_sdxl_lightning_4step")
        ),
    ],
)
def test_names_that_people_give_to_published_files(name, published):
    assert known(name) == known(published)


@pytest.mark.parametrize("slash", ["/", "\\"])
def test_files_in_the_hugging_face_cache_go_by_their_repository(slash):
    def cached(repository, file):
        return slash.join(("hub", f"models--{repository}", "snapshots", "a" * 40, file))

    assert known(cached("latent-consistency--lcm-lora-sdxl", "pytorch_lora_weights")) == known("lcm-lora-sdxl")
    assert known(cached("jasperai--flash-sd", "pytorch_lora_weights")) == known("flash-sd")
    assert known(cached("someone--mine", "lcm-lora-sdxl")) == known("lcm-lora-sdxl")
    assert recipe_for_file(cached("someone--mine", "pytorch_lora_weights.safetensors"), {}, "sdxl") is None


def test_the_files_own_family_wins_over_its_name():
    assert known("lcm-lora-sdv1-5") == recipe_for_file("lcm-lora-sdv1-5.safetensors", {}, "sd15")
    assert recipe_for_file("lcm.safetensors", {}, "sdxl") == known("lcm-lora-sdxl")
    assert recipe_for_file("lightning_4step_lora.safetensors", {}, "sdxl") == known("sdxl_lightning_4step_lora")
    assert recipe_for_file("Hyper-SD-8steps-CFG-lora.safetensors", {}, "sd3") == known("Hyper-SD3-8steps-CFG-lora")
    assert recipe_for_file("lcm-lora-sdv1-5.safetensors", {}, "sdxl") is None
    assert recipe_for_file("pcm_sd15_smallcfg_4step.safetensors", {}, "sdxl") is None
    assert recipe_for_file("lightning_4step_lora.safetensors", {}, "sd15") is None, "there is none for SD1.5"


def test_what_burns_and_what_takes_any_number_of_steps_is_told():
    assert known("lcm-lora-sdxl").warnings(steps=7, guidance=7.0) == [
        "CFG 7 is above 2 and burns the image: set CFG to 1."
    ]
    assert known("Hyper-SDXL-8steps-CFG-lora").warnings(steps=4, guidance=1.0) == [
        "This LoRA was made for 8 steps, not 4: set steps to 8.",
        "CFG 1 is below 5 and leaves the negative prompt unused: set CFG to 5.",
    ]
    with pytest.raises(ValueError, match="steps must be between 1 and 50"):
        known("TCD-SDXL-LoRA").grid().plan(51)


@pytest.mark.parametrize("folder", ["", "sd15/", "PCM\\SD15\\", "C:\\models\\loras\\", "/models/loras/"])
def test_a_known_file_is_known_in_any_folder(folder):
    recipe = recipe_for_file(folder + "PCM_SD15_smallcfg_4step_converted.safetensors", {})
    assert recipe == known("pcm_sd15_smallcfg_4step_converted")


@pytest.mark.parametrize(
    "name",
    [
        *("", "my_style", "pcm_sd15_smallcfg_3step", "pcm_sd15_smallcfg_4step\\style", "lcm-lora-sdxl/style"),
        *(
            "hyper_realistic_sdxl",
            "flash_photography_sdxl",
            "lightning_strikes_sdxl",
            "dmd_sdxl",
            "AnimateLCM_sd15_lora",
        ),
        *("Hyper-SDXL-3steps-lora", "Hyper-SDXL-12steps-lora", "Hyper-SD21-8steps-lora"),
        *("sdxl_lightning_1step_x0", "sdxl_lightning_16step_lora", "Hyper-SD15-4steps-CFG-lora"),
        # other models' files of the same methods, and files of no family
        *("Hyper-FLUX.1-dev-4steps-lora", "Qwen-Image-Lightning-3steps-V1.0", "Wan2.2-Lightning_T2V-4steps-lora"),
        *("lcm_lora", "tcd", "lightning_4step_lora", "pytorch_lora_weights"),
        # styles and the like with a method's name in theirs
        *(f"sdxl_{method}_style_watercolor" for method in ("lcm", "tcd", "turbo")),
        # not the accelerator itself: a style made on it, another training of it, and a car
        *("sdxl_turbo_lora_GoldenDragonBlossoms", "sd_xl_dpo_turbo_lora_v1-128dim", "turbo_lora_v1", "sd_turbo_lora"),
        *("lightning_strikes_8step_tutorial_sdxl", "8step_lightning_strikes_sdxl", "sdxl_lightning_style_4"),
    ],
)
def test_unknown_files_have_no_recipe(name):
    assert recipe_for_file(f"{name}.safetensors", {}) is None


@pytest.mark.parametrize("key", ["ss_output_name", "modelspec.title"])
def test_a_renamed_file_is_known_by_the_title_in_its_header(key):
    by_title = recipe_for_file("fast.safetensors", {key: "sd_xl_turbo_lora_v1"}, "sdxl")
    assert by_title == replace(known("sd_xl_turbo_lora_v1"), source="known title")
    assert recipe_for_file("fast.safetensors", {key: "sd_xl_turbo_lora_v1"}, "sd15") is None
    assert recipe_for_file("fast.safetensors", {key: "My LCM style", "ss_sd_model_name": "sd_xl_turbo_1.0"}) is None
    named = recipe_for_file("lcm-lora-sdxl.safetensors", {key: "sd_xl_turbo_lora_v1"}, "sdxl")
    assert named == known("lcm-lora-sdxl"), "the name that people see comes first"


STYLES = ("pony_char_dmd2_v3", "flash sdxl comic style", "lcm lora watercolor", "neon lightning 4step look")


@pytest.mark.parametrize("style", STYLES)
def test_a_style_that_names_a_method_is_known_by_its_own_name_alone(style):
    """Which may be a file of that method, or made for one: no ground to say that two are loaded."""
    assert recipe_for_file(f"{style}.safetensors", {}, "sdxl") is not None
    assert recipe_for_file(f"{style}.safetensors", {}, "sdxl", certain=True) is None
    assert recipe_for_file("fast.safetensors", {"ss_output_name": style}, "sdxl") is None


@pytest.mark.parametrize(
    "name",
    [
        *(
            "lcm-lora-sdv1-5",
            "lcm-lora-ssd-1b",
            "LCM_LoRA_Weights_SDXL",
            "TCD-SD21-base-LoRA",
            "half_pdm_stochastic_shift3",
        ),
        *(
            "Hyper-SDXL-1step-lora",
            "Hyper-SD15-8steps-CFG-lora",
            "Hyper-SD3-4steps-CFG-lora",
            "sdxl_lightning_4step_lora",
        ),
        *(
            "dmd2_sdxl_4step_lora_fp16",
            "FlashSDXL",
            "flash-sd3",
            "sd_xl_turbo_lora_v1-64dim",
            "sdxl_hyper_sd_4step_lora",
        ),
        *("pcm_sd15_normalcfg_8step_converted", "pcm_sdxl_lcmlike_lora", "pcm_deterministic_4step_shift3"),
    ],
)
def test_a_published_name_is_certain(name):
    assert recipe_for_file(f"{name}.safetensors", {}, certain=True) == known(name)


def test_the_header_wins_over_the_name():
    own = Recipe(family="sdxl", phases=2)
    got = recipe_for_file("pcm_sd15_smallcfg_4step_converted.safetensors", {HEADER_KEY: own.to_header()})
    assert got == replace(own, source="header")


METHODS = {  # (method, family) -> the steps that its files are made for
    ("PCM", "sd15"): [2, 4, 8, 16],
    ("PCM", "sd3"): [2, 4],
    ("PCM with CFG", "sdxl"): [4, 8, 16],
    ("Hyper-SD", "sdxl"): [1, 2, 4, 8],
    ("Hyper-SD with CFG", "sd15"): [8, 12],
    ("Hyper-SD with CFG", "sd3"): [4, 8, 16],
    ("Lightning", "sdxl"): [2, 4, 8],
}


@pytest.mark.parametrize(("method", "family"), METHODS)
def test_a_methods_recipe_is_that_of_its_files(method, family):
    counts = []
    for steps in range(1, 17):
        with suppress(ValueError):
            counts.append((steps, recipe_for_method(method, family, steps).steps))
    assert counts == [(steps, steps) for steps in METHODS[method, family]]


def test_a_method_of_any_number_of_steps_takes_the_one_that_is_wanted():
    assert recipe_for_method("LCM", "sd15", 6) == replace(known("lcm-lora-sdv1-5"), steps=6, source="method")
    assert recipe_for_method("Lightning", "sdxl", 8) == replace(known("sdxl_lightning_8step_lora"), source="method")
    assert {recipe_for_method(m, "sdxl", 8).method for m in METHOD_FILES} >= {"Turbo", "DMD2", "TCD", "Hyper-SD"}


def test_a_method_that_there_is_not_names_those_that_there_are():
    with pytest.raises(ValueError, match=r"Lightning for SDXL is known in 2, 4, 8 steps, not 3: take one of these"):
        recipe_for_method("Lightning", "sdxl", 3)
    with pytest.raises(ValueError, match=r"LCM is not known for SD3; known: PCM, PCM stochastic, Hyper-SD, "):
        recipe_for_method("LCM", "sd3", 4)


@pytest.mark.parametrize(
    ("name", "family", "objective", "steps"),
    [
        ("dreamshaperXL_lightningDPMSDE.safetensors", "sdxl", "lightning", 4),
        ("RealVisXL_V4.0_Lightning_5step.safetensors", "sdxl", "lightning", 4),
        ("juggernaut_lightning_8Steps.safetensors", "sdxl", "lightning", 8),
        ("sd_xl_turbo_1.0_fp16.safetensors", "sdxl", "turbo", 4),
        ("turbovisionxlSuperFastXLBasedOnNew_tvxlV431Bakedvae.safetensors", "sdxl", "turbo", 4),
        ("dmd2_sdxl_4step_unet_fp16.safetensors", "sdxl", "dmd2", 4),
        ("DreamShaper_8_LCM.safetensors", "sd15", "lcm", 4),
        ("Hyper-SDXL-1step-Unet.safetensors", "sdxl", "hyper", 1),
        ("SDXL_Flash.safetensors", "sdxl", "flash", 4),
        ("sdxl-flash-mini.safetensors", "sdxl", "flash", 4),
        ("photo-Hyper-SD-8steps-merge.safetensors", "sd15", "hyper", 8),
        # words that run on
        ("realisticVisionV60B1_v51HyperVAE.safetensors", "sd15", "hyper", 4),
        ("realisticVision_hyper-inpainting.safetensors", "sd15", "hyper", 4),
        ("dreamshaperXLHyper8Steps.safetensors", "sdxl", "hyper", 8),
        ("photonLCM_v10.safetensors", "sd15", "lcm", 4),
        ("photon_LCMv2.safetensors", "sd15", "lcm", 4),
        ("epicTCDVae.safetensors", "sd15", "tcd", 4),
        ("juggernautXL_juggXILightningByRD.safetensors", "sdxl", "lightning", 4),
    ],
)
def test_a_merged_or_distilled_checkpoint_is_known_by_its_name(name, family, objective, steps):
    recipe = recipe_for_checkpoint(name, {}, family)
    assert (recipe.objective, recipe.steps, recipe.family) == (objective, steps, family)
    assert few_step_source(name, {}, family) == recipe.source


@pytest.mark.parametrize(
    "name",
    [
        *("hyperrealism_v3", "dreamshaper_8", "flashback_v1", "v1-5-pruned-emaonly", "tcdiff", "TCDiff", "LCManga"),
        # the words of `test_unknown_files_have_no_recipe`, and others of the kind
        *("hyper_realistic_sdxl", "flash_photography_sdxl", "lightning_strikes_sdxl", "lightningStrike_xl"),
        *("hyper_realistic_v3", "Hyper-Realism_V3", "hyperRealism_v10", "hyper3d_style", "ultra hyper detailed"),
        *("flash_photography_xl", "Flash Gordon", "cameraFlashLook", "flash 80s"),
    ],
)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_plain_checkpoint_is_not_taken_for_one(name, family):
    assert recipe_for_checkpoint(f"{name}.safetensors", {}, family) is None
    assert few_step_source(f"{name}.ckpt", {}, family) is None


def test_what_tells_that_a_checkpoint_is_made_for_few_steps():
    assert few_step_source("mine.safetensors", {HEADER_KEY: "unreadable"}, "sd15") == "header"
    assert few_step_source("mine.safetensors", {"modelspec.title": "sd_xl_turbo_1.0"}, "sdxl") == "known title"
    assert few_step_source("dmd2_sdxl_4step_unet.safetensors", {}, "sdxl") == "known file"
    for name, family in (("sd_turbo", "sd2"), ("sd3.5_medium_turbo", "sd3")):
        assert few_step_source(f"{name}.safetensors", {}, family) == "method in a name", "though no recipe is known"
    assert few_step_source("lightningMix_sd15.safetensors", {}, "sd15") is None, "there is none for SD1.5"


def test_a_checkpoints_header_wins_over_its_name():
    recipe = Recipe(family="sdxl", phases=2)
    header = {HEADER_KEY: recipe.to_header()}
    assert recipe_for_checkpoint("x_lightning_4step.safetensors", header, "sdxl") == replace(recipe, source="header")
