"""Every objective at the exact solution of a closed form, its signs, and the settings that it takes."""

import inspect
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phased_consistency.samplers import jump, x0_eps_from_output
from phased_consistency.trainer.objectives import (
    CD,
    CT,
    CTM,
    DSCD,
    LCF,
    LCM,
    OBJECTIVES,
    PCM,
    TCD,
    Jumps,
    Levels,
    Progressive,
    UFOGen,
)
from phased_consistency.trainer.objectives.distances import huber, vector_huber
from phased_consistency.trainer.objectives.dscd import angle
from phased_consistency.trainer.training.adversary import Judged
from phased_consistency.trainer.training.engine import Batch, Engine
from support.closed_form import FLOW, MEAN, NULL, SCHEDULES, STD, VP, Gaussian, StubBase, Switch, seeded

TO_X0, ROWS = torch.zeros_like, 512
PLAIN = {"guidance": (1.0, 1.0)}


def draw(objective, schedule, std=STD, progress=0.5, rows=ROWS):
    """A batch of the objective's own levels, on N(MEAN, std^2) data."""
    levels = objective.levels(rows, schedule, progress, seeded())
    shape = (rows, 4, 2, 2)
    x0, noise = MEAN + std * torch.randn(shape, generator=seeded(1)), torch.randn(shape, generator=seeded(2))
    guidance = torch.ones(rows) if objective.needs_teacher else None
    return Batch(x0, noise, levels, guidance, {"hidden": torch.full((rows, 1), MEAN)}, progress)


def engine(objective, schedule, prediction, student, teacher=None, tells_time=False):
    switch = Switch()
    base = StubBase(schedule, prediction, switch, teacher or Gaussian(schedule), student, tells_time)
    return Engine(base, switch, objective, NULL)


def losses(objective, schedule, prediction, student, std=STD, **how):
    """(B,) distances; the averaged target, which a stub has none of, is the student's own."""
    work = draw(objective, schedule, std)
    teacher = Gaussian(schedule, std)
    return engine(objective, schedule, prediction, student, teacher, **how).step(work).distance.double()


# --- zero at the exact solution


@SCHEDULES
@pytest.mark.parametrize("objective", [LCM, PCM, CTM], ids=lambda o: o.__name__)
def test_the_exact_solution_is_left_with_the_solvers_error(objective, schedule, prediction):
    """The error is of first order in the grid's width, of second for each step; the loss is nearly linear in it.
    CTM's network is told where it jumps to, which alone lets it be exact for every length."""
    exact, means = Gaussian(schedule), []
    for points in (50, 100, 200):
        row = objective(points=points, huber_c=1e-9, **PLAIN)
        student = exact.landing(row.grid().target)
        means.append(losses(row, schedule, prediction, student, tells_time=row.target_time).mean())
    for coarse, fine in zip(means[:-1], means[1:], strict=True):
        assert coarse / fine > 2.5, means
    wrong = losses(row, schedule, prediction, exact.landing(row.grid().target, shift=0.05), tells_time=row.target_time)
    right = losses(row, schedule, prediction, student, tells_time=row.target_time)
    assert wrong.mean() > 3 * right.mean()


@SCHEDULES
def test_cd_is_left_with_heuns_error(schedule, prediction):
    """The squares are two orders smaller than ddim's; the step that ends at the clean end is ddim's in both."""
    student, kept = Gaussian(schedule).landing(TO_X0), {}
    for solver in ("ddim", "heun"):
        row = CD(scales=60, solver=solver, target_ema=0, **PLAIN)
        inside = draw(row, schedule).levels.r > 0
        kept[solver] = losses(row, schedule, prediction, student)[inside].median()
    assert kept["heun"] < kept["ddim"] / 20


@SCHEDULES
@pytest.mark.parametrize("objective", [TCD, LCF, CT, UFOGen], ids=lambda o: o.__name__)
def test_a_single_picture_is_learnt_exactly(objective, schedule, prediction):
    """Where all data is one point every path is straight, so that one first-order jump is exact for every length, and
    the data's own path is the teacher's."""
    right = losses(objective(**(PLAIN if objective is TCD else {})), schedule, prediction, exact_point(schedule), std=0)
    wrong = losses(objective(**(PLAIN if objective is TCD else {})), schedule, prediction, off_point(schedule), std=0)
    assert right.abs().max() < 1e-3 * wrong.mean()


def exact_point(schedule):
    return Gaussian(schedule, 0).landing(TO_X0)


def off_point(schedule):
    return Gaussian(schedule, 0).landing(TO_X0, shift=lambda tick: 0.1 * angle(schedule, tick))


@SCHEDULES
@pytest.mark.parametrize("progress", [0.0, 0.4, 0.9])
def test_progressive_distillation_is_exact_at_the_teachers_two_steps(schedule, prediction, progress):
    row = Progressive(phases=4, halvings=3, **PLAIN)
    work, teacher = draw(row, schedule, progress=progress), Gaussian(schedule)
    edges = row.edges(row.stage(progress))

    def two_steps(x, tick, condition):
        to = edges[torch.searchsorted(edges, tick) - 1]
        (alpha, sigma), (alpha_to, sigma_to), middle = teacher.level(tick), teacher.level(to), (tick + to) // 2
        x0, eps = teacher(x, tick, condition)
        at_middle = teacher.level(middle)[0] * x0 + teacher.level(middle)[1] * eps
        x0, eps = teacher(at_middle, middle, condition)
        landed = alpha_to * x0 + sigma_to * eps
        x0 = (landed - sigma_to / sigma * x) / (alpha_to - sigma_to / sigma * alpha)
        return x0, (x - alpha * x0) / sigma

    right = engine(row, schedule, prediction, two_steps).step(work).distance
    wrong = engine(row, schedule, prediction, teacher).step(work).distance
    assert right.max() < 1e-3 * wrong.mean() and right.mean() < 1e-6


@SCHEDULES
def test_dscds_tangent_vanishes_at_the_exact_solution(schedule, prediction):
    row = DSCD(warmup=0, **PLAIN)
    right = losses(row, schedule, prediction, Gaussian(schedule).landing(TO_X0))
    wrong = losses(row, schedule, prediction, Gaussian(schedule).landing(TO_X0, lambda t: 0.5 * angle(schedule, t)))
    assert right.mean() < 0.1 * wrong.mean()


# --- signs


@SCHEDULES
@pytest.mark.parametrize(
    "objective", [row for row in OBJECTIVES.values() if not row.matching], ids=lambda o: o.__name__
)
def test_descent_leads_to_the_solution_from_both_sides(objective, schedule, prediction):
    """The student is off by an amount that grows with the level; less of it must be a lower loss's direction."""
    settings = PLAIN if objective.needs_teacher else {}
    settings = settings | ({"warmup": 0} if objective is DSCD else {"target_ema": 0} if objective is CD else {})
    row = objective(**settings)
    for side in (0.3, -0.3):
        off = torch.tensor(side, requires_grad=True)
        network = Gaussian(schedule, 0).landing(TO_X0, lambda tick, off=off: off * angle(schedule, tick))
        losses(row, schedule, prediction, network, std=0).mean().backward()
        assert off.grad * side > 0


# --- where the neighbour comes from


@SCHEDULES
def test_data_is_a_teacher_that_knows_the_picture(schedule, prediction):
    """Consistency training is distillation with x0 itself as the denoiser (arXiv 2303.01469, Thm 2's remark)."""
    row, student = LCF(points=50), Gaussian(schedule).landing(TO_X0)
    work = draw(row, schedule)

    def oracle(x, tick, condition):
        return work.x0, work.noise

    taught = LCM(points=50, guidance_mode="normalcfg")
    distilled = engine(taught, schedule, prediction, student, oracle)
    from_data = engine(row, schedule, prediction, student)
    unguided = Batch(work.x0, work.noise, work.levels, None, work.condition)
    # an eps-network's x0 loses digits where alpha is small, and so does what the oracle says through it
    torch.testing.assert_close(
        distilled.step(unguided).distance, from_data.step(unguided).distance, atol=1e-5, rtol=1e-3
    )
    assert len(from_data.base.calls) == 2 and len(distilled.base.calls) == 3


@SCHEDULES
def test_the_teachers_solvers_are_of_their_order(schedule, prediction):
    """From tick 800 to 400 in 4, 8 and 16 steps of the exact denoiser, against the exact flow."""
    exact, u = Gaussian(schedule), torch.full((64,), 800)
    r = u - 400
    work = draw(PCM(), schedule, rows=64)
    x = work.x0 * schedule.alpha(u[0]) + work.noise * schedule.sigma(u[0])
    truth = exact.flow(x, u, r)
    for solver, order in (("ddim", 1), ("heun", 2), ("dpm++", 2)):
        errors = []
        for steps in (4, 8, 16):
            one = engine(LCM(solver=solver, solver_steps=steps, **PLAIN), schedule, prediction, exact)
            errors.append((one._teacher(x, u, r, work) - truth).abs().mean().item())
        measured_order = math.log2(errors[0] / errors[2]) / 2
        assert order - 0.35 < measured_order < order + 0.6, (solver, measured_order, errors)


def test_a_solver_counts_its_evaluations():
    for settings, calls in (({}, 1), ({"solver": "heun"}, 2), ({"solver": "dpm++", "solver_steps": 3}, 3)):
        row = LCM(**PLAIN, **settings)
        one = engine(row, VP, "epsilon", Gaussian(VP).landing(TO_X0))
        one.batched = True  # both halves of the guidance in one pass
        one.step(draw(row, VP, rows=4))
        assert [on for _, on, _ in one.base.calls].count(False) == calls


def test_ctm_reaches_as_far_as_its_teacher_steps():
    levels = CTM(points=50, solver_steps=4).levels(4000, VP, 0.0, seeded())
    away = (levels.u - levels.r) // 20
    inside = away[levels.u >= 80]
    assert inside.unique().tolist() == [1, 2, 3, 4] and inside.float().mean() == pytest.approx(2.5, abs=0.06)


# --- distances


def test_the_vector_huber_is_of_the_whole_sample():
    """c = 0.00054 sqrt(D): 0.030 for CIFAR's 3072, 0.069 for SD1.5's 4 x 64 x 64."""
    zero = torch.zeros(1, 4, 64, 64)
    c = 0.06912
    assert vector_huber(zero, zero).item() == pytest.approx(0, abs=1e-6)
    d = torch.full_like(zero, 0.01)
    assert vector_huber(d, zero).item() == pytest.approx((0.01**2 * 16384 + c**2) ** 0.5 - c, rel=1e-4)


@SCHEDULES
def test_dscds_tangent_is_the_papers(schedule, prediction):
    """-cos(a_r) (F - F_T) - w sin(a_r) (x_a + (cos(d) F - F_r) / sin(d)), all on the circle (arXiv 2410.11081, App.
    E), for networks that are wrong in any way, halfway through the warm-up."""
    row = DSCD(warmup=0.5, **PLAIN)
    progress = 0.2
    u, r = torch.tensor([900, 500, 120]), torch.tensor([850, 430, 60])
    a, a_r = (angle(schedule, t).view(-1, 1, 1, 1) for t in (u, r))
    shape = (3, 4, 2, 2)
    x_a, F, F_T, F_r = (torch.randn(shape, generator=seeded(i)) for i in range(4))
    d = a - a_r
    x_at_r = d.cos() * x_a - d.sin() * F_T
    by_hand = -a_r.cos() * (F - F_T) - 0.4 * a_r.sin() * (x_a + (d.cos() * F - F_r) / d.sin())

    def size(tick):
        return torch.hypot(schedule.alpha(tick), schedule.sigma(tick)).view(-1, 1, 1, 1)

    student, target = a.cos() * x_a - a.sin() * F, a_r.cos() * x_at_r - a_r.sin() * F_r
    jumps = Jumps(x_a * size(u), x_at_r * size(r), student, target, Levels(u, r, 0 * u), schedule, prediction, progress)
    torch.testing.assert_close(row._tangent(jumps, a, a_r), by_hand, atol=2e-4, rtol=2e-3)


def test_dscds_loss_pushes_by_the_normalised_tangent():
    """Its gradient in F is -2 g / D: |g| is near 1 for large tangents, whatever the distance is."""
    row, schedule = DSCD(warmup=0, **PLAIN), FLOW
    u, r = torch.tensor([700, 700]), torch.tensor([650, 650])
    student = torch.zeros(2, 4, 2, 2, requires_grad=True)
    target = -torch.tensor([10.0, 1000.0]).view(2, 1, 1, 1).expand(2, 4, 2, 2)
    jumps = Jumps(student, student.detach(), student, target, Levels(u, r, 0 * u), schedule, "flow", 1.0)
    row.distance(jumps).sum().backward()
    push = student.grad.flatten(1).norm(dim=1)
    assert push[0].item() == pytest.approx(push[1].item(), rel=0.05) and (student.grad > 0).all()


@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
def test_dscds_gradient_goes_with_a_power_of_cos(power):
    """cos(a)^(2 power - 1) in an eps-network's output; one that predicts v does not know of it."""
    for schedule, prediction, exponent in ((VP, "epsilon", 2 * power - 2), (FLOW, "flow", 0.0)):
        u, r = torch.tensor([700, 400, 100]), torch.tensor([650, 350, 50])
        x = torch.randn(3, 4, 2, 2, generator=seeded())
        gradients = []
        for row in (DSCD(warmup=0, cos_power=power, **PLAIN), DSCD(warmup=0, **PLAIN)):
            student = x.clone().requires_grad_()
            jumps = Jumps(x, 0.9 * x, student, 0.5 * x, Levels(u, r, 0 * u), schedule, prediction, 1.0)
            row.distance(jumps).sum().backward()
            gradients.append(student.grad)
        cos = angle(schedule, u).cos().view(-1, 1, 1, 1).to(x)
        torch.testing.assert_close(gradients[0], gradients[1] * cos**exponent)


@SCHEDULES
@pytest.mark.parametrize("to", [0, 300])
@pytest.mark.parametrize("row", [PCM(distance_in="output"), CD(distance_in="output")], ids=["pcm", "cd"])
def test_distances_can_be_of_the_networks_output(row, to, schedule, prediction):
    """Two outputs that differ by d, jumped from one point to one end, are d apart whatever their levels are."""
    u = torch.tensor([990, 700, 350])
    s = torch.full_like(u, to)
    shape = (3, 4, 2, 2)
    x, output, d = (torch.randn(shape, generator=seeded(i)) for i in range(3))
    level = schedule.alpha(u), schedule.sigma(u)
    ends = [
        jump(*x0_eps_from_output(o, x, *level, prediction), schedule.alpha(s), schedule.sigma(s))
        for o in (output, output + d)
    ]
    jumps = Jumps(x, x, *ends, Levels(u, s, s), schedule, prediction, 0.5)
    student, target = row.compared(jumps)
    torch.testing.assert_close((target - student).abs(), d.abs(), atol=1e-4, rtol=1e-4)
    by_hand = d.square().flatten(1).mean(1) if isinstance(row, CD) else huber(d, 0 * d, row.huber_c)
    torch.testing.assert_close(row.distance(jumps), by_hand, atol=1e-4, rtol=1e-4)


def test_the_clamp_of_one_phase_is_in_the_units_of_the_output():
    """dx0 / deps is sigma / max(alpha, 0.5): at the noisiest levels about 2."""
    u = torch.tensor([1000, 300])
    row = PCM(phases=1, min_alpha=0.5, distance_in="output")
    x = torch.ones(2, 4, 2, 2)
    jumps = Jumps(x, x, x, 0 * x, Levels(u, 0 * u, 0 * u), VP, "epsilon", 0.5)
    expected = VP.alpha(u).clamp(min=0.5) / VP.sigma(u)
    torch.testing.assert_close(row.compared(jumps)[0].mean((1, 2, 3)), expected.float())
    film = x.unsqueeze(2)
    frames = replace(jumps, x_u=film, x_r=film, student=film, target=0 * film)
    assert torch.equal(row.compared(frames)[0], row.compared(jumps)[0].unsqueeze(2)), "of a film's frames too"


# --- the networks' weights


def test_ufogens_adversary_sees_the_student_and_the_picture():
    seen = {}

    class Watching:
        def losses(self, student, target, edge, judged, condition):
            seen.update(student=student, target=target, edge=edge)
            return torch.zeros(len(student)), torch.zeros(len(student))

    row = UFOGen()
    work = draw(row, VP, rows=5)
    judged = Judged(row.judged_at(work.levels, seeded()), work.noise, work.noise)
    one = engine(row, VP, "epsilon", Gaussian(VP).landing(TO_X0))
    one.adversary = Watching()
    one.step(Batch(work.x0, work.noise, work.levels, None, work.condition, 0.0, judged))
    assert torch.equal(seen["target"], work.x0) and not seen["edge"].any()


# --- settings


def test_each_objective_is_one_small_file():
    assert list(OBJECTIVES) == [
        "pcm",
        "lcm",
        "lcf",
        "ct",
        "cd",
        "tcd",
        "ctm",
        "ufogen",
        "progressive",
        "dscd",
        "dmd",
        "tdm",
    ]
    for name, row in OBJECTIVES.items():
        file = Path(inspect.getsourcefile(row))
        assert file.stem == name and len(file.read_text().splitlines()) <= 150


@pytest.mark.parametrize(
    ("row", "settings", "complaint"),
    [
        (LCM, {"solver": "dpm++"}, "whose first step is ddim's; got solver_steps = 1"),
        (CT, {"curriculum": "ict", "q": 4.0}, "objective.q: a setting of the curriculum ect"),
        (CT, {"s0": 4}, "objective.s0: a setting of the curriculum ict"),
        (CT, {"curriculum": "ict", "s0": 100, "s1": 10}, "objective.s0 = 100 is more than objective.s1 = 10"),
        (Progressive, {"phases": 8, "halvings": 8}, "begins with 2048, more than the 500"),
        (TCD, {"guidance": (3.0, 2.0)}, "with 1 <= low <= high"),
    ],
)
def test_settings_that_contradict_each_other(row, settings, complaint):
    with pytest.raises(ValueError, match=complaint.replace("+", r"\+")):
        row(**settings)


def test_how_each_is_sampled():
    recipes = {name: row().sampling() for name, row in OBJECTIVES.items()}
    assert {name: h["gamma"] for name, h in recipes.items() if h["gamma"] != 1} == {
        "pcm": 0, "tcd": 0.3, "ctm": 0.3, "progressive": 0, "tdm": 0,
    }  # fmt: skip
    assert {name for name, h in recipes.items() if h["guidance_mode"] == "normalcfg"} == {"lcf", "ct", "ufogen"}
    assert LCF(phases=4, points=40).sampling()["mode"] == "deterministic"
