"""Held-out samples: which they are, and that training sees neither them nor their captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phased_consistency.trainer.data.held_out import hold_out
from phased_consistency.trainer.reporting.progress import Reporter
from phased_consistency.trainer.training.batches import Batches, Split
from phased_consistency.trainer.training.loop import Run
from support.runs import small_config

ALL = np.arange


def held(prompts, count, seed=0, buckets=None):
    prompts = np.asarray(prompts)
    return hold_out(prompts, buckets or [ALL(len(prompts))], count, seed)


@pytest.mark.parametrize(
    ("total", "wanted", "expected"), [(19, 32, 0), (20, 32, 2), (100, 32, 10), (400, 32, 32), (400, 5, 5), (400, 0, 0)]
)
def test_at_most_a_tenth_is_held_out(total, wanted, expected):
    assert len(held(ALL(total), wanted).samples) == expected


def test_seed_and_data_alone_decide():
    one, again, other = (held(ALL(400), 32, seed).samples.tolist() for seed in (1, 1, 2))
    assert one == again != other and one == sorted(set(one))


def test_captions_are_held_out_whole():
    prompts = ALL(1000) % 200  # as when a teacher makes five latents of each
    split = held(prompts, 32)
    assert len(split.samples) == 30 and split.known == 0
    rest = np.setdiff1d(ALL(1000), split.samples)
    assert not set(prompts[split.samples]) & set(prompts[rest])


def test_captions_that_too_many_share_are_known_to_training():
    split = held(ALL(1000) % 10, 32)
    assert len(split.samples) == 32 and split.known == 32
    sentence = "32 of 1000 samples are held out; training sees the captions of 32 of them."
    assert split.sentence(32, 1000) == sentence


def test_no_bucket_is_emptied():
    buckets = [ALL(3, 200), ALL(1, 3), ALL(0, 1)]
    for seed in range(40):
        samples = held(ALL(200), 20, seed, buckets).samples
        assert len(samples) == 20 and all(set(bucket.tolist()) - set(samples.tolist()) for bucket in buckets)


def test_what_becomes_of_a_wish_is_said():
    few = held(ALL(6), 4)
    assert few.sentence(4, 6) == "None of the 6 samples is held out: that takes 20 or more."
    assert few.sentence(0, 6) == "" and held(ALL(20), 4).sentence(4, 20) == "2 of 20 samples are held out."


def test_a_million_samples_take_no_time():
    prompts = ALL(1_000_000) // 40  # none of which can be held out whole with 32
    assert len(held(prompts, 32).samples) == 32


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = small_config(tmp_path_factory.mktemp("run"), data__count=40, validation__count=4)
    return Run(config, Reporter())


def test_training_never_draws_them(run):
    held_out = set(run.batches.held_out)
    assert len(held_out) == 4
    drawn = [sample for number in range(60) for sample in run.batches.at(number)[0]]
    assert set(drawn) == set(range(40)) - held_out


def test_fixed_draws_are_of_the_sample_alone(run):
    one, other = run.batches.fixed([3, 5], 0), run.batches.fixed([5, 8, 3], 0)
    for name in ("x0", "noise", "guidance"):
        assert torch.equal(getattr(one, name)[0], getattr(other, name)[2]), name
        assert torch.equal(getattr(one, name)[1], getattr(other, name)[0]), name
    again = run.batches.fixed([3, 5], 1)
    assert not torch.equal(one.noise, again.noise) and torch.equal(one.x0, again.x0), "no spread in what a teacher made"


def test_fixed_draws_are_no_place_of_the_stream(run):
    drawn = torch.cat([run.batches.at(number)[1].noise for number in range(20)])
    assert not any((noise == drawn).all((1, 2, 3)).any() for noise in run.batches.fixed(range(6), 0).noise)


def test_a_held_out_batch_has_no_judge(run):
    settings = {"split": Split(3), "updates": 10, "seed": 0, "judged": True}
    judged = Batches(run.cache, run.base, run.config.objective, run.cache.encoding([""]), **settings)
    assert judged.at(0)[1].judged is not None and judged.fixed([1], 0).judged is None
