"""The levels that each objective draws, and what it jumps to, as its paper has them."""

import math

import pytest
import torch

from phased_consistency.trainer.objectives import CT, DSCD, OBJECTIVES, PCM, Levels, Progressive, UFOGen
from phased_consistency.trainer.objectives.distances import karras_ticks, nearest_ticks, noise_level
from support.closed_form import SCHEDULES, VP, seeded


@SCHEDULES
@pytest.mark.parametrize("progress", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_levels_are_in_order_and_reach_pure_noise(objective, schedule, prediction, progress):
    levels = objective().levels(20_000, schedule, progress, seeded())
    assert ((levels.s >= 0) & (levels.s <= levels.r) & (levels.r < levels.u)).all()
    assert levels.u.max() == 1000


def test_what_each_objective_jumps_to():
    of = {name: row().levels(4000, VP, 0.0, seeded()) for name, row in OBJECTIVES.items()}
    assert of["pcm"].s.unique().tolist() == [0, 250, 500, 750]
    for name in ("lcm", "lcf", "ct", "cd", "ufogen", "dscd", "dmd"):
        assert not of[name].s.any(), name
    assert torch.equal(of["progressive"].s, of["progressive"].r)
    assert not of["ufogen"].r.any()
    tcd = of["tcd"]
    share = tcd.s / tcd.r.clamp(min=1)
    assert (tcd.s % 20 == 0).all() and share[tcd.r > 500].mean() == pytest.approx(0.5, abs=0.02)
    assert (tcd.s == tcd.r).any() and (tcd.s[tcd.r > 0] == 0).any()


def test_a_share_of_pcms_jumps_ends_anywhere_down_to_the_edge():
    """Half at the edge, and half on the points from there to the neighbour, each as often: of 5 cells at the phase's
    top, the edge is the end of 1/2 + 1/2 * 1/5."""
    rows = [PCM(points=20, phases=4, inside=share).levels(60_000, VP, 0.0, seeded()) for share in (0.0, 0.5, 1.0)]
    plain, half, all_inside = rows
    assert all(torch.equal(row.u, plain.u) and torch.equal(row.r, plain.r) for row in rows)
    for row in rows:
        assert ((row.s >= plain.s) & (row.s <= row.r)).all() and not (row.s % 50).any()
    top = plain.u % 250 == 0
    ends = [((row.s - plain.s)[top] // 50).bincount(minlength=5) / top.sum() for row in rows]
    torch.testing.assert_close(ends[0], torch.tensor([1.0, 0, 0, 0, 0]))
    torch.testing.assert_close(ends[1], torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1]), atol=0.01, rtol=0)
    torch.testing.assert_close(ends[2], torch.full((5,), 0.2), atol=0.01, rtol=0)


def test_what_ends_inside_a_phase_is_judged_above_its_end():
    row = PCM(points=20, phases=4, inside=1.0)
    levels = row.levels(5000, VP, 0.0, seeded())
    judged, grid = row.judged_at(levels, seeded()), row.grid()
    assert (judged > levels.s).all() and torch.equal(grid.target(judged), grid.target(levels.u))


@pytest.mark.parametrize("row", [CT, CT(curriculum="ict"), DSCD], ids=["ect", "ict", "dscd"])
def test_a_share_of_the_samples_starts_where_sampling_does(row):
    kind, settings = (type(row), row.model_dump(exclude={"noisiest_share"})) if isinstance(row, CT) else (row, {})
    never, often = (
        kind(**settings | {"noisiest_share": share}).levels(40_000, VP, 0.3, seeded()) for share in (0.0, 0.25)
    )
    before = (never.u == 1000).float().mean().item()
    assert before < 0.1 and (often.u == 1000).float().mean() == pytest.approx(0.25 + 0.75 * before, abs=0.01)
    others = often.u < 1000
    assert torch.equal(often.u[others], never.u[others]), "the other draws are the same"
    assert torch.equal(often.r[others], never.r[others]) and (often.r < often.u).all()


def test_icts_scales_double():
    """N = 11, 21, ..., 1281 in eight stages (arXiv 2310.14189, Sec. 3.4)."""
    row = CT(curriculum="ict")
    actual = [row.scales(k / 8) + 1 for k in range(8)] + [row.scales(0.9999) + 1]
    assert actual == [11, 21, 41, 81, 161, 321, 641, 1281, 1281]
    assert CT(curriculum="ict", s0=4, s1=8).scales(0.49) == 4


def test_ects_gap_shrinks_from_stage_to_stage():
    """r / t = .47, .74, .87, .93, .97 at the paper's t = 5, of data of spread 0.5: at 10 here (q 2, k 8, b 1)."""
    stages = []
    for stage in range(5):
        row = CT(p_mean=math.log(10), p_std=1e-6, stages=5)
        levels = row.levels(1, VP, stage / 5, seeded())
        t, r = (noise_level(VP, tick).item() for tick in (levels.u, levels.r))
        stages.append(r / t)
    assert stages == pytest.approx([0.47, 0.74, 0.87, 0.93, 0.97], abs=0.015)  # ticks are whole


def test_icts_levels_are_drawn_with_lognormal_weight():
    row = CT(curriculum="ict", s0=40, s1=40)
    levels = row.levels(200_000, VP, 0.0, seeded())
    cut = noise_level(VP, karras_ticks(VP, 41)[20]).item()
    share = (noise_level(VP, levels.u) <= cut).float().mean().item()
    whole = [
        0.5 * (1 + math.erf((math.log(s) + 0.4) / (2 * 2**0.5)))
        for s in (cut, noise_level(VP, torch.tensor(1000)).item())
    ]
    assert share == pytest.approx(whole[0] / whole[1], abs=0.005)


def test_karras_levels():
    """sigma^(1/7) evenly spaced, as near as whole ticks come; both ends among them."""
    ticks = karras_ticks(VP, 18)
    root = noise_level(VP, ticks).double() ** (1 / 7)
    assert len(ticks) == 18 and ticks[0] == 1 and ticks[-1] == 1000
    torch.testing.assert_close(root.diff(), root.diff().mean().expand(17), rtol=0.15, atol=0)


@SCHEDULES
def test_nearest_ticks_invert_the_noise_to_signal_ratio(schedule, prediction):
    ticks = torch.arange(1, 960, 7)
    assert torch.equal(nearest_ticks(schedule, noise_level(schedule, ticks)), ticks)
    assert nearest_ticks(schedule, torch.tensor([0.0, 1e9])).tolist() == [1, 1000]


def test_progressives_stages_halve_and_share_their_edges():
    row = Progressive(phases=3, halvings=4)
    counts = [len(row.edges(stage)) - 1 for stage in range(4)]
    assert counts == [24, 12, 6, 3]
    for stage in range(3):
        finer, coarser = row.edges(stage), row.edges(stage + 1)
        assert torch.equal(finer[::2], coarser)
        assert torch.equal(finer[1::2], (coarser[1:] + coarser[:-1]) // 2)  # where the engine's two steps meet
    assert [row.stage(p) for p in (0, 0.24, 0.26, 0.99, 1.0)] == [0, 0, 1, 3, 3]


def test_only_the_first_stage_is_guided():
    row = Progressive(halvings=2, guidance=(4.0, 4.0))
    assert row.draw_guidance(2, 0.4, seeded()).tolist() == [4, 4]
    assert row.draw_guidance(2, 0.6, seeded()) is None


def test_ufogens_judge_sits_a_quarter_below():
    row = UFOGen()
    levels = Levels(*(torch.tensor([1000, 500, 250, 25]),) * 3)
    assert row.judged_at(levels, seeded()).tolist() == [750, 250, 1, 1]
