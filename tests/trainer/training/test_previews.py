"""A run's grid stands between the teacher and a LoRA that has learnt nothing, each as it is."""

from types import SimpleNamespace

import pytest
import torch

from phased_consistency.trainer.evaluation.trial import Trial
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.lora.adapter import Adapter
from phased_consistency.trainer.pictures import GAP
from phased_consistency.trainer.training.previews import Previews
from phased_consistency.trainer.training.validation import reference_of
from support.bases import make_speck
from support.runs import small_config

PROMPTS = ("a red circle", "a blue star")


@pytest.fixture
def previews(tmp_path):
    make_speck(tmp_path / "speck")
    settings = {"preview__prompts": list(PROMPTS), "preview__steps": [1, 2], "validation__teacher_steps": 3}
    config = small_config(tmp_path / "run", base__path=str(tmp_path / "speck"), **settings)
    base = load_base(config.base.path)
    base.adapter = Adapter(base.network, base.lora_targets, rank=2, alpha=2.0, seed=0)
    return Previews(config, base, words_of(base), base.null_condition(base.encode_prompts([""])))


def words_of(base):
    """What a grid takes of a cache."""
    return SimpleNamespace(prompts=["", *PROMPTS], encoding=base.encode_prompts)


def learn(previews):
    """Make the adapter one that changes pictures."""
    with torch.no_grad():
        for name, weight in previews.base.adapter.named_parameters().items():
            weight += 0.5 * torch.randn(weight.shape) if name.endswith("lora_B") else 0


def test_a_lora_that_has_learnt_nothing_is_the_untrained_row(previews):
    steps = previews.usual.steps
    assert torch.equal(previews._pictures(steps), previews.untrained[1])
    learn(previews)
    assert not torch.allclose(previews._pictures(steps), previews.untrained[1], atol=1e-3)


def test_what_was_learnt_moves_neither_row(previews):
    learn(previews)
    rows = previews.teacher[1], previews.untrained[1]
    alone = load_base(previews.config.base.path)
    fresh = Previews(previews.config, alone, words_of(alone), previews.null)
    assert torch.equal(rows[0], fresh.teacher[1]) and torch.equal(rows[1], fresh.untrained[1])


def test_the_teacher_is_the_one_that_the_run_is_measured_against(previews):
    reference = reference_of(previews.config, previews.usual)
    trial = Trial(previews.condition, previews.null, previews.noise, previews.config.preview.seed)
    expected = previews.base.decode(trial.latents(reference, previews.base))
    assert reference.steps == 3 and torch.equal(previews.teacher[1], expected)
    assert previews.teacher[0] == f"teacher\n3 steps, CFG {reference.guidance:g}"


def test_the_cover_shows_the_lora_alone(previews):
    side = max(96, previews.teacher[1].shape[-1])
    assert previews.grid().height - previews.cover().height == 2 * (side + GAP)
