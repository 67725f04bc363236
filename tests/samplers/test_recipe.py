"""Recipes: what they refuse and say, and through a header and back."""

import itertools
import json
from dataclasses import asdict, replace

import pytest
from samplers.test_known_files import known

from phased_consistency.samplers import Recipe, normalcfg_guidance, recipe_for_file
from phased_consistency.samplers.recipe import HEADER_KEY


def test_header_round_trip():
    kinds = ({"prediction": "epsilon"}, {"prediction": "v_prediction", "zero_terminal_snr": True})
    flow = {"prediction": "flow", "shift": 2.5, "points": 100}
    for kind, mode, (phases, steps), family in itertools.product(
        (*kinds, flow), ("deterministic", "stochastic"), ((1, None), (4, 6), (8, None)), ("sd15", "sd2", "sdxl", "sd3")
    ):
        recipe = Recipe(
            family=family,
            mode=mode,
            gamma=0.3 if mode == "stochastic" else None,
            phases=phases,
            steps=steps,
            objective="lcm",
            min_alpha=0.5 if kind["prediction"] == "epsilon" and phases == 1 else 0.0,
            guidance_mode="normalcfg",
            guidance=1.5,
            guidance_max=7.25,
            negative_prompts=True,
            strength=0.8,
            sampling_points=50,
            sampling_from_noise=True,
            base_name="Künstler-Mix «v2»",
            base_hash="ab" * 32,
            **kind,
        )
        assert Recipe.from_header(recipe.to_header()) == replace(recipe, source="header")
        assert "source" not in json.loads(recipe.to_header())


def test_unknown_fields_are_ignored():
    header = json.loads(Recipe(family="sd15").to_header()) | {"solver_of_the_future": "x", "source": "me"}
    assert Recipe.from_header(json.dumps(header)) == Recipe(family="sd15", source="header")


def test_a_header_of_a_later_version_is_refused():
    """Its version is raised only where those who do not know it would sample at other levels."""
    header = json.loads(Recipe(family="sd15").to_header()) | {"version": 7}
    with pytest.raises(ValueError, match=r"cannot be read \(its version is 7, .* up to 2: update the pack\)"):
        Recipe.from_header(json.dumps(header))


def test_headers_without_the_newer_fields_are_read():
    header = json.loads(Recipe(family="sd15").to_header())
    del header["min_alpha"], header["guidance_mode"]
    assert Recipe.from_header(json.dumps(header)) == Recipe(family="sd15", source="header")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"sd15"', "{}", '{"family": "sd15", "points": "many"}'])
def test_an_unreadable_header_is_an_error(text):
    with pytest.raises(ValueError, match="pcm.recipe header cannot be read .* or set the steps and mode by hand"):
        recipe_for_file("a.safetensors", {HEADER_KEY: text})


def test_all_problems_are_told_at_once():
    values = asdict(Recipe(family="sd15")) | {
        "family": "sd9",
        "mode": "random",
        "prediction": "x0",
        "guidance_mode": "largecfg",
        "shift": -1.0,
        "guidance": 9.0,
        "steps": 0,
        "strength": 0.0,
        "points": 48,
    }
    with pytest.raises(ValueError) as error:
        Recipe(**values)
    for problem in (
        "family is 'sd9'",
        "mode is 'random'",
        "prediction is 'x0'",
        "guidance_mode is 'largecfg'; available: smallcfg, normalcfg",
        "shift must be",
        "guidance 9 is outside",
    ):
        assert problem in str(error.value)
    for problem in (
        "flow models have a shift",
        "steps is 0",
        "strength is 0; above 0",
        "points = 48 does not divide 1000",
    ):
        assert str(error.value).count(problem) == 1


@pytest.mark.parametrize("kind", [{"prediction": "flow"}, {"prediction": "epsilon", "shift": 3.0}])
def test_shift_belongs_to_flow(kind):
    with pytest.raises(ValueError, match="flow models have a shift, others none"):
        Recipe(family="sd3", **kind)


def test_right_settings_have_no_warnings():
    recipe = known("pcm_sd15_normalcfg_4step_converted")
    assert recipe.warnings(steps=4, guidance=3.0, family="sd15") == []
    assert known("pcm_sd15_lcmlike_lora_converted").warnings(steps=7, guidance=1.0) == []


def test_wrong_settings_are_sentences():
    recipe = known("pcm_sd15_normalcfg_4step_converted")
    assert recipe.warnings(steps=20, guidance=8.0, family="sdxl") == [
        "This LoRA is for SD1.5, the model is SDXL: load a matching one.",
        "This LoRA was made for 4 steps, not 20: set steps to 4.",
        "CFG 8 is above 3.5 and burns the image: set CFG to 3.",
    ]
    assert recipe.warnings(steps=4, guidance=2.0) == ["CFG 2 is below 2.5: set CFG to 3."]
    assert recipe.warnings(steps=4, guidance=1.0) == [
        "CFG 1 is below 2.5 and leaves the negative prompt unused: set CFG to 3."
    ]


def test_more_steps_than_help_are_told():
    """Re-noising simplifies the more often it is done; what keeps some of the noise does not."""
    assert known("lcm-lora-sdxl").step_warnings(8) == []
    sentences = ["More than 8 steps make this LoRA's pictures plainer: set steps to 4."]
    assert known("lcm-lora-sdxl").step_warnings(9) == known("lcm-lora-sdxl").warnings(9, 1.0) == sentences
    assert known("TCD-SDXL-LoRA").step_warnings(20) == []
    assert known("Hyper-SDXL-12steps-CFG-lora").step_warnings(12) == []


# timesteps at which the host's schedulers sample SD1.5 and SDXL
SIMPLE, SGM_UNIFORM, LCM = [999, 749, 499, 249], [999, 750, 500, 250], [999, 759, 499, 259]
FOREIGN = {
    "normal": [999, 666, 333, 0],
    "ddim_uniform": [751, 501, 251, 1],
    "karras": [999, 687, 146, 0],
    "exponential": [999, 538, 52, 0],
    "beta": [999, 823, 500, 176],
    "linear_quadratic": [999, 997, 995, 944],
}


def has_levels(name: str, timesteps: list[int], end: tuple[int, ...] = (0,)) -> bool:
    return known(name).has_levels([t + 1 for t in timesteps] + list(end))


@pytest.mark.parametrize(
    ("name", "timesteps"),
    [
        *(("sdxl_lightning_4step_lora", levels) for levels in (SIMPLE, SGM_UNIFORM, SIMPLE[1:], SIMPLE[2:])),
        *(("lcm-lora-sdxl", levels) for levels in (LCM, SIMPLE, SGM_UNIFORM, LCM[1:], [999, 499])),
        ("dmd2_sdxl_4step_lora", SIMPLE),
        ("pcm_sd15_smallcfg_4step_converted", [999, 739, 499, 239]),  # as trained
        ("sdxl_lightning_4step_lora", [999, 874, 749, 624, 499, 374, 249, 124]),  # twice its steps, which is told
        ("sdxl_lightning_4step_lora", [999, 666, 333]),  # so are fewer
        ("Hyper-SDXL-1step-lora", [999]),
        # with a denoise: the tails of 8 steps, simple and sgm_uniform, of 13 and of 20
        *(("lcm-lora-sdxl", levels) for levels in ([499, 374, 249, 124], [500, 375, 250, 125], [307, 230, 153, 76])),
        ("lcm-lora-sdxl", [199, 149, 99, 49]),
        ("pcm_sd15_lcmlike_lora_converted", [499, 374, 249, 124]),
        ("lcm-lora-sdxl", [999, 759, 519, 279]),  # sgm_uniform on the 50 timesteps of ModelSamplingDiscrete (lcm)
    ],
)
def test_levels_that_a_lora_knows(name, timesteps):
    assert has_levels(name, timesteps)


def test_a_part_of_a_one_phase_loras_way_may_end_before_the_clean_end():
    assert has_levels("lcm-lora-sdxl", [999, 874, 749, 624, 499], end=(375,)), "5 of 8 steps"
    assert not has_levels("lcm-lora-sdxl", [999, 949, 689, 374, 146], end=(40,))


@pytest.mark.parametrize("name", ["Hyper-SD3-4steps-CFG-lora", "Hyper-SD3-8steps-CFG-lora"])
def test_levels_as_sgm_uniform_rounds_them_at_a_shift(name):
    """The host shifts where it ends once more, so that its levels are up to `shift` too high."""
    recipe = known(name)
    rounded = [1000 - (1000 - recipe.shift) * j / recipe.steps for j in range(recipe.steps)]
    assert recipe.has_levels([*rounded, 0])
    assert not recipe.has_levels([*(1000 - 980 * j / recipe.steps for j in range(recipe.steps)), 0])


@pytest.mark.parametrize(
    "name", ["sdxl_lightning_4step_lora", "lcm-lora-sdxl", "dmd2_sdxl_4step_lora", "pcm_sd15_lcmlike"]
)
@pytest.mark.parametrize("scheduler", FOREIGN)
def test_levels_that_no_few_step_lora_knows(name, scheduler):
    assert not has_levels(name, FOREIGN[scheduler])


def test_levels_between_those_of_a_lora_are_not_its_own():
    assert not has_levels("dmd2_sdxl_4step_lora", LCM) and not has_levels("sdxl_lightning_4step_lora", LCM)
    assert not has_levels("sdxl_lightning_4step_lora", [499, 374, 249, 124]), "half the way in twice the steps"
    assert has_levels("sdxl_lightning_4step_lora", [999, 749], end=(500,)), "the first half of the way"
    assert not known("lcm-lora-sdxl").has_levels([float("nan"), 0])


def test_zero_terminal_snr_is_in_the_hint():
    kind = {"prediction": "v_prediction", "zero_terminal_snr": True}
    assert "DDIM with trailing spacing (rescale_betas_zero_snr)," in Recipe(family="sdxl", **kind).usage_hint()
    assert "rescale" not in Recipe(family="sdxl").usage_hint()


def test_another_shift_than_the_recipes_is_a_sentence():
    recipe = known("pcm_deterministic_4step_shift1")
    assert recipe.warnings(steps=4, guidance=1.2, shift=1.0) == []
    assert recipe.warnings(steps=4, guidance=1.2, shift=3.0) == [
        "Shift 3 is not used, the LoRA's is 1: remove the node that sets it."
    ]
    assert known("pcm_sd15_smallcfg_4step_converted").warnings(steps=4, guidance=1.0, shift=3.0) == []


@pytest.mark.parametrize(
    ("phases", "cfg"),
    [
        (1, (3, 2.5, 3.5)),
        (4, (3, 2.5, 3.5)),
        (7, (3, 2.5, 3.5)),
        (8, (4.5, 3, 6)),
        (10, (4.5, 3, 6)),
        (16, (5, 2, 9)),
        (40, (5, 2, 9)),
    ],
)
def test_normalcfg_guidance_is_the_published_row_at_or_below(phases, cfg):
    assert normalcfg_guidance(phases) == cfg


def test_one_phase_is_one_deterministic_step():
    recipe = Recipe(family="sd15", phases=1, min_alpha=0.5)
    assert (recipe.steps, recipe.grid().plan(recipe.steps).ticks) == (1, (1000, 0))
    assert recipe.warnings(steps=1, guidance=1.0) == []
    assert recipe.warnings(steps=4, guidance=1.0) == ["This LoRA was made for 1 step, not 4: set steps to 1."]
    assert recipe.usage_hint() == (
        "1 step, CFG 1 (1 to 2), LoRA strength 1; only with the PCM nodes, which divide by at least 0.5 "
        "where others do by alpha. SD1.5 only."
    )


@pytest.mark.parametrize(
    "kind",
    [{"phases": 4}, {"phases": 1, "prediction": "v_prediction"}, {"phases": 1, "prediction": "flow", "shift": 3.0}],
)
def test_a_clamp_belongs_to_one_phase_of_epsilon(kind):
    with pytest.raises(ValueError, match="min_alpha is 0.5 with .* it is for 'epsilon' and 1 phase, else 0"):
        Recipe(family="sdxl", min_alpha=0.5, **kind)


@pytest.mark.parametrize("min_alpha", [-0.1, 1.0, float("nan")])
def test_a_clamp_outside_its_range_is_an_error(min_alpha):
    with pytest.raises(ValueError, match=r"min_alpha is \S+; at least 0 \(no clamp\) and below 1"):
        Recipe(family="sd15", phases=1, min_alpha=min_alpha)


@pytest.mark.parametrize(
    ("name", "host", "diffusers"),
    [
        ("pcm_sd15_smallcfg_4step_converted", "euler + simple", "DDIM with trailing spacing"),
        ("pcm_sd15_lcmlike_lora_converted", "lcm + simple", "diffusers LCM"),
        ("pcm_deterministic_4step_shift3", "euler + simple", "FlowMatchEulerDiscrete"),
        ("pcm_stochastic_shift3", "lcm + simple", "FlowMatchLCM"),
        ("sdxl_lightning_4step_lora", "euler + simple,", "DDIM with trailing spacing"),
        ("lcm-lora-sdxl", "lcm + simple after ModelSamplingDiscrete (lcm)", "diffusers LCM,"),
        ("dmd2_sdxl_4step_lora", "lcm + simple,", "LCM at timesteps=[999, 749, 499, 249]"),
        ("TCD-SD15-LoRA", "", "1 (1 to 2), LoRA strength 1; diffusers TCD with eta 0.3, or the PCM nodes"),
        ("Hyper-SD3-4steps-CFG-lora", "LoRA strength 0.125", "FlowMatchEulerDiscrete at sigmas=[1, 0.75, 0.5, 0.25]"),
    ],
)
def test_usage_hint_names_the_settings(name, host, diffusers):
    recipe = known(name)
    hint = recipe.usage_hint()
    assert hint.startswith(f"{recipe.steps} steps") and host in hint and diffusers in hint
    assert f"CFG {recipe.guidance:g} (" in hint and ("shift 3" in hint) == (recipe.family == "sd3")


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("phases", [2, 4, 8, 16])
@pytest.mark.parametrize("points", [40, 50, 100, 200])
def test_a_scheduler_is_named_only_where_its_levels_fit(family, phases, points):
    """Other programs space theirs evenly: 8 phases of 100 points have edges at 870 and 620, of 200 at 875 and 625."""
    flow = {"prediction": "flow", "shift": 3.0} if family == "sd3" else {}
    recipe = Recipe(family=family, points=points, phases=phases, **flow)
    edges = recipe.grid().edges
    even = all(abs(edge - 1000 * m / phases) <= 3 for m, edge in enumerate(edges))
    hint = recipe.usage_hint()
    assert ("euler + simple" in hint) == even and "PCM nodes" in hint
    assert ("DDIM" in hint) == (even and family == "sd15")
    assert even or points % phases


@pytest.mark.parametrize(("mode", "gamma"), [("deterministic", 0.0), ("stochastic", 1.0)])
def test_the_mode_tells_gamma_where_nothing_else_does(mode, gamma):
    recipe = Recipe(family="sd15", mode=mode)
    assert (recipe.gamma, recipe.mode_text) == (gamma, mode)
    old = json.loads(recipe.to_header())
    assert old.pop("gamma") == gamma
    assert Recipe.from_header(json.dumps(old)) == replace(recipe, source="header")


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_gamma_outside_its_range_is_an_error(gamma):
    with pytest.raises(ValueError, match=r"gamma is \S+; between 0 \(no noise is fresh\) and 1"):
        Recipe(family="sd15", mode="stochastic", gamma=gamma)


def test_no_gamma_in_deterministic_mode():
    assert Recipe(family="sd15", gamma=0.0) == Recipe(family="sd15")
    with pytest.raises(ValueError, match="gamma is 0.3 with mode 'deterministic', which takes no fresh noise: 0 there"):
        Recipe(family="sd15", gamma=0.3)
