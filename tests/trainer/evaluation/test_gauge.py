"""Settings on a gauge: the floor, the base without a LoRA, and how many pictures are enough."""

import pytest
import torch

from phased_consistency.samplers import Recipe
from phased_consistency.trainer.evaluation.contest import too_few
from phased_consistency.trainer.evaluation.contestants import Prompts
from phased_consistency.trainer.evaluation.features import latents
from phased_consistency.trainer.evaluation.gauge import Gauge, pictures_needed
from phased_consistency.trainer.evaluation.intervals import Figure
from phased_consistency.trainer.evaluation.judge import Judge
from phased_consistency.trainer.evaluation.setting import Setting
from phased_consistency.trainer.evaluation.trial import Trial
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.lora.install import installed
from support.runs import TINY

REFERENCE = Setting("teacher", 4, 3.0)


@pytest.fixture(scope="module")
def gauge():
    base = load_base(TINY)
    texts = [f"a {colour} star" for colour in ("red", "blue", "green", "pink", "white")]
    judge = Judge(base, [latents(base.device)], Prompts(texts, "a test"))
    return Gauge(base, judge, Trial.of(base, texts, seed=3, resolution=32), REFERENCE)


def test_no_two_sets_share_a_noise(gauge):
    noises = torch.stack([trial.noise for trial in gauge.trials]).flatten(0, 1).flatten(1)
    distances = torch.cdist(noises, noises) + 100 * torch.eye(len(noises))
    assert len(noises) == 20 and distances.min() > 3, "of noises of as many numbers, about sqrt(2 * D)"
    assert len({trial.seed for trial in gauge.trials}) == 4


def test_the_reference_is_measured_like_the_others(gauge):
    row = gauge.row(REFERENCE)
    assert row["paired_error"]["value"] == 0 and row["evaluations"] == 8
    space = row["spaces"]["latents"]
    assert space["kernel"]["low"] <= 0 <= space["kernel"]["high"]
    assert space["diversity_share"] == {"value": 1, "low": 1, "high": 1} and space["diversity"]["value"] > 0
    other = gauge.row(Setting("teacher", 1, 9.0))
    assert other["paired_error"]["low"] > 0


def test_an_untrained_setting_draws_as_its_lora_does_without_it(gauge, lora):
    """With the recipe's levels, CFG and noise between steps, and the same pictures whatever is installed."""
    setting, bare = (Setting("mine", 2, 1.0, untrained=untrained) for untrained in (False, True))
    with installed(lora, gauge.base) as recipe:
        trained, without = (gauge.sample(s, recipe).latents for s in (setting, bare))
        again = gauge.sample(setting, recipe).latents
    alone = gauge.sample(bare, recipe).latents
    assert torch.equal(without, alone) and not torch.equal(trained, alone)
    assert torch.equal(trained, again), "the adapter is on again afterwards"
    stochastic = Recipe(family="sd15", mode="stochastic", phases=1, points=50)
    assert bare.way(stochastic) != bare.way(recipe)
    assert not torch.equal(gauge.sample(bare, stochastic).latents, alone)


def test_whoever_draws_in_one_way_has_one_untrained_row(lora):
    recipe = Recipe(family="sd15", phases=4)
    bare = Setting("one", 4, 1.0, untrained=True)
    assert bare.way(recipe) == Setting("two", 4, 1.0, untrained=True).way(recipe)
    assert bare.way(recipe) == Setting("teacher", 4, 1.0).way(None), "the unguided teacher on the same levels"
    assert bare.way(recipe) != Setting("two", 4, 2.0, untrained=True).way(recipe)
    assert bare.who == "untrained, as one"


def test_the_gain_is_the_difference_of_two_kernel_distances(gauge):
    few, many = (gauge.sample(Setting("teacher", n, 3.0)) for n in (1, 3))
    distances = [gauge.figures(sample)["spaces"]["latents"]["kernel"]["value"] for sample in (few, many)]
    assert gauge.gain(many, few, "latents").value == pytest.approx(distances[0] - distances[1], rel=1e-6)
    assert gauge.gain(few, few, "latents") == Figure(0, 0, 0)


def test_pictures_that_are_not_finite_are_refused(gauge, monkeypatch):
    """Half precision overflows; a distance to them is none."""
    broken = torch.zeros(5, 4, 4, 4)
    broken[2, 0, 1, 1] = torch.nan
    monkeypatch.setattr(Trial, "latents", lambda *_: broken)
    with pytest.raises(ValueError, match="teacher, DDIM at 1 step: 2 of 10 pictures are not finite.*--dtype fp32"):
        gauge.sample(Setting("teacher", 1, 1.0))


@pytest.mark.parametrize(
    ("difference", "needed"),
    [(1.0, 64), (0.1, 64), (0.05, 130), (-0.05, 130), (0.001, 6400), (0.0123, 530)],
)
def test_pictures_that_are_needed(difference, needed):
    """The noise of equal sets of 64 is 0.01: a tenth of 0.1; it shrinks as one over their number."""
    assert pictures_needed(64, Figure(0.001, -0.01, 0.01), Figure(difference, 0, 0)) == needed


def test_too_few_pictures_are_said_with_the_number_that_is_enough():
    reference = {"spaces": {"latents": {"kernel": Figure(0.0, -0.01, 0.01).as_dict()}}}
    entry = {"space": "latents", "who": "mine", "untrained": "untrained, as mine"}
    enough = entry | {"steps": 8, "gain": Figure(0.5, 0.4, 0.6).as_dict()}
    short = entry | {"steps": 4, "gain": Figure(0.05, 0.04, 0.06).as_dict()}
    chance = entry | {"steps": 1, "gain": Figure(0.01, -0.01, 0.03).as_dict()}
    assert too_few(reference, [enough], 64) == []
    by_chance, too_short = too_few(reference, [enough, short, chance], 64)
    assert "no difference in kernel distance between mine at 1 step and the untrained base" in by_chance
    assert "mine at 4 steps. Make it --pictures 130." in too_short and "8 steps" not in too_short
