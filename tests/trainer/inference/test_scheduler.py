"""`PCMScheduler` against the samplers that run in ComfyUI, and what diffusers asks of every scheduler."""

import logging
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

from phased_consistency.samplers import Recipe, recipe_for_file, sample_phased, seeded_noise, x0_eps_from_output
from phased_consistency.samplers.editing import noised
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.trainer.inference.scheduler import PCMScheduler

RECIPES = {
    "pcm": Recipe(family="sd15"),
    "pcm8": Recipe(family="sdxl", phases=8),
    "published": recipe_for_file("pcm_sd15_smallcfg_4step_converted.safetensors", {}),
    "lcm": recipe_for_file("lcm-lora-sdv1-5.safetensors", {}),
    "tcd": recipe_for_file("TCD-SDXL-LoRA.safetensors", {}),
    "one step": Recipe(family="sd15", phases=1, mode="stochastic", steps=1, min_alpha=0.5),
    "v": Recipe(family="sdxl", prediction="v_prediction", zero_terminal_snr=True),
    "sd3": Recipe(family="sd3", points=100, prediction="flow", shift=1.0),
    "sd3 fresh": recipe_for_file("pcm_stochastic_shift3.safetensors", {}),
}
ALL = pytest.mark.parametrize("name", RECIPES)
SHAPE = (2, 4, 8, 8)
PICTURE, NOISE = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(2))
WARNINGS = "phased_consistency.trainer.inference.scheduler"


def network(point, timestep):
    """Some function of all that a network is given."""
    return torch.sin(3 * point + float(timestep) / 250) + 0.1 * point.roll(1, -1)


def in_pipeline(scheduler, x, **step):
    """What a diffusers pipeline does with its scheduler, from these latents on."""
    for timestep in scheduler.timesteps:
        point = scheduler.scale_model_input(x, timestep)
        x = scheduler.step(network(point, timestep), timestep, x, **step).prev_sample
    return x


def by_sampler(recipe, ticks, start):
    """The same by `sample_phased`, with noise by seed 5."""
    schedule = recipe.schedule()

    def model(x, sigma, **_):
        tick = schedule.tick(sigma).round().long()
        point = x * schedule.k_scale(sigma).view(-1, 1, 1, 1)
        output = network(point, schedule.network_time(tick[0]))
        return x0_eps_from_output(output, point, schedule.alpha(tick), schedule.sigma(tick), recipe.prediction)[0]

    sigmas = schedule.k_sigma(torch.tensor(ticks))
    x = noised(start, NOISE, sigmas[0], schedule)
    settings = {"gamma": recipe.gamma, "min_alpha": recipe.min_alpha, "extra_args": {"seed": 5}}
    return sample_phased(model, x, sigmas, schedule=schedule, **settings)


@ALL
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_text_to_image_is_the_samplers_picture_bit_for_bit(name, steps):
    recipe = RECIPES[name]
    scheduler = PCMScheduler.from_recipe(recipe)
    scheduler.set_timesteps(steps)
    scheduler.set_noise_seed(5)
    drawn = in_pipeline(scheduler, NOISE * scheduler.init_noise_sigma)
    assert torch.equal(drawn, by_sampler(recipe, recipe.grid().plan(steps).ticks, torch.zeros(SHAPE)))


@ALL
@pytest.mark.parametrize("strength", [0.3, 0.65, 1.0])
def test_image_to_image_starts_where_the_nodes_do(name, strength):
    recipe = RECIPES[name]
    plan = recipe.grid().plan(4, strength)
    scheduler = PCMScheduler.from_recipe(recipe)
    scheduler.set_timesteps(4, strength=strength)
    scheduler.set_noise_seed(5)
    assert scheduler.num_inference_steps == len(scheduler.timesteps) == plan.steps
    noisy = scheduler.add_noise(PICTURE, NOISE, scheduler.timesteps[:1])
    assert torch.equal(in_pipeline(scheduler, noisy), by_sampler(recipe, plan.ticks, PICTURE))


def skipped(steps, strength, flow):
    """The steps that diffusers' pipelines for image to image leave out, as they count them."""
    if flow:
        return int(max(steps - min(steps * strength, steps), 0))
    return max(steps - min(int(steps * strength), steps), 0)


@ALL
def test_a_snapped_strength_brings_pipelines_to_the_nodes_start(name):
    recipe = RECIPES[name]
    grid, scheduler = recipe.grid(), PCMScheduler.from_recipe(recipe)
    for steps in range(1, 41):
        levels = grid.plan(steps).ticks
        for strength in (0.05, 0.2, 0.375, 0.5, 0.65, 0.8, 0.99, 1.0):
            share = scheduler.snapped_strength(strength, steps)
            assert 0 < share <= 1
            start = levels[skipped(steps, share, recipe.prediction == "flow")]
            wanted = grid.plan(steps, strength).ticks[0]
            assert start == min(levels[:-1], key=lambda tick: abs(tick - wanted)), (steps, strength)
            assert grid.phases == 1 or start in grid.edges


def test_a_start_between_the_trained_levels_is_said(caplog):
    scheduler = PCMScheduler()
    scheduler.set_timesteps(8)
    caplog.clear()
    for place in (0, 2, 4, 6):
        scheduler.set_begin_index(place)
    assert not caplog.records
    scheduler.set_begin_index(3)
    assert "starts at 0.625 of the noise" in caplog.text and "Pass strength=0.75" in caplog.text


def test_other_step_counts_than_the_lora_s_are_said(caplog):
    PCMScheduler().set_timesteps(4)
    assert not caplog.records
    PCMScheduler().set_timesteps(6)
    assert caplog.record_tuples == [
        (WARNINGS, logging.WARNING, "This LoRA was made for 4 steps, not 6: set steps to 4.")
    ]


def test_the_recipe_s_steps_are_the_default():
    scheduler = PCMScheduler.from_recipe(RECIPES["pcm8"])
    scheduler.set_timesteps()
    assert scheduler.timesteps.tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
    assert scheduler.timesteps.dtype == torch.int64


def test_timesteps_of_flow_models_are_shifted():
    scheduler = PCMScheduler.from_recipe(replace(RECIPES["sd3"], shift=3.0))
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 900, 750, 500])
    assert scheduler.init_noise_sigma == 1


def test_a_step_starts_anew_after_set_timesteps():
    scheduler = PCMScheduler()
    pictures = []
    for _ in range(2):
        scheduler.set_timesteps(4)
        pictures.append(in_pipeline(scheduler, NOISE))
    assert torch.equal(*pictures)


# --- noise


def test_noise_comes_from_the_generator_as_elsewhere_in_diffusers():
    scheduler = PCMScheduler.from_recipe(RECIPES["lcm"])

    def draw(seeds):
        scheduler.set_timesteps(4)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return in_pipeline(scheduler, NOISE, generator=generators if len(seeds) > 1 else generators[0])

    assert torch.equal(draw([1]), draw([1])) and not torch.equal(draw([1]), draw([2]))
    first, second = draw([1, 2]), draw([3, 2])
    assert torch.equal(first[1], second[1]) and not torch.equal(first[0], second[0])


def test_noise_by_a_seed_is_each_picture_s_own():
    scheduler = PCMScheduler.from_recipe(RECIPES["tcd"])
    scheduler.set_noise_seed(5)
    scheduler.set_timesteps(4)
    both = in_pipeline(scheduler, NOISE)
    scheduler.set_timesteps(4)
    assert torch.equal(in_pipeline(scheduler, NOISE[:1]), both[:1])


def test_the_last_step_takes_no_noise():
    scheduler = PCMScheduler.from_recipe(RECIPES["lcm"])
    scheduler.set_timesteps(1)
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    in_pipeline(scheduler, NOISE, generator=generator)
    assert torch.equal(generator.get_state(), state)


def test_added_noise_is_the_samplers_at_each_timestep():
    scheduler = PCMScheduler.from_recipe(RECIPES["sd3"])
    scheduler.set_timesteps(4)
    timesteps = scheduler.timesteps[[1, 3]]
    results = (
        scheduler.add_noise(PICTURE, NOISE, timesteps),
        scheduler.scale_noise(PICTURE, timesteps, NOISE),
    )
    for both in results:
        for i, place in enumerate((1, 3)):
            wanted = noised(PICTURE, NOISE, scheduler.sigmas[place], scheduler.schedule)
            assert torch.equal(both[i], wanted[i])


# --- what diffusers asks of every scheduler


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_keep_the_network_s_precision_and_shape(dtype):
    scheduler = PCMScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.scale_model_input(NOISE.to(dtype), scheduler.timesteps[0]).dtype == dtype
    output = scheduler.step(NOISE.to(dtype), scheduler.timesteps[0], NOISE.to(dtype))
    assert output.prev_sample.dtype == output.pred_original_sample.dtype == dtype
    assert output.prev_sample.shape == output.pred_original_sample.shape == SHAPE


def test_a_tuple_holds_what_the_output_does():
    outputs = []
    for as_object in (True, False):
        scheduler = PCMScheduler()
        scheduler.set_timesteps(2)
        outputs.append(scheduler.step(NOISE, scheduler.timesteps[0], PICTURE, return_dict=as_object))
    assert all(torch.equal(a, b) for a, b in zip(outputs[0].to_tuple(), outputs[1], strict=True))


@ALL
def test_a_saved_config_gives_the_same_scheduler(name, tmp_path):
    scheduler = PCMScheduler.from_recipe(RECIPES[name], shift=RECIPES[name].shift)
    scheduler.save_pretrained(tmp_path)
    for again in (PCMScheduler.from_pretrained(tmp_path), PCMScheduler.from_config(scheduler.config)):
        assert again.recipe == scheduler.recipe == RECIPES[name]
        assert torch.equal(again.sigmas, scheduler.sigmas)


def test_configs_go_to_other_schedulers_and_back():
    config = PCMScheduler.from_recipe(RECIPES["v"]).config
    euler = EulerDiscreteScheduler.from_config(config)
    assert (euler.config.prediction_type, euler.config.rescale_betas_zero_snr) == ("v_prediction", True)
    assert PCMScheduler.from_config(euler.config).recipe == RECIPES["v"]
    assert EulerDiscreteScheduler in PCMScheduler().compatibles


def test_a_config_of_a_later_version_can_be_read():
    assert PCMScheduler(recipe={"phases": 2, "from_the_future": 1}).recipe == Recipe(family="sd15", phases=2)


def test_betas_come_from_the_pipeline_s_scheduler():
    replaced = DDIMScheduler(beta_start=0.001, beta_end=0.01, beta_schedule="linear")
    scheduler = PCMScheduler.from_recipe(RECIPES["pcm"], replaced)
    theirs = EulerDiscreteScheduler.from_config(replaced.config).sigmas[:-1].flip(0).double()
    ours = scheduler.schedule.k_sigma(torch.arange(1, 1001)).double()
    assert torch.allclose(ours, theirs, rtol=1e-4)


# --- a LoRA's file


def lora_file(folder, name, **metadata):
    tensors = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 8, 1, 1),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.zeros(8, 2, 1, 1),
    }
    save_file(tensors, folder / name, metadata)
    return folder / name


def test_a_lora_s_header_says_it_all(tmp_path):
    recipe = Recipe(family="sd15", phases=2, points=50, guidance=1.5)
    scheduler = PCMScheduler.from_lora(lora_file(tmp_path, "mine.safetensors", **{HEADER_KEY: recipe.to_header()}))
    assert scheduler.recipe == replace(recipe, source="header")


def test_a_known_file_s_name_says_it_too(tmp_path):
    path = lora_file(tmp_path, "TCD-SD15-LoRA.safetensors")
    assert PCMScheduler.from_lora(str(path)).recipe.gamma == 0.3
    assert PCMScheduler.from_lora(path, gamma=0.0).recipe.gamma == 0


def test_a_plain_lora_is_refused(tmp_path):
    with pytest.raises(ValueError, match="style.safetensors has no recipe in its header, and is no known file"):
        PCMScheduler.from_lora(lora_file(tmp_path, "style.safetensors"))


# --- bad input


@pytest.mark.parametrize(
    ("name", "replaced", "words"),
    [
        ("pcm", DDIMScheduler(prediction_type="v_prediction"), "DDIMScheduler.* predicts v_prediction"),
        ("pcm", FlowMatchEulerDiscreteScheduler(), "predicts epsilon; .* predicts flow_prediction"),
        ("pcm", EDMEulerScheduler(), "EDMEulerScheduler: no few-step LoRA"),
        ("pcm", DDIMScheduler(num_train_timesteps=100), "num_train_timesteps is 100"),
        ("sd3", DDIMScheduler(), "predicts flow; .* predicts epsilon"),
    ],
)
def test_a_model_of_another_prediction_is_refused(name, replaced, words):
    with pytest.raises(ValueError, match=words):
        PCMScheduler.from_recipe(RECIPES[name], replaced)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_train_timesteps": 500}, "num_train_timesteps is 500; "),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas are given"),
        ({"prediction_type": "sample"}, "'sample'; available: epsilon, v_prediction, flow_prediction"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "available: 'scaled_linear', 'linear'"),
        ({"recipe": {"phases": 7, "points": 4}}, "phases must be between 1 and points = 4"),
    ],
)
def test_settings_that_no_recipe_has_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        PCMScheduler(**settings)


def test_a_wrong_use_gets_a_sentence(caplog):
    scheduler = PCMScheduler()
    with pytest.raises(ValueError, match="A recipe has no steps_count; available: .*steps"):
        PCMScheduler.from_recipe(RECIPES["pcm"], steps_count=3)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(NOISE, 999, NOISE)
    with pytest.raises(ValueError, match="between 1 and 40.*got 50. This LoRA is for num_inference_steps=4"):
        scheduler.set_timesteps(50)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="998 is none of this run's timesteps, 999, 749, 499, 249"):
        scheduler.step(NOISE, 998, NOISE)
    in_pipeline(scheduler, NOISE)
    with pytest.raises(ValueError, match="The run of 4 steps has ended"):
        scheduler.step(NOISE, scheduler.timesteps[-1], NOISE)


def test_an_input_that_was_not_scaled_is_said(caplog):
    scheduler = PCMScheduler()
    scheduler.set_timesteps(4)
    for timestep in scheduler.timesteps:
        scheduler.step(NOISE, timestep, NOISE)
    assert caplog.text.count("was not scaled by scale_model_input") == 1


def test_the_seed_is_that_of_the_nodes():
    """Whoever compares with `pcm sample` gives it the same number."""
    scheduler = PCMScheduler.from_recipe(RECIPES["lcm"])
    scheduler.set_noise_seed(5)
    scheduler.set_timesteps(2)
    step = scheduler.step(torch.zeros(SHAPE), scheduler.timesteps[0], torch.zeros(SHAPE))
    fresh = seeded_noise(NOISE, 5)(None, None)
    assert torch.allclose(step.prev_sample, fresh * scheduler.sigmas[1], atol=1e-5)
