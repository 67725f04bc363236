"""The phase grid against diffusers' trailing timesteps, the published edges, and its own promises."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from phased_consistency.samplers import PhaseGrid

GRIDS = [
    PhaseGrid(points, phases, from_noise)
    for points, phases, from_noise in itertools.product(
        (8, 20, 25, 40, 50, 100, 250, 1000), (1, 2, 3, 4, 5, 7, 8, 16), (False, True)
    )
    if phases <= points
]


@pytest.mark.parametrize("phases", [1, 2, 4, 8])
def test_forty_points_are_diffusers_trailing_grid(phases):
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(phases)
    assert [tick - 1 for tick in PhaseGrid(40, phases).plan().ticks[:-1]] == scheduler.timesteps.tolist()


# target timesteps of the published trainer, noisiest first; its clean end is timestep 0, ours is tick 0
PUBLISHED = [
    (50, 2, [499]),
    (50, 4, [739, 499, 239]),
    (50, 8, [859, 739, 619, 499, 359, 239, 119]),
    (50, 16, [919, 859, 799, 739, 679, 619, 559, 499, 419, 359, 299, 239, 179, 119, 59]),
    (40, 16, [924, 874, 799, 749, 674, 624, 549, 499, 424, 374, 299, 249, 174, 124, 49]),
    (100, 4, [749, 499, 249]),
    (100, 8, [869, 749, 619, 499, 369, 249, 119]),
]


@pytest.mark.parametrize(("points", "phases", "timesteps"), PUBLISHED)
def test_published_edges(points, phases, timesteps):
    grid = PhaseGrid(points, phases)
    assert grid.plan().ticks == (1000, *(t + 1 for t in timesteps), 0)
    assert sorted(set(grid.target(grid.start_ticks()).tolist()), reverse=True) == [*(t + 1 for t in timesteps), 0]


@pytest.mark.parametrize(("points", "phases"), [(n, m) for n in (40, 100) for m in (1, 2, 4, 8, 16)])
def test_edges_are_floored_to_points(points, phases):
    """Edge j is point floor(j * N / M). 16 phases divide neither 40 nor 100: they are 2 or 3, 6 or 7 points wide."""
    grid, width = PhaseGrid(points, phases), 1000 // points
    edges = [width * (j * points // phases) for j in range(phases + 1)]
    assert grid.edges == tuple(edges) and grid.plan().ticks == tuple(edges[::-1])
    assert grid.plan().notes == ()
    widths = {(b - a) // width for a, b in itertools.pairwise(edges)}
    assert widths == ({points // phases} if points % phases == 0 else {points // phases, points // phases + 1})


def test_sixteen_edges_of_flow():
    ticks = (1000, 930, 870, 810, 750, 680, 620, 560, 500, 430, 370, 310, 250, 180, 120, 60, 0)
    assert PhaseGrid(100, 16).plan().ticks == ticks


def test_counted_from_noise_it_is_the_lcm_grid():
    """LCM, TCD and the published SD3 scheduler take the points floor(50 * i / n) from the noisy end."""
    for steps in range(1, 51):
        points = [1000 - 20 * (50 * i // steps) for i in range(steps)]
        assert PhaseGrid(50, 1, from_noise=True).plan(steps).ticks == (*points, 0), steps


def test_targets_chain():
    """Every start is mapped to the edge below it; an edge is the last start of the phase under it."""
    for grid in GRIDS:
        edges = torch.tensor(grid.edges)
        assert edges[0] == 0 and edges[-1] == grid.ticks and (edges.diff() > 0).all(), grid
        assert grid.target(edges[1:]).tolist() == edges[:-1].tolist(), grid
        starts = grid.start_ticks()
        targets = grid.target(starts)
        assert set(grid.edges) - {0} <= set(starts.tolist()), grid
        assert (targets < starts).all() and (targets <= grid.previous(starts)).all(), grid
        between = (edges > targets[:, None]) & (edges < starts[:, None])
        assert not between.any(), grid


def test_target_keeps_the_shape():
    assert PhaseGrid(40, 4).target(torch.tensor([[25, 250], [275, 1000]])).tolist() == [[0, 0], [250, 750]]


def test_plans_hold_their_promises():
    """All levels fall from T to 0 in the steps asked for, and every trained landing point is among them."""
    for grid in GRIDS:
        wanted = {1, 2, 3, grid.phases, grid.phases + 1, 2 * grid.phases, grid.points - 1, grid.points}
        for steps in sorted(wanted & set(range(1, grid.points + 1))):
            plan = grid.plan(steps)
            assert plan.steps == steps and plan.denoise == 1, (grid, steps)
            assert plan.ticks[0] == grid.ticks and plan.ticks[-1] == 0, (grid, steps)
            assert all(a > b for a, b in itertools.pairwise(plan.ticks)), (grid, steps)
            edges, ticks = set(grid.edges), set(plan.ticks)
            assert (edges <= ticks if steps >= grid.phases else ticks <= edges) and not plan.notes, (grid, steps)


def test_more_steps_divide_the_noisiest_phases_first():
    assert PhaseGrid(40, 4).plan(8).ticks == (1000, 875, 750, 625, 500, 375, 250, 125, 0)
    assert PhaseGrid(40, 4).plan(5).ticks == (1000, 875, 750, 500, 250, 0)


def test_fewer_steps_merge_the_cleanest_phases():
    assert PhaseGrid(40, 4).plan(3).ticks == (1000, 750, 500, 0)


@pytest.mark.parametrize(
    ("denoise", "ticks"),
    [(1.0, (1000, 750, 500, 250, 0)), (0.75, (750, 500, 250, 0)), (0.6, (500, 250, 0)), (0.01, (250, 0))],
)
def test_denoise_enters_at_a_phase_edge(denoise, ticks):
    plan = PhaseGrid(40, 4).plan(denoise=denoise)
    assert plan.ticks == ticks and plan.denoise == ticks[0] / 1000
    assert bool(plan.notes) == (plan.denoise != denoise)


def test_denoise_says_what_it_did():
    (note,) = PhaseGrid(40, 4).plan(denoise=0.6).notes
    assert note == "denoise 0.6 starts at the nearest phase edge, which is 0.5: 2 of 4 steps."


def test_denoise_never_starts_inside_a_phase():
    grid = PhaseGrid(40, 4)
    for steps, percent in itertools.product((2, 4, 6, 8), range(1, 101)):
        assert grid.plan(steps, percent / 100).ticks[0] in grid.edges


def test_one_phase_takes_all_its_steps_below_its_start_as_in_diffusers():
    """LCM's own scheduler, whose timesteps are our ticks - 1."""
    grid, scheduler = PhaseGrid(50, 1, from_noise=True), LCMScheduler()
    for points, steps in itertools.product(range(8, 51), (1, 2, 4, 8)):
        strength = min(1.0, (points + 0.5) / 50)  # it rounds down
        scheduler.set_timesteps(steps, original_inference_steps=50, strength=strength)
        plan = grid.plan(steps, points / 50)
        assert [tick - 1 for tick in plan.ticks[:-1]] == scheduler.timesteps.tolist(), (points, steps)
        assert plan.denoise == points / 50 and not plan.notes


def test_one_phase_says_what_it_did():
    plan = PhaseGrid(40, 1).plan(4, denoise=0.41)
    assert plan.ticks == (400, 300, 200, 100, 0)
    assert plan.notes == ("denoise 0.41 starts at the nearest level, which is 0.4.",)
    few = PhaseGrid(40, 1).plan(4, denoise=0.05)
    assert few.ticks == (50, 25, 0) and few.notes == ("2 steps of 4: there are no more levels below denoise 0.05.",)
    assert PhaseGrid(40, 1).plan(1).ticks == (1000, 0)


@pytest.mark.parametrize("points", [0, -5, 48, 1001])
def test_points_that_miss_the_noisy_end_are_an_error(points):
    with pytest.raises(ValueError, match=f"points = {points} does not divide 1000"):
        PhaseGrid(points)


def test_the_error_names_points_that_fit():
    with pytest.raises(ValueError, match="Nearest that do: 25, 40, 50"):
        PhaseGrid(39)


@pytest.mark.parametrize("phases", [0, 41])
def test_phases_beyond_the_points_are_an_error(phases):
    with pytest.raises(ValueError, match=f"between 1 and points = 40; got {phases}"):
        PhaseGrid(40, phases)


@pytest.mark.parametrize("steps", [0, 41])
def test_steps_beyond_the_points_are_an_error(steps):
    with pytest.raises(ValueError, match=f"between 1 and 40.*got {steps}"):
        PhaseGrid(40, 4).plan(steps)


@pytest.mark.parametrize("denoise", [0, -0.1, 1.1, float("nan")])
def test_denoise_outside_its_range_is_an_error(denoise):
    with pytest.raises(ValueError, match="denoise must be above 0 and at most 1"):
        PhaseGrid().plan(denoise=denoise)


def test_a_widget_beyond_the_points_gets_all_levels_there_are_and_a_note():
    grid = PhaseGrid(20, 4)
    assert grid.plan_at_most(20, 0.5) == grid.plan(20, 0.5)
    for steps in (21, 100):
        assert grid.plan_at_most(steps).ticks == grid.plan(20).ticks
        assert grid.plan_at_most(steps).notes == (f"20 steps of {steps}: there are no more levels.",)
    with pytest.raises(ValueError, match="steps must be between 1 and 20"):
        grid.plan_at_most(0)
