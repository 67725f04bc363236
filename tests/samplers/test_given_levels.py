"""Recipes whose levels are given one by one, or by the size of a picture, and those of two experts."""

import json
import math
from dataclasses import replace

import pytest
import torch

from phased_consistency.samplers import FlowSchedule, PhaseGrid, Recipe

FLOW = {"family": "flux2", "prediction": "flow", "shift": 3.0, "points": 100}
SIGMAS = (1.0, 0.65, 0.44, 0.29, 0.19, 0.11, 0.05, 0.0003)


def sigmas_of(recipe: Recipe, steps: int | None = None, denoise: float = 1.0) -> list[float]:
    return recipe.schedule().k_sigma(recipe.grid().plan(steps or recipe.steps, denoise).ticks).tolist()


@pytest.mark.parametrize("shift", [1.0, 3.0, math.exp(2.02)])
@pytest.mark.parametrize("mode", ["deterministic", "stochastic"])
def test_sigmas_are_sampled_at_whatever_the_shift(shift, mode):
    recipe = Recipe(**FLOW | {"shift": shift}, sigmas=SIGMAS, mode=mode)
    assert sigmas_of(recipe) == pytest.approx([*SIGMAS, 0], abs=1e-7)
    assert (recipe.phases, recipe.steps) == (8, 8)
    assert recipe.step_warnings(4) == ["This LoRA was made for 8 steps, not 4: set steps to 8."]


def test_timesteps_of_a_flow_model_are_shifted():
    """As in Wan 2.2 Lightning: 1000, 750, 500, 250 at shift 5."""
    recipe = Recipe(**FLOW | {"family": "wan2.1", "shift": 5.0}, timesteps=(1000, 750, 500, 250))
    assert sigmas_of(recipe) == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0], abs=1e-6)
    assert sigmas_of(recipe) == pytest.approx(sigmas_of(Recipe(**FLOW | {"shift": 5.0}, phases=4)), abs=1e-6)


def test_timesteps_of_other_models_are_the_networks():
    """DMD2's 999, 749, 499, 249 are the levels of trailing spacing, ticks one above."""
    given = Recipe(family="sdxl", mode="stochastic", timesteps=(999, 749, 499, 249))
    assert given.grid().plan(4).ticks == (1000, 750, 500, 250, 0)
    assert Recipe(family="sdxl", timesteps=(999, 0)).grid().edges == (0, 1, 1000)


def test_k_sigmas_of_other_models():
    recipe = Recipe(family="sdxl", sigmas=(14.6, 2.9, 0.5))
    assert sigmas_of(recipe) == pytest.approx([14.6, 2.9, 0.5, 0], rel=1e-5)


def test_more_fewer_and_a_part_of_the_steps():
    recipe = Recipe(**FLOW, timesteps=(1000, 600, 500))
    plan = recipe.grid().plan
    assert plan(6).ticks == (1000, 800, 600, 550, 500, 250, 0)
    assert plan(2).ticks == (1000, 600, 0)
    assert plan(1).ticks == (1000, 0)
    assert plan(3, 0.55).ticks == (600, 500, 0)
    assert plan(3, 0.55).notes == ("denoise 0.55 starts at the nearest phase edge, which is 0.6: 2 of 3 steps.",)


def test_levels_may_begin_below_pure_noise():
    """As those of a second pass do, which is given what the first has drawn."""
    recipe = Recipe(**FLOW | {"shift": 1.0}, sigmas=(0.909375, 0.725, 0.421875))
    plan = recipe.grid().plan(3)
    assert (plan.denoise, plan.notes) == (pytest.approx(0.909375), ())


def test_a_grid_at_given_edges_maps_as_any():
    """Training asks the same object: from (edge below, edge] to the edge below."""
    grid = PhaseGrid(points=100, phases=3, at=(1000, 600.5, 500))
    assert grid.target(torch.tensor([10, 500, 510, 600, 610, 1000])).tolist() == [0, 0, 500, 500, 600.5, 600.5]
    with pytest.raises(ValueError, match="the levels 1000, 1000 are no edges of 2 phases"):
        PhaseGrid(points=100, phases=2, at=(1000, 1000))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"sigmas": (1, 0.5), "timesteps": (1000, 500)}, "timesteps and sigmas are given; one of them"),
        ({"sigmas": (0.5, 1)}, "sigmas are 0.5, 1; they have to fall from 1 at most to above 0, without the clean end"),
        ({"sigmas": (1.2, 0.5)}, "fall from 1 at most"),
        ({"sigmas": (1, 0)}, "without the clean end"),
        ({"sigmas": (1, math.nan)}, "expected a list of numbers"),
        ({"sigmas": ()}, "expected a list of numbers"),
        ({"sigmas": 0.5}, "sigmas is 0.5; expected a list of numbers"),
        ({"sigmas": ("1", 0.5)}, "expected a list of numbers"),
        ({"sigmas": tuple(1 / n for n in range(1, 150))}, "100 at most"),
        ({"timesteps": (1001, 500)}, "timesteps are 1001, 500; they have to fall from 1000 at most"),
        ({"timesteps": (1000, 500), "sampling_points": 50}, "sampling_points is 50 beside levels that are given"),
        ({"mu_by_size": ((256, 0.5),)}, r"mu_by_size has the sizes \[256\]; two or more that rise"),
        ({"mu_by_size": ((4096, 0.5), (256, 1.15))}, "two or more that rise"),
        ({"mu_by_size": ((256, 0.5, 1), (4096, 1.15, 1))}, "expected a list of pairs"),
        ({"mu_by_size": (256, 0.5)}, "expected a list of pairs"),
        ({"boundary": 1.5}, "boundary is 1.5; a noise level of a flow model between 0 and 1"),
        ({"expert": "middle"}, "expert is 'middle'; available: high, low"),
        ({"embedded_guidance": -1.0}, "embedded_guidance is -1; 0 or more"),
        ({"family": "Ein Modell"}, "family is 'Ein Modell'; available: sd15, .* name of the network"),
    ],
)
def test_levels_that_cannot_be_are_sentences(fields, problem):
    with pytest.raises(ValueError, match=f"Not a usable recipe: .*{problem}"):
        Recipe(**FLOW | fields)


@pytest.mark.parametrize("fields", [{"timesteps": (1000, 500)}, {"sigmas": (6000, 1)}, {"boundary": 0.5}])
def test_other_models_have_other_levels(fields):
    with pytest.raises(ValueError, match="fall from|boundary is"):
        Recipe(family="sd15", **fields)


def test_any_family_is_a_flow_model():
    assert Recipe(**FLOW | {"family": "tomorrows_model"}).usage_hint().endswith("tomorrows_model only.")
    with pytest.raises(ValueError, match="family is 'tomorrows_model'; available: sd15"):
        Recipe(family="tomorrows_model")


def test_a_shift_by_the_size_of_the_picture():
    """FLUX.1's: mu from 0.5 at 256 positions to 1.15 at 4096, on one line beyond both."""
    recipe = Recipe(**FLOW, mu_by_size=((256, 0.5), (4096, 1.15)))
    assert recipe.at_size(1024, 1024).shift == pytest.approx(math.exp(1.15))
    assert recipe.at_size(256, 256).shift == pytest.approx(math.exp(0.5))
    assert recipe.at_size(2048, 1024).shift == pytest.approx(math.exp(0.5 + 0.65 * (8192 - 256) / 3840))
    assert recipe.at_size(512, 512).at_size(64, 64) == recipe.at_size(512, 512)
    plain = Recipe(**FLOW)
    assert plain.at_size(64, 64) is plain


def test_a_broken_line_of_mu():
    recipe = Recipe(**FLOW, mu_by_size=((0, 0.0), (100, 1.0), (200, 1.0)))
    assert [math.log(recipe.at_size(16 * n, 16).shift) for n in (50, 100, 150, 300)] == pytest.approx([0.5, 1, 1, 1])


def test_a_shift_is_the_same_but_for_its_rounding():
    """ModelSamplingFlux takes mu, of which 1.1 is 3.004."""
    recipe = Recipe(**FLOW)
    assert recipe.warnings(4, 1.0, shift=math.exp(1.1)) == []
    assert recipe.warnings(4, 1.0, shift=3.16) == [
        "Shift 3.16 is not used, the LoRA's is 3: remove the node that sets it."
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"sigmas": SIGMAS},
        {"timesteps": (1000, 750.5, 500)},
        {"mu_by_size": ((256, 0.5), (4096, 1.15))},
        {"boundary": 0.875, "expert": "low"},
        {"embedded_guidance": 3.5},
    ],
)
def test_through_a_header_and_back(fields):
    """Only a header that earlier readers would misread has the later version."""
    recipe = Recipe(**FLOW, **fields)
    assert Recipe.from_header(recipe.to_header()) == replace(recipe, source="header")
    assert json.loads(recipe.to_header())["version"] == 2
    assert json.loads(Recipe(**FLOW).to_header())["version"] == 1
    assert hash(recipe) == hash(replace(recipe))


def test_the_sentence_tells_what_programs_need():
    recipe = Recipe(**FLOW | {"shift": 5.0}, timesteps=(1000, 750), boundary=0.9, embedded_guidance=3.5)
    hint = recipe.usage_hint()
    assert "shift 5, FluxGuidance 3.5, high-noise model down to sigma 0.9;" in hint
    assert "FlowMatchEulerDiscrete at sigmas=[1, 0.75]" in hint
    sized = Recipe(**FLOW, mu_by_size=((256, 0.5), (4096, 1.15)))
    assert "shift 3 at 1024 x 1024;" in sized.usage_hint()


def test_mu_and_shift_are_one_schedule():
    """exp(mu) / (exp(mu) + 1/u - 1) is the linear shift exp(mu)."""
    mu, u = 1.15, torch.linspace(0.01, 1, 50, dtype=torch.float64)
    exponential = math.exp(mu) / (math.exp(mu) + 1 / u - 1)
    assert torch.allclose(FlowSchedule(math.exp(mu)).k_sigma(1000 * u), exponential.float())
