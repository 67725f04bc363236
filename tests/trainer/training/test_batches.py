"""What a forward pass sees: the same for the same (seed, place in the stream), however an update is split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phased_consistency.samplers import VPSchedule
from phased_consistency.trainer.data.store import Captions
from phased_consistency.trainer.objectives import PCM
from phased_consistency.trainer.training.batches import Batches, Split, made_ahead

SIZES = torch.tensor([[64, 96, 3, 0, 32, 32], [32, 32, 0, 0, 32, 32], [40, 32, 0, 4, 32, 32]])


class StubCache:
    """Three samples, whose latents and encodings are their numbers."""

    captions = Captions(["one", "two", "three"], np.arange(3))
    buckets = [np.arange(3)]

    def __len__(self):
        return 3

    def latents(self, samples, generators):
        assert len(samples) == len(generators)
        return torch.stack([torch.full((4, 2, 2), float(i)) for i in samples])

    def encoding(self, prompts):
        numbers = torch.tensor([float(1 + self.captions.index(p)) for p in prompts])
        return {"hidden": numbers.view(-1, 1, 1).repeat(1, 2, 3), "pooled": numbers.view(-1, 1).repeat(1, 5)}

    def sizes(self, samples):
        return SIZES[list(samples)]


class StubBase:
    device, knows_sizes, schedule = torch.device("cpu"), True, VPSchedule.from_betas()


EMPTY = {"hidden": torch.full((1, 2, 3), -7.0), "pooled": torch.full((1, 5), -7.0)}


def batches(dropout=0.0, guided=True, split=(3,), **choices):
    objective = PCM(guidance_mode="smallcfg" if guided else "normalcfg", prompt_dropout=dropout)
    draws = {"split": Split(*split), "updates": 100, "seed": 1} | choices
    return Batches(StubCache(), StubBase(), objective, EMPTY, **draws)


def test_a_dropped_prompt_is_the_empty_one_in_every_encoding_and_keeps_its_sizes():
    kept, dropped = (batches(dropout).at(0)[1].condition for dropout in (0.0, 0.999))
    samples = batches().at(0)[0]
    assert kept["pooled"][:, 0].tolist() == [1.0 + i for i in samples]
    for key in ("hidden", "pooled"):
        assert (dropped[key] == -7).all() and kept[key].shape == dropped[key].shape
    for condition in (kept, dropped):
        assert torch.equal(condition["time_ids"], SIZES[samples])


def test_some_prompts_are_dropped_and_others_not():
    many = batches(0.5)
    seen = torch.cat([many.at(i)[1].condition["pooled"][:, 0] for i in range(60)])
    assert 0.35 < (seen == -7).float().mean() < 0.65


def test_a_judge_and_dropped_prompts_change_no_other_draw():
    plain, judged = batches().at(5)[1], batches(0.5, judged=True).at(5)[1]
    for name in ("x0", "noise", "guidance"):
        assert torch.equal(getattr(plain, name), getattr(judged, name)), name
    assert torch.equal(plain.levels.u, judged.levels.u)
    assert plain.judged is None and judged.judged.tick.shape == (3,)
    assert not torch.equal(judged.judged.student_noise, judged.judged.target_noise)


def test_every_pass_over_the_data_is_whole_and_in_an_order_of_its_own():
    orders = [tuple(batches().at(i)[0]) for i in range(20)]
    assert all(sorted(order) == [0, 1, 2] for order in orders) and len(set(orders)) > 1


@pytest.mark.parametrize("split", [(1, 1, 6), (2, 1, 3), (3, 1, 2), (3, 2, 1), (1, 2, 3), (1, 6, 1)])
def test_an_update_sees_the_same_however_it_is_split(split):
    """Samples, noise, levels, guidance, dropped prompts and what is judged: six samples an update, in every way."""
    size, accumulation, processes = split
    whole = batches(0.5, split=(6,), judged=True)
    parts = [batches(0.5, split=split, judged=True, rank=rank) for rank in range(processes)]
    for update in range(3):
        samples, one = whole.at(update)
        seen = [parts[rank].at(update * accumulation + i) for i in range(accumulation) for rank in range(processes)]
        assert [len(some) for some, _ in seen] == [size] * (accumulation * processes)
        assert samples == [sample for some, _ in seen for sample in some]
        for name, of in OF_EACH.items():
            assert torch.equal(of(one), torch.cat([of(part) for _, part in seen])), name
        assert {part.progress for _, part in seen} == {one.progress}


OF_EACH = {
    "latents": lambda batch: batch.x0,
    "noise": lambda batch: batch.noise,
    "starts": lambda batch: batch.levels.u,
    "ends": lambda batch: batch.levels.s,
    "guidance": lambda batch: batch.guidance,
    "prompts": lambda batch: batch.condition["pooled"],
    "judged at": lambda batch: batch.judged.tick,
    "its noise": lambda batch: batch.judged.student_noise,
    "the target's": lambda batch: batch.judged.target_noise,
}


def test_processes_see_different_samples():
    """Data are disjoint: three processes of one sample each share out every pass over the three samples."""
    parts = [batches(split=(1, 1, 3), rank=rank) for rank in range(3)]
    assert all(sorted(part.at(number)[0][0] for part in parts) == [0, 1, 2] for number in range(10))


def test_no_two_places_of_the_stream_have_the_same_noise():
    noise = torch.cat([batches().at(number)[1].noise for number in range(20)]).flatten(1)
    assert len(noise.unique(dim=0)) == 60


@pytest.mark.parametrize(
    ("samples", "processes", "most", "split"),
    [
        (32, 2, 32, (16, 1, 2)),
        (32, 2, 8, (8, 2, 2)),
        (12, 4, 2, (1, 3, 4)),
        (10, 1, 4, (2, 5, 1)),
        (7, 1, 3, (1, 7, 1)),
    ],
)
def test_an_update_is_shared_among_another_number_of_processes(samples, processes, most, split):
    assert Split.of_update(samples, processes, most) == Split(*split)
    assert Split(*split).update == samples


def test_an_update_that_cannot_be_shared_evenly_is_refused():
    with pytest.raises(ValueError, match="8 samples an update, which 3 processes cannot .* numbers: 1, 2, 4, 8;"):
        Split.of_update(8, 3, 4)


def test_rows_whose_target_needs_the_network_are_known_beforehand():
    """r > s: all but those that are one point above a phase's edge."""
    for number in range(20):
        batch = batches().at(number)[1]
        assert batch.inner.tolist() == [i for i in range(3) if batch.levels.r[i] > batch.levels.s[i]]


def test_batches_made_ahead_are_those_asked_for_and_end_with_the_run():
    made = list(batches(updates=4, split=(3, 2)).ahead(3))
    assert len(made) == 5  # of eight passes
    for number, (samples, batch) in enumerate(made, 3):
        again = batches(updates=4, split=(3, 2)).at(number)
        assert samples == again[0] and torch.equal(batch.noise, again[1].noise)


def test_what_fails_ahead_fails_where_it_is_needed():
    def make(number):
        if number == 2:
            raise OSError("the disk is gone")
        return number

    coming = made_ahead(make, range(5))
    assert [next(coming), next(coming)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(coming)


@pytest.mark.parametrize("guided", [True, False])
def test_guidance_is_drawn_only_where_there_is_any(guided):
    drawn = batches(guided=guided).at(0)[1].guidance
    assert drawn is None if not guided else ((drawn >= 5) & (drawn <= 6)).all()


def test_progress_is_the_share_of_the_run_that_is_done():
    assert [batches(updates=8).at(i)[1].progress for i in (0, 2, 7)] == [0, 0.25, 0.875]


def test_an_update_of_several_passes_is_in_one_stage():
    progress = [batches(updates=3, split=(3, 5)).at(i)[1].progress for i in range(15)]
    assert progress == [0] * 5 + [1 / 3] * 5 + [2 / 3] * 5
