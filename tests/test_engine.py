"""One training step on stub networks with closed forms: a Gaussian has an exact denoiser and an exact flow."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from phased_consistency.samplers import FlowSchedule, PhaseGrid, VPSchedule, jump, output_from_x0_eps
from phased_consistency.trainer.engine import Batch, Engine
from phased_consistency.trainer.families import Base
from phased_consistency.trainer.objectives import OBJECTIVES, PCM

VP, FLOW = VPSchedule.from_betas(), FlowSchedule(3.0)
KINDS = pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(VP, "epsilon"), (VP, "v_prediction"), (FLOW, "flow")],
    ids=["vp-eps", "vp-v", "flow"],
)
MEAN, NULL_MEAN, STD = 0.7, -0.2, 0.4  # of the data: with their prompt, without one; and their spread


class Switch:
    """Stands for the adapter: on, or off inside `off()`."""

    on = True

    @contextmanager
    def off(self):
        self.on = False
        try:
            yield
        finally:
            self.on = True


class Gaussian:
    """Exact (x0, eps) and exact probability-flow map for N(m, STD^2) data; the prompt says m."""

    def __init__(self, schedule):
        self.schedule = schedule

    def level(self, tick):
        return (c(tick).view(-1, 1, 1, 1) for c in (self.schedule.alpha, self.schedule.sigma))

    def __call__(self, x, tick, condition):
        alpha, sigma = self.level(tick)
        mean = condition["hidden"].view(-1, 1, 1, 1)
        x0 = mean + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * mean)
        return x0, (x - alpha * x0) / sigma

    def flow(self, x, tick, to, mean=MEAN):
        (alpha, sigma), (alpha_to, sigma_to) = self.level(tick), self.level(to)
        std, std_to = ((a**2 * STD**2 + s**2).sqrt() for a, s in ((alpha, sigma), (alpha_to, sigma_to)))
        return alpha_to * mean + std_to / std * (x - alpha * mean)

    def perfect_student(self, grid):
        """What a perfect training would give: its jump to the phase's edge lands on the exact flow."""

        def network(x, tick, condition):
            to = grid.target(tick)
            (alpha, sigma), (alpha_to, sigma_to) = self.level(tick), self.level(to)
            x0 = (self.flow(x, tick, to) - sigma_to / sigma * x) / (alpha_to - sigma_to / sigma * alpha)
            return x0, (x - alpha * x0) / sigma

        return network


class StubBase:
    """What the engine asks of a base; notes each call's rows, switch and gradient mode."""

    with_null = staticmethod(Base.with_null)

    def __init__(self, schedule, prediction, switch, teacher, student):
        self.schedule, self.prediction, self.switch = schedule, prediction, switch
        self.teacher, self.student, self.calls = teacher, student, []

    def denoise(self, x, tick, condition):
        assert len(x) == len(tick) == len(condition["hidden"])
        self.calls.append((len(x), self.switch.on, torch.is_grad_enabled()))
        x0, eps = (self.student if self.switch.on else self.teacher)(x, tick, condition)
        level = self.schedule.alpha(tick), self.schedule.sigma(tick)
        return output_from_x0_eps(x0, eps, *level, self.prediction)


class Watched(PCM):
    """The objective, remembering what it compared."""

    def distance(self, student, target):
        seen.append((student, target))
        return super().distance(student, target)


seen: list[tuple[torch.Tensor, torch.Tensor]] = []


def engine(schedule, prediction="epsilon", grid=None, teacher=None, student=None, **choices):
    grid = grid or PhaseGrid(40, 4)
    exact, switch = Gaussian(schedule), Switch()
    base = StubBase(schedule, prediction, switch, teacher or exact, student or exact)
    return Engine(base, switch, Watched(grid, (1.0, 1.0), **choices), {"hidden": torch.full((1, 1), NULL_MEAN)})


def batch(start, guidance=1.0):
    start = torch.as_tensor(start)
    shape = (len(start), 4, 2, 2)
    generator = torch.Generator().manual_seed(1)
    x0, noise = MEAN + STD * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    return Batch(x0, noise, start, torch.full((len(start),), guidance), {"hidden": torch.full((len(start), 1), MEAN)})


@KINDS
def test_a_perfect_student_is_left_with_the_solvers_error(schedule, prediction):
    """Of second order in the step's length for one first-order step, and nothing else."""
    starts, losses = [700, 450, 200], {}
    for points in (40, 100, 200):
        grid = PhaseGrid(points, 4)
        perfect = Gaussian(schedule).perfect_student(grid)
        one = engine(schedule, prediction, grid, student=perfect, huber_c=1e-9)
        losses[points] = one.step(batch(starts)).distance.double()
    for coarse, fine in ((40, 100), (100, 200)):
        order = (losses[coarse] / losses[fine]).log() / torch.tensor(fine / coarse).log()
        assert ((order > 1.7) & (order < 2.3)).all(), (coarse, fine, order)


@KINDS
def test_an_imperfect_student_is_told_apart(schedule, prediction):
    """The teacher itself jumps straight to the edge: far from the flow's end."""
    grid = PhaseGrid(100, 4)
    student, work = Gaussian(schedule).perfect_student(grid), batch([950, 700])
    perfect = engine(schedule, prediction, grid, student=student).step(work).distance
    assert (engine(schedule, prediction, grid).step(work).distance > 5 * perfect).all()


@KINDS
def test_the_boundary_condition_is_exact(schedule, prediction):
    """As many points as phases: the target is the teacher's own step, which the identity adapter takes too."""
    losses = engine(schedule, prediction, PhaseGrid(4, 4)).step(batch([1000, 750, 500, 250])).distance
    assert losses.tolist() == [0, 0, 0, 0]


@KINDS
@pytest.mark.parametrize("guidance", [1.0, 5.5])
def test_the_teachers_step_is_guided_ddim(schedule, prediction, guidance):
    """DDIM's formula for VP, Euler's for flow."""
    one, work = engine(schedule, prediction, PhaseGrid(4, 4)), batch([1000, 750, 500], guidance)
    one.step(work)
    exact, (u, r) = Gaussian(schedule), (work.start, work.start - 250)
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
    grid, work = PhaseGrid(40, 1), batch([1000, 600, 500])
    one = engine(VP, grid=grid, min_alpha=0.5)
    one.step(work)
    student, target = seen[-1]
    exact, (u, r) = Gaussian(VP), (work.start, work.start - 25)
    x_u = jump(work.x0, work.noise, VP.alpha(u), VP.sigma(u))
    x0, eps = exact(x_u, u, work.condition)
    x_r = jump(x0, eps, VP.alpha(r), VP.sigma(r))
    for jumped, x, tick in ((student, x_u, u), (target, x_r, r)):
        alpha, sigma = exact.level(tick)
        eps = exact(x, tick, work.condition)[1]
        torch.testing.assert_close(jumped, (x - sigma * eps) / alpha.clamp(min=0.5), atol=1e-4, rtol=1e-4)


def test_three_network_calls_a_step():
    """Teacher with both halves of the guidance, target without the rows that need none, student with gradient."""
    one = engine(VP)
    one.step(batch([1000, 775, 275, 25, 500]))  # 775, 275 and 25 are one point above an edge
    assert one.base.calls == [(10, False, False), (2, True, False), (5, True, True)]
    assert one.base.switch.on


def test_the_target_is_not_asked_where_no_row_needs_it():
    one = engine(VP)
    one.step(batch([775, 25]))
    assert one.base.calls == [(4, False, False), (2, True, True)]


def test_rows_do_not_mix():
    """Each sample's loss is the one it has alone."""
    starts = [1000, 775, 400, 25]
    work = batch(starts, 4.0)
    together = engine(VP).step(work).distance
    for i in range(len(starts)):
        alone = Batch(
            *(getattr(work, k)[i : i + 1] for k in ("x0", "noise", "start", "guidance")),
            {"hidden": torch.full((1, 1), MEAN)},
        )
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
        PCM.distance(one.objective, student, target).sum(), weights["student"], retain_graph=True
    )
    losses.sum().backward()
    assert weights["teacher"].grad is None
    assert weights["student"].grad == through_student[0] != 0


def test_v_and_eps_networks_of_one_gaussian_have_one_loss():
    work = batch([1000, 775, 500, 25], 5.0)
    losses = [engine(VP, prediction).step(work).distance for prediction in ("epsilon", "v_prediction")]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-6)


def test_the_distance_is_pseudo_huber():
    objective, shape = PCM(PhaseGrid(40, 4), (5.0, 6.0), huber_c=1e-3), (1, 4, 2, 2)
    zero = torch.zeros(shape)
    assert objective.distance(zero, zero).item() == 0
    near, far = (objective.distance(torch.full(shape, d), zero).item() for d in (1e-4, 10.0))
    assert near == pytest.approx(1e-4**2 / 2e-3, rel=0.01)  # quadratic near zero
    assert far == pytest.approx(10, rel=1e-3)  # linear far away


def test_a_discriminator_judges_inside_the_starts_phase():
    """Above the phase's edge up to its noisy end, every solver point alike often."""
    objective = PCM(PhaseGrid(40, 4), None)
    start = torch.tensor([1000, 700, 250]).repeat_interleave(4000)
    ticks = objective.judged_at(start, torch.Generator().manual_seed(0)).view(3, -1)
    for row, top in zip(ticks, (1000, 750, 250), strict=True):
        values, counts = row.unique(return_counts=True)
        assert torch.equal(values, torch.arange(top - 225, top + 1, 25))
        assert counts.float().std() < 40  # about 19 for a uniform draw


def test_dropped_prompts_are_as_many_as_asked_for():
    dropped = PCM(PhaseGrid(40, 4), None, prompt_dropout=0.1).draw_dropped(20_000, torch.Generator().manual_seed(0))
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert not PCM(PhaseGrid(40, 4), (5.0, 6.0)).draw_dropped(1000, torch.Generator().manual_seed(0)).any()


def test_starts_and_guidance_cover_their_ranges():
    objective = OBJECTIVES["pcm"](PhaseGrid(40, 4), (5.0, 6.0))
    draw = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    starts, scales = objective.start(8000, draw()), objective.draw_guidance(8000, draw())
    assert torch.equal(starts.unique(), torch.arange(25, 1001, 25))
    assert starts.bincount(minlength=1001)[25::25].float().std() < 25  # about 14 for a uniform draw
    assert (
        5 <= scales.min() < 5.01 and 5.99 < scales.max() <= 6 and scales.mean().item() == pytest.approx(5.5, abs=0.02)
    )
    assert torch.equal(starts, objective.start(8000, draw()))
