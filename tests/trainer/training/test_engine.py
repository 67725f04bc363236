"""One training step on stub networks with closed forms: a Gaussian has an exact denoiser and an exact flow."""

from dataclasses import replace

import pytest
import torch

from phased_consistency.samplers import FlowSchedule, PhaseGrid, VPSchedule, jump
from phased_consistency.trainer.objectives import PCM, Levels
from phased_consistency.trainer.objectives.distances import huber
from phased_consistency.trainer.training.engine import Batch, Engine
from support.closed_form import MEAN, NULL, NULL_MEAN, STD, Gaussian, StubBase, Switch

VP, FLOW = VPSchedule.from_betas(), FlowSchedule(3.0)
KINDS = pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(VP, "epsilon"), (VP, "v_prediction"), (FLOW, "flow")],
    ids=["vp-eps", "vp-v", "flow"],
)


class Watched(PCM):
    """The objective, remembering what it compared."""

    def distance(self, pair):
        seen.append((pair.student, pair.target))
        return super().distance(pair)


seen: list[tuple[torch.Tensor, torch.Tensor]] = []


def engine(schedule, prediction="epsilon", points=40, phases=4, teacher=None, student=None, **settings):
    exact, switch = Gaussian(schedule), Switch()
    base = StubBase(schedule, prediction, switch, teacher or exact, student or exact)
    return Engine(base, switch, Watched(points=points, phases=phases, guidance=(1.0, 1.0), **settings), NULL)


def batch(start, guidance=1.0, points=40, phases=4):
    u, grid = torch.as_tensor(start), PhaseGrid(points, phases)
    shape = (len(u), 4, 2, 2)
    generator = torch.Generator().manual_seed(1)
    x0, noise = MEAN + STD * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    levels = Levels(u, grid.previous(u), grid.target(u))
    return Batch(x0, noise, levels, torch.full((len(u),), guidance), {"hidden": torch.full((len(u), 1), MEAN)})


@KINDS
def test_a_perfect_student_is_left_with_the_solvers_error(schedule, prediction):
    """Of second order in the step's length for one first-order step, and nothing else."""
    starts, losses = [700, 450, 200], {}
    for points in (40, 100, 200):
        perfect = Gaussian(schedule).landing(PhaseGrid(points, 4).target)
        one = engine(schedule, prediction, points, student=perfect, huber_c=1e-9)
        losses[points] = one.step(batch(starts, points=points)).distance.double()
    for coarse, fine in ((40, 100), (100, 200)):
        order = (losses[coarse] / losses[fine]).log() / torch.tensor(fine / coarse).log()
        assert ((order > 1.7) & (order < 2.3)).all(), (coarse, fine, order)


@KINDS
def test_an_imperfect_student_is_told_apart(schedule, prediction):
    """The teacher itself jumps straight to the edge: far from the flow's end."""
    student, work = Gaussian(schedule).landing(PhaseGrid(100, 4).target), batch([950, 700], points=100)
    perfect = engine(schedule, prediction, 100, student=student).step(work).distance
    assert (engine(schedule, prediction, 100).step(work).distance > 5 * perfect).all()


@KINDS
def test_the_boundary_condition_is_exact(schedule, prediction):
    """As many points as phases: the target is the teacher's own step, which the identity adapter takes too."""
    losses = engine(schedule, prediction, 4).step(batch([1000, 750, 500, 250], points=4)).distance
    assert losses.tolist() == [0, 0, 0, 0]


@KINDS
@pytest.mark.parametrize("guidance", [1.0, 5.5])
def test_the_teachers_step_is_guided_ddim(schedule, prediction, guidance):
    """DDIM's formula for VP, Euler's for flow."""
    one, work = engine(schedule, prediction, 4), batch([1000, 750, 500], guidance, points=4)
    one.step(work)
    exact, (u, r) = Gaussian(schedule), (work.levels.u, work.levels.u - 250)
    (alpha, sigma), (alpha_r, sigma_r) = exact.level(u), exact.level(r)
    x = alpha * work.x0 + sigma * work.noise
    cond, uncond = (exact(x, u, {"hidden": torch.full((3, 1), mean)}) for mean in (MEAN, NULL_MEAN))
    if schedule is VP:
        eps = uncond[1] + guidance * (cond[1] - uncond[1])
        by_hand = alpha_r * (x - sigma * eps) / alpha + sigma_r * eps
    else:
        velocity, plain = cond[1] - cond[0], uncond[1] - uncond[0]
        by_hand = x + (sigma_r - sigma) * (plain + guidance * (velocity - plain))
    torch.testing.assert_close(seen[-1][1], by_hand, atol=2e-5, rtol=2e-5)


@KINDS
def test_without_guidance_the_teachers_step_is_its_conditional_one(schedule, prediction):
    """normalcfg: half the teacher's rows, and the target of CFG 1."""
    work = batch([1000, 775, 400])
    with_scale, without = engine(schedule, prediction), engine(schedule, prediction)
    with_scale.step(work)
    without.step(replace(work, guidance=None))
    torch.testing.assert_close(seen[-1][1], seen[-2][1], atol=1e-5, rtol=1e-5)
    assert [call[0] for call in without.base.calls] == [3, 2, 3]


def test_the_clamp_divides_student_and_target_alike_and_not_the_teacher():
    """x0 = (x - sigma * eps) / max(alpha, 0.5) (arXiv 2405.18407, Eq. 39); the solver step keeps the base's own."""
    work = batch([1000, 600, 500], phases=1)
    one = engine(VP, phases=1, min_alpha=0.5)
    one.step(work)
    student, target = seen[-1]
    exact, (u, r) = Gaussian(VP), (work.levels.u, work.levels.u - 25)
    x_u = jump(work.x0, work.noise, VP.alpha(u), VP.sigma(u))
    x0, eps = exact(x_u, u, work.condition)
    x_r = jump(x0, eps, VP.alpha(r), VP.sigma(r))
    for jumped, x, tick in ((student, x_u, u), (target, x_r, r)):
        alpha, sigma = exact.level(tick)
        eps = exact(x, tick, work.condition)[1]
        torch.testing.assert_close(jumped, (x - sigma * eps) / alpha.clamp(min=0.5), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("batched", "teacher"), [(True, [10]), (False, [5, 5])])
def test_a_steps_network_calls(batched, teacher):
    """Teacher with both halves of the guidance, target without the rows that need none, student with gradient."""
    one = engine(VP)
    one.batched = batched
    one.step(batch([1000, 775, 275, 25, 500]))  # 775, 275 and 25 are one point above an edge
    assert one.base.calls == [*((rows, False, False) for rows in teacher), (2, True, False), (5, True, True)]
    assert one.base.switch.on


@KINDS
def test_a_target_of_whole_batches_is_the_same(schedule, prediction):
    """Rows that are their own target pass too, as torch.compile wants it, and stay what they are."""
    ones = [engine(schedule, prediction) for _ in range(2)]
    ones[1].whole_target = True
    losses = [one.step(batch([1000, 775, 400, 25])).distance for one in ones]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    rows = [[rows for rows, on, gradient in one.base.calls if on and not gradient] for one in ones]
    assert rows == [[2], [4]]


@KINDS
def test_both_halves_in_one_pass_or_in_two_are_the_same(schedule, prediction):
    losses = []
    for batched in (True, False):
        one = engine(schedule, prediction)
        one.batched = batched
        losses.append(one.step(batch([1000, 775, 400, 25], 5.5)).distance)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_the_target_is_not_asked_where_no_row_needs_it():
    one = engine(VP)
    one.step(batch([775, 25]))
    assert one.base.calls == [(2, False, False), (2, False, False), (2, True, True)]


def test_rows_do_not_mix():
    """Each sample's loss is the one it has alone."""
    starts = [1000, 775, 400, 25]
    work = batch(starts, 4.0)
    together = engine(VP).step(work).distance
    for i in range(len(starts)):
        x0, noise, guidance = (getattr(work, k)[i : i + 1] for k in ("x0", "noise", "guidance"))
        levels = Levels(*(getattr(work.levels, k)[i : i + 1] for k in ("u", "r", "s")))
        alone = Batch(x0, noise, levels, guidance, {"hidden": torch.full((1, 1), MEAN)})
        torch.testing.assert_close(engine(VP).step(alone).distance[0], together[i])


def test_gradients_flow_through_the_student_alone():
    exact = Gaussian(VP)
    weights = {name: torch.ones((), requires_grad=True) for name in ("teacher", "student")}

    def network(name):
        return lambda x, tick, c: tuple(weights[name] * part for part in exact(x, tick, c))

    one = engine(VP, teacher=network("teacher"), student=network("student"))
    losses = one.step(batch([1000, 500, 300])).distance
    student, target = seen[-1]
    assert student.requires_grad and not target.requires_grad
    through_student = torch.autograd.grad(
        huber(student, target, one.objective.huber_c).sum(), weights["student"], retain_graph=True
    )
    losses.sum().backward()
    assert weights["teacher"].grad is None
    assert weights["student"].grad == through_student[0] != 0


def test_v_and_eps_networks_of_one_gaussian_have_one_loss():
    work = batch([1000, 775, 500, 25], 5.0)
    losses = [engine(VP, prediction).step(work).distance for prediction in ("epsilon", "v_prediction")]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-6)


def test_the_distance_is_pseudo_huber():
    zero = torch.zeros(1, 4, 2, 2)
    assert huber(zero, zero, 1e-3).item() == 0
    near, far = (huber(torch.full(zero.shape, d), zero, 1e-3).item() for d in (1e-4, 10.0))
    assert near == pytest.approx(1e-4**2 / 2e-3, rel=0.01)  # quadratic near zero
    assert far == pytest.approx(10, rel=1e-3)  # linear far away


def test_a_discriminator_judges_inside_the_starts_phase():
    """Above the phase's edge up to its noisy end, every solver point alike often."""
    levels = batch([1000, 700, 250]).levels
    many = Levels(*(getattr(levels, k).repeat_interleave(4000) for k in ("u", "r", "s")))
    ticks = PCM().judged_at(many, torch.Generator().manual_seed(0)).view(3, -1)
    for row, top in zip(ticks, (1000, 750, 250), strict=True):
        values, counts = row.unique(return_counts=True)
        assert torch.equal(values, torch.arange(top - 225, top + 1, 25))
        assert counts.float().std() < 40  # about 19 for a uniform draw


def test_dropped_prompts_are_as_many_as_asked_for():
    dropped = PCM(guidance_mode="normalcfg").draw_dropped(20_000, torch.Generator().manual_seed(0))
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert not PCM().draw_dropped(1000, torch.Generator().manual_seed(0)).any()


def test_starts_and_guidance_cover_their_ranges():
    objective = PCM()
    draw = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    starts, scales = objective.start(8000, draw()), objective.draw_guidance(8000, 0.0, draw())
    assert torch.equal(starts.unique(), torch.arange(25, 1001, 25))
    assert starts.bincount(minlength=1001)[25::25].float().std() < 25  # about 14 for a uniform draw
    assert (
        5 <= scales.min() < 5.01 and 5.99 < scales.max() <= 6 and scales.mean().item() == pytest.approx(5.5, abs=0.02)
    )
    assert torch.equal(starts, objective.start(8000, draw()))
