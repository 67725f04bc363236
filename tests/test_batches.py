"""What a forward pass sees: the same for the same (seed, samples seen, rank), whatever else is asked for."""

from __future__ import annotations

import pytest
import torch

from phased_consistency.samplers import VPSchedule
from phased_consistency.trainer.batches import Batches
from phased_consistency.trainer.objectives import PCM

SIZES = torch.tensor([[64, 96, 3, 0, 32, 32], [32, 32, 0, 0, 32, 32], [40, 32, 0, 4, 32, 32]])


class StubCache:
    """Three samples, whose latents and encodings are their numbers."""

    captions = ["one", "two", "three"]

    def __len__(self):
        return 3

    def latents(self, samples, generator):
        return torch.stack([torch.full((4, 2, 2), float(i)) for i in samples])

    def encoding(self, prompts):
        numbers = torch.tensor([float(1 + self.captions.index(p)) for p in prompts])
        return {"hidden": numbers.view(-1, 1, 1).repeat(1, 2, 3), "pooled": numbers.view(-1, 1).repeat(1, 5)}

    def sizes(self, samples):
        return SIZES[list(samples)]


class StubBase:
    device, knows_sizes, schedule = torch.device("cpu"), True, VPSchedule.from_betas()


EMPTY = {"hidden": torch.full((1, 2, 3), -7.0), "pooled": torch.full((1, 5), -7.0)}


def batches(dropout=0.0, guided=True, **choices):
    objective = PCM(guidance_mode="smallcfg" if guided else "normalcfg", prompt_dropout=dropout)
    return Batches(StubCache(), StubBase(), objective, EMPTY, **{"size": 3, "updates": 100, "seed": 1} | choices)


def test_a_dropped_prompt_is_the_empty_one_in_every_encoding_and_keeps_its_sizes():
    kept, dropped = (batches(dropout).at(0)[1].condition for dropout in (0.0, 0.999))
    samples = batches().at(0)[0]
    assert kept["pooled"][:, 0].tolist() == [1.0 + i for i in samples]
    for key in ("hidden", "pooled"):
        assert (dropped[key] == -7).all() and kept[key].shape == dropped[key].shape
    for condition in (kept, dropped):
        assert torch.equal(condition["time_ids"], SIZES[samples])


def test_some_prompts_are_dropped_and_others_not():
    many = batches(0.5, size=3)
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


def test_two_processes_share_what_one_would_see():
    alone = batches(size=2)
    pair = [batches(size=1, rank=rank, processes=2) for rank in (0, 1)]
    for number in range(6):
        assert alone.at(number)[0] == [sample for one in pair for sample in one.at(number)[0]]


@pytest.mark.parametrize("guided", [True, False])
def test_guidance_is_drawn_only_where_there_is_any(guided):
    drawn = batches(guided=guided).at(0)[1].guidance
    assert drawn is None if not guided else ((drawn >= 5) & (drawn <= 6)).all()


def test_progress_is_the_share_of_the_run_that_is_done():
    assert [batches(updates=8).at(i)[1].progress for i in (0, 2, 7)] == [0, 0.25, 0.875]


def test_an_update_of_several_passes_is_in_one_stage():
    progress = [batches(updates=3, accumulation=5).at(i)[1].progress for i in range(15)]
    assert progress == [0] * 5 + [1 / 3] * 5 + [2 / 3] * 5
