"""Points of five dimensions, as a family for video has them: a step and a drawing are those of the same numbers in
four."""

import pytest
import torch

from phased_consistency.samplers import Recipe
from phased_consistency.trainer.families.generate import draw, sampling_model
from phased_consistency.trainer.objectives import OBJECTIVES, Levels
from phased_consistency.trainer.training.engine import Batch, Engine
from support.closed_form import FLOW, MEAN, NULL, SCHEDULES, Gaussian, StubBase, Switch, seeded

CLIP = (3, 2)  # frames, and rows of each; a picture has all of them below one another


class ClipBase(StubBase):
    """A base whose points are (B, C, T, h, w)."""

    def denoise(self, x, tick, condition):
        assert x.ndim == 5
        return super().denoise(x.flatten(2, 3), tick, condition).unflatten(2, CLIP)


def engine(base_class, schedule, prediction, objective):
    exact, switch = Gaussian(schedule), Switch()
    student = exact.landing(objective.grid().target)
    return Engine(base_class(schedule, prediction, switch, exact, student), switch, objective, NULL)


def batch(objective, shape):
    u = torch.tensor([700, 450])
    noise = [torch.randn(2, 4, 6, 2, generator=seeded(seed)).view(2, 4, *shape) for seed in (1, 2)]
    grid = objective.grid()
    levels = Levels(u, grid.previous(u), grid.target(u))
    return Batch(MEAN + noise[0], noise[1], levels, torch.tensor([3.0, 5.0]), {"hidden": torch.full((2, 1), MEAN)})


@SCHEDULES
@pytest.mark.parametrize("settings", [{"solver": name, "solver_steps": 2} for name in ("ddim", "heun", "dpm++")])
def test_a_step(schedule, prediction, settings):
    objective = OBJECTIVES["pcm"](points=40, phases=4, **settings)
    pair = [
        engine(base, schedule, prediction, objective).step(batch(objective, shape)).distance
        for base, shape in ((StubBase, (6, 2)), (ClipBase, (*CLIP, 2)))
    ]
    assert pair[0].min() > 0
    assert torch.allclose(*pair, rtol=1e-5, atol=0)


def test_a_drawing():
    base = ClipBase(FLOW, "flow", Switch(), Gaussian(FLOW), Gaussian(FLOW))
    flat = StubBase(FLOW, "flow", Switch(), Gaussian(FLOW), Gaussian(FLOW))
    noise, condition = torch.randn(2, 4, 6, 2, generator=seeded()), {"hidden": torch.full((2, 1), MEAN)}
    for guidance in (1.0, 2.0):
        models = [sampling_model(each, condition, NULL, guidance) for each in (flat, base)]
        sigma = torch.tensor([0.9, 0.5])
        x0, clip = models[0](noise, sigma), models[1](noise.unflatten(2, CLIP), sigma)
        assert torch.equal(x0, clip.flatten(2, 3))
    recipe = Recipe(family="wan2.1", prediction="flow", shift=3.0, timesteps=(1000, 600, 300), mode="stochastic")
    ticks = recipe.grid().plan(3).ticks
    drawn = draw(base, recipe, condition, NULL, noise.unflatten(2, CLIP), ticks, gamma=1.0, seed=1, guidance=1.0)
    assert drawn.shape == (2, 4, *CLIP, 2)
    assert drawn.isfinite().all()
