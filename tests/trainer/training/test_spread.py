"""How near the pictures of a run that matches distributions are as a set, and what is said where they become alike."""

import pytest
import torch

from phased_consistency.trainer.reporting.log import read_log
from phased_consistency.trainer.reporting.progress import Reporter
from phased_consistency.trainer.training.loop import Run, train
from phased_consistency.trainer.training.spread import NOISES, collapse, compared, distance_at
from support.runs import Notes, small_config

SETS = {
    "objective__name": "tdm",
    "objective__phases": 2,
    "objective__critic_warmup": 0,
    "validation__every": 2,
    "validation__steps": [2],
    "validation__teacher_steps": 2,
    "data__count": 24,
}


def pictures(seed, spread=1.0, rows=12, noises=NOISES):
    """Latents around a place of each prompt's own."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randn(rows, 1, 4, 2, 2, generator=torch.Generator().manual_seed(9))
    return (places + spread * torch.randn(rows, noises, 4, 2, 2, generator=generator)).flatten(0, 1)


def test_equal_sets_are_near_and_alike_ones_are_told():
    same, alike = compared(pictures(1), pictures(2), 2), compared(pictures(1, spread=0.1), pictures(2), 2)
    shifted = compared(pictures(1) + 1, pictures(2), 2)
    distance, diversity, recall = same
    assert distance == distance_at(2)
    assert abs(same[distance]) < 0.2 * shifted[distance]
    assert same[diversity] == pytest.approx(1, abs=0.15) and alike[diversity] == pytest.approx(0.1, abs=0.02)
    assert alike[recall] < 0.5 * same[recall]


def test_a_falling_diversity_is_said_with_what_to_change():
    name = next(name for name in compared(pictures(1), pictures(2), 4) if name.startswith("diversity"))

    def lines(*shares):
        return [{"step": 100 * i, "figures": {name: share}} for i, share in enumerate(shares)]

    assert collapse(lines(0.4, 0.95, 0.7), 4) == (
        "Its pictures of one prompt become alike: they differ 0.70 times as much as the teacher's, and did so 0.95 "
        "times after update 100. The critic is too slow for it: raise objective.critic_updates or objective.critic_lr, "
        "or lower train.lr."
    )
    for fine in (lines(0.4, 0.7), lines(1.2, 0.9), lines(0.5), [], [{"step": 0, "figures": {}}]):
        assert collapse(fine, 4) == ""
    assert collapse(lines(0.9, 0.7), 2) == "", "of another number of steps"


def test_a_run_is_measured_by_its_set_of_pictures(tmp_path):
    notes = Notes()
    config = small_config(tmp_path, **SETS)
    train(config, notes)
    measured = [line for line in read_log(tmp_path) if line["kind"] == "validation"]
    assert [line["step"] for line in measured] == [0, 2, 4]
    assert all(len(line["figures"]) == 3 and distance_at(2) in line["figures"] for line in measured)
    assert measured[-1]["best"]["figure"] == distance_at(2)
    assert any("distance, diversity and recall of 16 pictures" in line for line in notes.said)


def test_the_teachers_pictures_are_of_other_noise_and_the_same_prompts(tmp_path):
    """So the teacher itself, drawn from the run's noise, is no nearer than its set is to another of its own."""
    run = Run(small_config(tmp_path, **SETS), Reporter())
    judge = run.validation
    assert judge.prompts[::NOISES] == judge.prompts[1::NOISES] and len(set(judge.prompts)) > 1
    noise = judge.trial.noise
    assert not torch.equal(noise[0], noise[1])
    same = judge.trial.latents(judge.reference, run.base)
    assert not torch.allclose(same, judge.teacher, atol=1e-2)
