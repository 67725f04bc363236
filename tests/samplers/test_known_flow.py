"""Published files for transformers, by their names: the levels, strength and guidance of their authors."""

import math

import pytest

from phased_consistency.samplers import Recipe, recipe_for_file
from phased_consistency.samplers.known_files import (
    KNOWN_FILES,
    few_step_source,
    recipe_for_checkpoint,
    recipe_for_method,
)
from phased_consistency.samplers.known_flow import flux2_mu

SHIFT_3 = {4: (1, 0.9, 0.75, 0.5), 8: (1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3)}
WAN, FAST_WAN = (1, 0.9375, 0.8333, 0.625), (1, 0.757, 0.522)
HYPER_FLUX, FLUX2 = "Hyper-FLUX.1-dev-8steps-lora", "flux.2-turbo-lora"


def sigmas(recipe: Recipe) -> list[float]:
    levels = recipe.schedule().k_sigma(recipe.grid().plan(recipe.steps).ticks).tolist()
    assert levels.pop() == 0
    return levels


def known(name: str, **options) -> Recipe | None:
    return recipe_for_file(f"{name}.safetensors", {}, **options)


@pytest.mark.parametrize(
    ("name", "family", "levels", "strength"),
    [
        ("Qwen-Image-Lightning-4steps-V1.0-bf16", "qwen_image", SHIFT_3[4], 1),
        ("Qwen-Image-Lightning-8steps-V2.0", "qwen_image", SHIFT_3[8], 1),
        ("qwen_image_edit_2509_lightning_8steps", "qwen_image", SHIFT_3[8], 1),
        ("Z-Image-Fun-Lora-Distill-8-Steps-2602-ComfyUI", "lumina2", SHIFT_3[8], 0.8),
        ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32", "wan2.1", WAN, 1),
        ("lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16", "wan2.1", WAN, 1),
        ("wan2.1_t2v_14b_lora_rank64_lightx2v_4step", "wan2.1", WAN, 1),
        ("tdm_sd3_lora", "sd3", (1, 18 / 19, 6 / 7, 2 / 3), 0.125),
        ("FastWan2.1-T2V-1.3B_lora", "wan2.1", FAST_WAN, 1),
        ("Wan2_2_5B_FastWanFullAttn_lora_rank_128_bf16", "wan2.1", FAST_WAN, 1),
        ("Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32", "wan2.1", FAST_WAN, 1),
        ("Wan21_CausVid_14B_T2V_lora_rank32", "wan2.1", (1, 0.96, 0.8889, 0.7273), 0.7),
        ("anima-turbo-lora-v0.2", "anima", SHIFT_3[8], 1),
    ],
)
def test_levels_and_strength(name, family, levels, strength):
    recipe = known(name)
    assert (recipe.family, recipe.strength, recipe.guidance) == (family, strength, 1)
    assert sigmas(recipe) == pytest.approx(levels, abs=1e-4)


@pytest.mark.parametrize(("steps", "size", "mu"), [(8, 1024, 1.15), (8, 256, 0.5), (16, 512, 0.63), (16, 2048, 3.23)])
def test_hyper_flux_follows_diffusers_mu(steps, size, mu):
    recipe = known(f"Hyper-FLUX.1-dev-{steps}steps-lora")
    assert (recipe.steps, recipe.strength, recipe.embedded_guidance) == (steps, 0.125, 3.5)
    expected = [math.exp(mu) / (math.exp(mu) + steps / (steps - i) - 1) for i in range(steps)]
    assert sigmas(recipe.at_size(size, size)) == pytest.approx(expected, abs=2e-3)


def test_flux2_turbo_is_shifted_as_diffusers_does():
    """The numbers are times: set_timesteps(sigmas=..., mu=...) shifts them."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    recipe = known(FLUX2)
    for width, height in ((1024, 1024), (512, 768), (2048, 1536)):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        mu = compute_empirical_mu(width // 16 * (height // 16), 8)
        scheduler.set_timesteps(sigmas=[time / 1000 for time in recipe.timesteps], mu=mu)
        assert sigmas(recipe.at_size(width, height)) == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-5)
    assert sigmas(recipe) == pytest.approx(sigmas(recipe.at_size(1024, 1024)), abs=1e-6)


@pytest.mark.parametrize("steps", [4, 10, 50, 200])
def test_flux2s_mu_is_diffusers(steps):
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    from phased_consistency.samplers.given_levels import mu_at

    for positions in (0, 256, 4096, 4300, 4301, 9000, 16384):
        assert mu_at(positions, flux2_mu(steps)) == pytest.approx(compute_empirical_mu(positions, steps), abs=1e-9)


def test_ltx2s_sigmas_are_diffusers():
    from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES

    recipe = known("ltx-2-19b-distilled-lora-384")
    assert (recipe.family, recipe.sigmas) == ("ltxav", tuple(DISTILLED_SIGMA_VALUES))
    assert sigmas(recipe) == pytest.approx(DISTILLED_SIGMA_VALUES, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expert", "boundary"),
    [
        ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise", "high", 0.875),
        ("wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise", "low", 0.9),
        ("Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16", "high", 0.875),
        ("wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022", "high", 0.9),
        ("Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1/low_noise_model", "low", 0.875),
        ("loras\\Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1\\high_noise_model", "high", 0.9),
    ],
)
def test_wan_lightnings_experts(name, expert, boundary):
    recipe = known(name)
    assert (recipe.family, recipe.expert, recipe.boundary, recipe.shift) == ("wan2.1", expert, boundary, 5)
    assert (recipe.mode, recipe.steps) == ("deterministic", 4)
    assert sigmas(recipe) == pytest.approx(WAN, abs=1e-4)


@pytest.mark.parametrize(
    "name", ["causal_forcing-framewise", "CausVid_autoregressive_checkpoint", "SenseFlow-SD35L", "Phantom-Wan-14B"]
)
def test_files_whose_settings_no_row_can_have(name):
    """They are sampled frame by frame, or no source that was read tells how, or they are made for 50 steps."""
    assert known(name, whole=True) is None


def test_dreamshapers_tdm_has_dpm_solvers_levels():
    from diffusers import DPMSolverMultistepScheduler

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DPMSolverMultistepScheduler(**betas, steps_offset=1)
    scheduler.set_timesteps(4)
    recipe = known("tdm_dreamshaper_lora", family="sd15")
    assert (recipe.timesteps, recipe.steps, recipe.guidance) == (tuple(scheduler.timesteps.tolist()), 4, 1)
    assert sigmas(recipe) == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-4)
    assert known("tdm_dreamshaper_lora", family="sdxl") is None


@pytest.mark.parametrize("name", ["Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32", "FastWan2.1-T2V-1.3B_lora"])
def test_wan21s_puts_fresh_noise_on_each_level(name):
    recipe = known(name)
    assert (recipe.mode, recipe.gamma, recipe.expert, recipe.boundary) == ("stochastic", 1, "", None)


@pytest.mark.parametrize(
    ("name", "guidance", "strength"),
    [
        (HYPER_FLUX, 3.5, 0.125),
        ("FLUX.1-Turbo-Alpha", 3.5, 1),
        ("flux_turbo_alpha", 3.5, 1),
        ("FLUX.1-dev_tdd_adv_lora_weights", 2.0, 0.125),
        (FLUX2, 2.5, 1),
        ("Flux_2-Turbo-LoRA_comfyui", 2.5, 1),
        ("Flux2TurboComfyv2", 2.5, 1),
    ],
)
def test_guidance_that_the_network_takes(name, guidance, strength):
    recipe = known(name)
    assert (recipe.embedded_guidance, recipe.strength, recipe.steps) == (guidance, strength, 8)
    assert recipe.warnings(8, 3.5)[0].startswith("CFG 3.5 is above 1 and burns the image")


@pytest.mark.parametrize(
    ("name", "family", "steps"),
    [
        ("flux1-schnell-fp8", "flux", 4),
        ("flux-2-klein-4b-fp8", "flux2", 4),
        ("z_image_turbo_bf16", "lumina2", 8),
        ("ltx-2-19b-distilled-fp8", "ltxav", 8),
        ("sd3.5_large_turbo", "sd3", 4),
        ("krea2_turbo_fp8_scaled", "krea2", 8),
        ("hidream_i1_dev_bf16", "hidream", 28),
        ("hidream_i1_fast_fp8", "hidream", 16),
    ],
)
def test_distilled_models(name, family, steps):
    recipe = recipe_for_checkpoint(f"{name}.safetensors", {}, family)
    assert (recipe.family, recipe.steps, recipe.guidance) == (family, steps, 1)
    assert few_step_source(f"{name}.safetensors", {}, family) == "known file"


@pytest.mark.parametrize(("kind", "steps", "shift"), [("dev", 28, 6), ("fast", 16, 3)])
def test_hidreams_levels_are_its_schedulers(kind, steps, shift):
    """By the formula of diffusers' scheduler, which is HiDream's: times down to the least level, shifted again."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    recipe = recipe_for_checkpoint(f"hidream_i1_{kind}_fp8.safetensors", {}, "hidream")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    assert sigmas(recipe) == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-5)
    assert (recipe.mode, recipe.gamma, recipe.shift) == ("stochastic", 1, shift)
    assert recipe.warnings(steps, 1.0) == []


def test_krea2_turbo_has_one_shift_at_every_size():
    recipe = recipe_for_checkpoint("krea2_turbo_bf16.safetensors", {}, "krea2")
    assert sigmas(recipe.at_size(2048, 2048)) == sigmas(recipe)
    assert sigmas(recipe)[4] == pytest.approx(math.exp(1.15) / (math.exp(1.15) + 1), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("flux1-dev", "flux"),
        ("hidream_i1_full_fp8", "hidream"),
        ("krea2_raw_bf16", "krea2"),
        ("flux-2-klein-base-9b", "flux2"),
        ("wan2.2_t2v_low_noise_14B", "wan2.1"),
    ],
)
def test_plain_models(name, family):
    assert recipe_for_checkpoint(f"{name}.safetensors", {}, family) is None


@pytest.mark.parametrize(
    "name",
    [
        "z_image_turbo_childrens_drawings",  # a style's, made on a distilled model
        "flux1_schnell_style",
        "flux_realism_lora",
        "wan2.2_t2v_high_noise_style",
        "qwen_image_4steps_comic",
        "lightning_bolt_flux",
    ],
)
def test_styles_are_no_speed_loras(name):
    assert known(name) is None


def test_published_names_are_certain_and_styles_of_them_are_not():
    assert known("Qwen-Image-Lightning-8steps-V2.0", certain=True)
    assert known("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise", certain=True)
    assert known("my_comic_qwen_lightning_4steps", certain=True) is None


def test_the_family_of_the_model_tells_where_the_name_does_not():
    assert known("turbo alpha flux", family="flux") is None
    assert known("wan2.2_t2v_lightx2v_4steps_high", family="flux") is None
    assert known("lightning_4step", family="qwen_image") is None  # SDXL's, of which the name tells nothing


@pytest.mark.parametrize(
    ("method", "family", "steps", "objective"),
    [
        ("Lightning", "qwen_image", 8, "lightning"),
        ("Hyper-SD", "flux", 16, "hyper"),
        ("Turbo", "flux", 8, "turbo"),
        ("Turbo", "flux2", 8, "turbo"),
        ("Turbo", "anima", 8, "turbo"),
    ],
)
def test_methods_have_recipes_for_transformers(method, family, steps, objective):
    recipe = recipe_for_method(method, family, steps)
    assert (recipe.objective, recipe.family, recipe.steps, recipe.source) == (objective, family, steps, "method")


def test_a_method_in_other_steps_says_which_there_are():
    with pytest.raises(ValueError, match="Turbo for FLUX.1 is known in 8 steps, not 4: take one of these"):
        recipe_for_method("Turbo", "flux", 4)
    with pytest.raises(ValueError, match="LCM is not known for Wan; known: none. Take one of these, or set the recipe"):
        recipe_for_method("LCM", "wan2.1", 4)


def test_every_row_says_where_its_settings_are_published():
    assert all(kind.address.startswith("https://") for kind in KNOWN_FILES)
