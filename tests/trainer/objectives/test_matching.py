"""Distribution matching where the truth is known: affine students of Gaussian noise, exact critics, exact teachers."""

from contextlib import contextmanager

import pytest
import torch

from phased_consistency.samplers import jump
from phased_consistency.trainer.objectives import DMD, TDM, Criticised, Levels
from phased_consistency.trainer.objectives.matching import HIGHEST, LEAST, slope
from phased_consistency.trainer.training.engine import Batch
from phased_consistency.trainer.training.matching import MatchingEngine
from support.closed_form import (
    FLOW,
    MEAN,
    NULL,
    NULL_MEAN,
    SCHEDULES,
    STD,
    VP,
    ZERO_SNR,
    Gaussian,
    StubBase,
    Switch,
    seeded,
)
from support.family_order import MODES
from support.family_order import STD as SPREAD

SHAPE, ROWS = (4, 2, 2), 4096
EXACT = {"weighting": "divergence", "scale": 1.0}
OBJECTIVES = pytest.mark.parametrize(
    "objective",
    [TDM(phases=4, **EXACT), TDM(phases=2, landing="anywhere", **EXACT), DMD(steps=1, **EXACT), DMD(steps=3, **EXACT)],
    ids=["tdm", "tdm-anywhere", "dmd-1", "dmd-3"],
)


class Affine:
    """x0 = a_k + b_k x at the start of jump k; the points that it starts from are normal, and so is what follows."""

    def __init__(self, objective, schedule, a=0.3, b=0.2):
        self.schedule, self.starts = schedule, objective.starts()
        self.a = torch.full((len(self.starts),), a, requires_grad=True)
        self.b = torch.full((len(self.starts),), b, requires_grad=True)

    def at(self, tick):
        return sum((tick == start) * k for k, start in enumerate(self.starts))

    def __call__(self, x, tick, condition):
        k = self.at(tick)
        x0 = self.a[k].view(-1, 1, 1, 1) + self.b[k].view(-1, 1, 1, 1) * x
        alpha, sigma = (c(tick).view(-1, 1, 1, 1) for c in (self.schedule.alpha, self.schedule.sigma))
        return x0, (x - alpha * x0) / sigma


class Trajectory:
    """Mean and variance of an affine student's starts and landings, jump by jump, for fixed landings."""

    def __init__(self, student, objective, levels):
        self.student, self.schedule = student, student.schedule
        self.u, self.s = levels.u[0], levels.s[0]
        mean, variance = torch.zeros(()), torch.ones(())
        self.starts = []
        for k in range(len(self.u)):
            self.starts.append((mean, variance))
            if k + 1 < len(self.u):
                mean, variance = self._next(k, mean, variance, fresh=objective.gamma > 0)

    def _next(self, k, mean, variance, fresh):
        with torch.no_grad():
            if not fresh:
                return self._jump(k, mean, variance, self.u[k + 1])
            mean, variance = self._jump(k, mean, variance, torch.tensor(0))
            alpha, sigma = self.schedule.alpha(self.u[k + 1]), self.schedule.sigma(self.u[k + 1])
            return alpha * mean, alpha**2 * variance + sigma**2

    def _jump(self, k, mean, variance, to):
        c = slope(self.schedule, self.u[k : k + 1], to.view(1)).squeeze()
        along = c * self.student.b[k] + self.schedule.sigma(to) / self.schedule.sigma(self.u[k])
        return c * self.student.a[k] + along * mean, along**2 * variance

    def renoised(self, k, tick):
        """Mean and variance of landing k at `tick`, differentiable in the student."""
        mean, variance = self._jump(k, *self.starts[k], self.s[k])
        kept = self.schedule.alpha(tick) / self.schedule.alpha(self.s[k])
        added = self.schedule.sigma(tick) ** 2 - (kept * self.schedule.sigma(self.s[k])) ** 2
        return kept * mean, kept**2 * variance + added

    def critic(self, ticks):
        """The exact x0 of the landings' density; ticks: (K,) one for each jump."""
        moments = [tuple(m.detach() for m in self.renoised(k, tick)) for k, tick in enumerate(ticks)]

        def network(x, tick, condition):
            k = sum((tick == t) * i for i, t in enumerate(ticks))
            mean, variance = (torch.stack(c)[k].view(-1, 1, 1, 1) for c in zip(*moments, strict=True))
            return x0_of_score(self.schedule, x, tick, (mean - x) / variance)

        return network


def x0_of_score(schedule, x, tick, score):
    alpha, sigma = (c(tick).view(-1, 1, 1, 1) for c in (schedule.alpha, schedule.sigma))
    x0 = (x + sigma**2 * score) / alpha
    return x0, (x - alpha * x0) / sigma


class StubCritic:
    """Stands for the critic: the base's student is this network while it is asked or learns."""

    rounds = warmup = 0

    def __init__(self, base, network):
        self.base, self.network = base, network

    @contextmanager
    def asked(self):
        student, self.base.student = self.base.student, self.network
        try:
            yield
        finally:
            self.base.student = student

    learning = asked


def trial(objective, schedule, rows=ROWS, ticks=None):
    """A batch whose trajectories all land and are re-noised at the same ticks, and these ticks (K,)."""
    levels = objective.levels(1, schedule, 0.0, seeded())
    levels = Levels(*(getattr(levels, name).expand(rows, -1) for name in ("u", "r", "s")))
    draws = objective.draws(levels, SHAPE, seeded(1))
    ticks = draws.tick[0, :, 0] if ticks is None else torch.tensor(ticks)
    draws.tick[:] = ticks[:, None]
    if len(set(ticks.tolist())) < len(ticks):  # a stub's critic knows a jump by its tick
        draws.tick[:] = ticks[:, None] = ticks + torch.arange(len(ticks))
    noise = torch.randn(rows, *SHAPE, generator=seeded(2))
    condition = {"hidden": torch.full((rows, 1), MEAN)}
    return Batch(None, noise, levels, torch.ones(rows), condition, draws=draws), ticks


def made(objective, schedule, prediction, student, teacher, critic):
    switch = Switch()
    base = StubBase(schedule, prediction, switch, teacher, student)
    return MatchingEngine(base, switch, objective, NULL, StubCritic(base, critic))


def gradients(engine, batch, student):
    student.a.grad = student.b.grad = None
    engine.step(batch).distance.mean().backward()
    return torch.cat([student.a.grad, student.b.grad])


# --- the student's gradient


@SCHEDULES
@OBJECTIVES
def test_the_gradient_is_that_of_the_divergence_to_a_gaussian(objective, schedule, prediction):
    """KL(q_t || p_t) of two normal densities in closed form, in value and sign, over the student's mean and spread."""
    batch, ticks = trial(objective, schedule)
    student = Affine(objective, schedule)
    way = Trajectory(student, objective, batch.levels)
    engine = made(objective, schedule, prediction, student, Gaussian(schedule), way.critic(ticks))
    actual = gradients(engine, batch, student)

    divergence = 0
    for k, tick in enumerate(ticks):
        mean, variance = way.renoised(k, tick)
        alpha, sigma = schedule.alpha(tick), schedule.sigma(tick)
        of_teacher = alpha**2 * STD**2 + sigma**2
        divergence += ((mean - alpha * MEAN) ** 2 / of_teacher + variance / of_teacher - variance.log()) / 2
    expected = torch.cat(torch.autograd.grad(divergence / len(ticks), [student.a, student.b]))
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@SCHEDULES
@OBJECTIVES
def test_the_gradient_is_that_of_the_divergence_to_two_gaussians(objective, schedule, prediction):
    """The same by quadrature, where the teacher's density has two modes."""
    batch, ticks = trial(objective, schedule)
    student = Affine(objective, schedule)
    way = Trajectory(student, objective, batch.levels)

    def log_density(x, alpha, sigma):
        variance = alpha**2 * SPREAD**2 + sigma**2
        return torch.logsumexp(-((x.unsqueeze(-1) - alpha * MODES) ** 2) / (2 * variance), -1)

    def teacher(x, tick, condition):
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            level = (c(tick).view(-1, 1, 1, 1, 1) for c in (schedule.alpha, schedule.sigma))
            (score,) = torch.autograd.grad(log_density(point, *level).sum(), point)
        return x0_of_score(schedule, x, tick, score)

    engine = made(objective, schedule, prediction, student, teacher, way.critic(ticks))
    actual = gradients(engine, batch, student)

    divergence = 0
    for k, tick in enumerate(ticks):
        mean, variance = way.renoised(k, tick)
        nodes = torch.linspace(-8, 8, 4001)
        weights = torch.exp(-(nodes**2) / 2)
        x = mean + variance.sqrt() * nodes  # re-parametrised, as the student is
        log_p = log_density(x, schedule.alpha(tick), schedule.sigma(tick))
        divergence += -variance.log() / 2 - (weights * log_p).sum() / weights.sum()
    expected = torch.cat(torch.autograd.grad(divergence / len(ticks), [student.a, student.b]))
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.03 * expected.abs().max().item())


@pytest.mark.parametrize(("schedule", "prediction"), [(ZERO_SNR, "v_prediction"), (FLOW, "flow")])
@pytest.mark.parametrize("weighting", ["distance", "divergence"])
def test_a_student_that_draws_as_the_teacher_does_stays(schedule, prediction, weighting):
    """Its jumps are the teacher's exact flow from pure noise on, so that every landing has the teacher's density; the
    critic is that of the student's own moments. A student a little off is moved."""
    objective = TDM(phases=4, weighting=weighting, scale=1.0)
    batch, ticks = trial(objective, schedule)

    def moved(off):
        student, exact = Affine(objective, schedule), Gaussian(schedule)
        u, s = batch.levels.u[0], batch.levels.s[0]
        with torch.no_grad():  # x0 of the jump that lands on the flow, which is affine: from its values at 0 and 1
            jumps = exact.landing(lambda tick: s[student.at(tick)])
            at = [jumps(torch.full((4, 1, 1, 1), x), u, batch.condition)[0].flatten() for x in (0.0, 1.0)]
            student.a.copy_(at[0] + off)
            student.b.copy_(at[1] - at[0])
        critic = Trajectory(student, objective, batch.levels).critic(ticks)
        return made(objective, schedule, prediction, student, exact, critic).step(batch).distance.max()

    assert moved(0.0) < 1e-4 * moved(0.05)


def test_the_pull_is_over_the_mean_distance_to_the_guided_teacher():
    """Half the mean square of (fake - real) / mean |x0 - real| for each sample, with real = uncond + scale (cond -
    uncond)."""
    objective, rows = DMD(steps=1, scale=3.0), 64
    batch, ticks = trial(objective, VP, rows)
    student, teacher = Affine(objective, VP), Gaussian(VP)
    critic = Trajectory(student, objective, batch.levels).critic(ticks)
    engine = made(objective, VP, "epsilon", student, teacher, critic)
    loss = engine.step(batch).distance

    unrolled, tick = engine.unrolled(batch), batch.draws.tick[:, 0, 0]
    x = jump(unrolled.x0[0], batch.draws.noise[:, 0, 0], VP.alpha(tick), VP.sigma(tick))
    cond, uncond = (teacher(x, tick, {"hidden": torch.full((rows, 1), m)})[0] for m in (MEAN, NULL_MEAN))
    real = uncond + 3 * (cond - uncond)
    pull = (critic(x, tick, {})[0] - real) / (unrolled.x0[0] - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(loss.detach(), 0.5 * pull.square().mean((1, 2, 3)), rtol=1e-3, atol=1e-6)


def test_guidance_can_be_taken_at_levels_of_its_own():
    objective, rows = DMD(steps=1, scale=3.0, guidance_levels="all", weighting="divergence"), 64
    batch, ticks = trial(objective, VP, rows)
    student, teacher = Affine(objective, VP), Gaussian(VP)
    engine = made(
        objective, VP, "epsilon", student, teacher, Trajectory(student, objective, batch.levels).critic(ticks)
    )
    fake, real, push, tick = engine._scores(engine.unrolled(batch), 0)
    x0 = engine.unrolled(batch).x0[0]
    guided, noise = batch.draws.guided_tick[:, 0], batch.draws.guided_noise[:, 0]
    x = jump(x0, noise, VP.alpha(guided), VP.sigma(guided))
    cond, uncond = (teacher(x, guided, {"hidden": torch.full((rows, 1), m)})[0] for m in (MEAN, NULL_MEAN))
    torch.testing.assert_close(push, cond - uncond, rtol=1e-3, atol=1e-4)
    at_own = jump(x0, batch.draws.noise[:, 0, 0], VP.alpha(tick), VP.sigma(tick))
    torch.testing.assert_close(real, teacher(at_own, tick, batch.condition)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("schedule", "prediction"), [(VP, "epsilon"), (FLOW, "flow")])
def test_an_anchor_is_left_at_the_teachers_own_trajectory(schedule, prediction):
    """The first jump alone, whose loss is then zero; the others match as without it."""
    objective = TDM(phases=2, anchor=2.0, anchor_steps=1, guidance=(1.0, 1.0), **EXACT)
    batch, ticks = trial(objective, schedule, rows=64)
    student, teacher = Affine(objective, schedule), Gaussian(schedule)
    critic = Trajectory(student, objective, batch.levels).critic(ticks)
    engine = made(objective, schedule, prediction, teacher, teacher, critic)
    first, *others = (run().distance for run in engine.passes(engine.unrolled(batch)))
    assert first.max() < 1e-6 and len(others) == 1
    engine = made(objective, schedule, prediction, student, teacher, critic)
    first, *_ = (run().distance for run in engine.passes(engine.unrolled(batch)))
    first.mean().backward()
    assert first.min() > 1e-3 and student.a.grad[0] != 0 and student.a.grad[1] == 0


# --- the critic


@SCHEDULES
@pytest.mark.parametrize(
    "objective",
    [DMD(steps=2, **EXACT), TDM(phases=4, critic_target="score", **EXACT)],
    ids=lambda objective: objective.name,
)
def test_the_critics_optimum_is_the_students_score(objective, schedule, prediction):
    """At the exact score the gradient of its loss vanishes over its mean and slope; a little off it leads back."""
    batch, ticks = trial(objective, schedule, rows=4 * ROWS)
    student = Affine(objective, schedule)
    exact = Trajectory(student, objective, batch.levels).critic(ticks)
    shift, tilt = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)

    def gradient(off):
        def network(x, tick, condition):
            x0, _ = exact(x, tick, condition)
            x0 = x0 + shift.sum() + off + (tilt.sum() + off) * x0
            alpha, sigma = (c(tick).view(-1, 1, 1, 1) for c in (schedule.alpha, schedule.sigma))
            return x0, (x - alpha * x0) / sigma

        engine = made(objective, schedule, prediction, student, Gaussian(schedule), network)
        shift.grad = tilt.grad = None
        unrolled = engine.unrolled(batch)
        sum(run().mean() for run in engine.opponent_passes(unrolled, 0)).backward()
        return torch.stack([shift.grad[0], tilt.grad[0]])

    here, above = gradient(0.0), gradient(0.1)
    assert (above > 0).all() and (here.abs() < 0.05 * above).all(), (here, above)


def test_the_importance_weight_is_the_likelihood_of_the_noise_beside_the_students_x0():
    """exp(-|mixed|^2 / 2D) / exp(-|drawn|^2 / 2D), times the SNR up to 5 and the squares; 1 where they are equal."""
    tick, s = torch.tensor([600, 300]), torch.tensor([500, 0])
    x0, noise = torch.randn(2, *SHAPE, generator=seeded(3)), torch.randn(2, *SHAPE, generator=seeded(4))
    mixed = torch.randn(2, *SHAPE, generator=seeded(5))
    mixed[1] = noise[1]
    point, prediction = jump(x0, mixed, VP.alpha(tick), VP.sigma(tick)), x0 + 0.5
    seen = Criticised(prediction, x0, point, noise, s, tick, VP)
    snr = (VP.alpha(tick) / VP.sigma(tick)).square().clamp(max=5)
    likely = ((noise.square() - mixed.square()).mean((1, 2, 3)) / 2).exp()
    torch.testing.assert_close(TDM().critic_loss(seen), 0.25 * snr * likely, rtol=1e-4, atol=0)
    torch.testing.assert_close(TDM(importance=False).critic_loss(seen), 0.25 * snr, rtol=1e-4, atol=0)
    assert likely[1] == 1 and likely[0] != 1


# --- trajectories


@SCHEDULES
@OBJECTIVES
def test_landings_are_renoised_with_the_exact_variance(objective, schedule, prediction):
    batch, ticks = trial(objective, schedule)
    student = Affine(objective, schedule)
    way = Trajectory(student, objective, batch.levels)
    engine = made(objective, schedule, prediction, student, Gaussian(schedule), way.critic(ticks))
    unrolled = engine.unrolled(batch)
    for k, tick in enumerate(ticks):
        points = engine._renoised(unrolled, k, tick.expand(ROWS), batch.draws.noise[:, k, 0])
        mean, variance = way.renoised(k, tick)
        assert points.mean().item() == pytest.approx(mean.item(), abs=0.02)
        assert points.var().item() == pytest.approx(variance.item(), rel=0.02)


@OBJECTIVES
def test_levels_lie_in_their_region(objective):
    for region in ("phase", "all", "above"):
        row = objective.model_copy(update={"matching_levels": region})
        levels = row.levels(2000, VP, 0.0, seeded())
        tick = row.draws(levels, (1, 1, 1), seeded()).tick
        u, s = levels.u[..., None], levels.s[..., None]
        assert (tick > s).all() and (tick <= HIGHEST).all()
        wide = u - s > LEAST
        assert (tick[wide.expand_as(tick)] >= (s + LEAST).expand_as(tick)[wide.expand_as(tick)]).all()
        if region == "phase":
            assert (tick <= u).all()
        if region == "above":
            assert (tick >= u)[(u < HIGHEST).expand_as(tick)].all()
        else:
            top = (u if region == "phase" else torch.full_like(u, 1000)).clamp(max=HIGHEST)
            assert (tick == top).any((0, 2)).all() and (tick == s + LEAST).any(), "both ends are reached"


def test_anywhere_reaches_the_whole_phase():
    levels = TDM(phases=2, landing="anywhere").levels(5000, VP, 0.0, seeded())
    low, high = levels.s.min(0).values, levels.s.max(0).values
    assert low.tolist() == [500, 0] and high.tolist() == [HIGHEST - LEAST, 500 - LEAST]


def test_every_way_of_dmd_starts_where_it_is_sampled():
    row = DMD(points=40, steps=4)
    assert row.starts() == (1000, 750, 500, 250) and TDM(phases=4).starts() == row.starts()
    assert not row.levels(3, VP, 0.0, seeded()).s.any()
    assert row.sampling() | {"objective": "dmd", "mode": "stochastic", "gamma": 1.0, "steps": 4} == row.sampling()
    assert TDM().sampling()["mode"] == "deterministic"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"phases": 1}, "phases = 1 has no trajectory for tdm .* objective.name=dmd objective.steps=1"),
        ({"guidance_mode": "normalcfg", "scale": 2.0}, "scale = 2 distils guidance in, .* is normalcfg"),
        ({"scale": 1.0, "guidance_levels": "all"}, "guidance_levels = all: without guidance"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        TDM(**settings)
