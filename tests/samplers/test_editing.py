"""The editing loop against Algorithm 4 of arXiv 2303.01469 written out, and its parts against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from phased_consistency.samplers import FlowSchedule, PhaseGrid, VPSchedule, jump, sample_phased, seeded_noise
from phased_consistency.samplers.editing import (
    CELL,
    Projected,
    ProjectedLatent,
    begin,
    canvas,
    check_latents,
    denoise_plan,
    denoising,
    estimated_noise,
    extended,
    finish,
    k_noise_to_signal,
    latent_noise,
    noised,
    slerp,
    slerped,
    stroke_plan,
)
from phased_consistency.samplers.operators import Colorize, Identity, Inpaint, SuperResolution

VP, FLOW = VPSchedule.from_betas(), FlowSchedule(3.0)
SCHEDULES = pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])


class NoVae:
    """Pictures for latents. bias: what decoding adds, as the error of a VAE."""

    def __init__(self, bias=0.0):
        self.bias, self.calls = bias, []

    def encode(self, pixels):
        self.calls.append(("encode", len(pixels)))
        return pixels

    def decode(self, latents):
        self.calls.append(("decode", len(latents)))
        return latents + self.bias


def picture(size=(64, 64), seed=0):
    return 0.3 + 0.4 * torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def mask():
    return F.pad(torch.ones(1, 1, 20, 24), (16, 24, 30, 14))


def consistency_function(x, sigma, **_):
    """Any smooth map will do: the algorithms must agree for every f."""
    return 0.5 + 0.3 * torch.tanh(x / (1 + sigma.view(-1, 1, 1, 1)))


def algorithm_4(f, y, known, omega, levels, noises):
    """As printed, A the identity: x ~ N(y, t1^2), then f, keep, re-noise. `known`: y's components where omega is 0."""
    x = y + levels[0] * noises[0]
    x = f(x, levels[0].view(1))
    x = known * (1 - omega) + x * omega
    for level, noise in zip(levels[1:], noises[1:], strict=True):
        x = f(x + level * noise, level.view(1))
        x = known * (1 - omega) + x * omega
    return x


def noises(number, like):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(like.shape, generator=generator) for _ in range(number)]


def test_with_an_identity_for_a_vae_it_is_algorithm_4():
    y, operator = picture(), Inpaint(picture(), mask(), grow=0)
    levels = VP.k_sigma(torch.tensor([750, 500, 250]))
    drawn = noises(3, y)
    start = noised(begin(operator, NoVae()), drawn[0], levels[0], VP)
    rest = iter(drawn[1:])
    project, steps = Projected(operator, NoVae()), torch.cat([levels, torch.zeros(1)])
    settings = {"schedule": VP, "gamma": 1.0, "project": project, "noise_sampler": lambda *_: next(rest)}
    ours = finish(operator, NoVae(), sample_phased(consistency_function, start, steps, **settings))
    expected = algorithm_4(consistency_function, operator.start, y, operator.hole, levels, drawn)
    assert (ours - expected).abs().max() < 1e-6


@SCHEDULES
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["inpaint", "colorize", "enlarge"])
def test_every_x0_agrees_with_what_is_known(schedule, gamma, kind):
    y = picture()
    operator = {"inpaint": Inpaint(y, mask(), grow=0), "colorize": Colorize(y), "enlarge": SuperResolution(y, 2)}[kind]
    seen, sigmas = [], schedule.k_sigma(torch.tensor([1000, 750, 500, 250, 0]))
    x = noised(operator.start, noises(1, operator.start)[0], sigmas[0], schedule)
    settings = {
        "schedule": schedule,
        "gamma": gamma,
        "extra_args": {"seed": 1},
        "project": Projected(operator, NoVae()),
    }
    sample_phased(lambda x, s, **_: x.clamp(0, 1), x, sigmas, callback=lambda d: seen.append(d["denoised"]), **settings)
    assert len(seen) == 4
    for x0 in seen:
        assert (operator.project(x0) - x0).abs().max() < 2e-6


@SCHEDULES
def test_deterministic_steps_go_on_from_the_projected_point(schedule):
    """x is on the line through the projected x0 and the noise that x holds beside it: the host's Euler step."""
    y, sigmas = picture(), schedule.k_sigma(torch.tensor([750, 500, 0]))
    operator = Colorize(y)
    x = noised(y, noises(1, y)[0], sigmas[0], schedule)
    points = []
    settings = {"schedule": schedule, "project": Projected(operator, NoVae())}
    sample_phased(lambda x, s, **_: x.clamp(0, 1), x, sigmas, callback=points.append, **settings)
    x0 = points[0]["denoised"]
    eps = (x - schedule.k_alpha(sigmas[0]) * x0) / sigmas[0]
    assert (points[1]["x"] - jump(x0, eps, schedule.k_alpha(sigmas[1]), sigmas[1])).abs().max() < 1e-5


def test_nothing_to_change_changes_nothing():
    """So a full hole is plain sampling, bit for bit, whatever the VAE loses."""
    full = Inpaint(picture(), torch.ones(1, 64, 64))
    x0 = picture(seed=1)
    assert torch.equal(Projected(full, NoVae(bias=0.02))(x0, 0), x0)
    assert Projected(Identity(picture()), NoVae())(x0, 0) is not None


def test_the_residual_form_takes_the_vaes_error_out():
    """A decoder that adds a constant: the residual form decodes to the projection, the plain one misses by it."""
    operator, x0 = SuperResolution(picture((32, 32)), 2), 0.8 * picture(seed=1)
    for residual, error in ((True, 0.0), (False, 0.05)):
        codec = NoVae(bias=0.05)
        pixels = codec.decode(Projected(operator, codec, residual=residual)(x0, 0))
        assert (pixels - operator.project(x0 + 0.05)).abs().max() == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize(("every", "projected"), [(1, 4), (2, 2), (3, 2), (4, 1), (9, 1)])
def test_every_nth_step_counts_back_from_the_last(every, projected):
    codec = NoVae()
    operator = Colorize(picture())
    sigmas = VP.k_sigma(torch.tensor([1000, 750, 500, 250, 0]))
    project = Projected(operator, codec, every)
    x = sample_phased(lambda x, s, **_: 0 * x + 0.4, picture(), sigmas, schedule=VP, project=project)
    assert codec.calls == [("decode", 1), ("encode", 2)] * projected
    assert (operator.project(x) - x).abs().max() < 1e-6
    with pytest.raises(ValueError, match="every is 0; 1 projects at each step"):
        Projected(operator, codec, 0)


@pytest.mark.parametrize(("every", "projected"), [(1, [2, 1, 0]), (2, [2, 0]), (3, [2])])
def test_a_blended_rim_takes_the_place_of_the_last_projection(every, projected):
    """Counted in steps, from the first of 4: the last is left to the result, the others to every n-th before it."""
    sigmas, codec, at = VP.k_sigma(torch.tensor([1000, 750, 500, 250, 0])), NoVae(), []
    project = Projected(Inpaint(picture(), mask(), grow=4), codec, every)
    for i in range(len(sigmas) - 1):
        before = len(codec.calls)
        project(picture(seed=1), 3 - i)
        at += [i] * (len(codec.calls) > before)
    assert at == sorted(projected)


def test_the_clamp_of_one_step_models_comes_before_the_projection():
    operator = Colorize(picture())
    settings = {"schedule": VP, "min_alpha": 0.5, "project": Projected(operator, NoVae())}
    x = sample_phased(lambda x, s, **_: 0 * x + 0.4, picture(), VP.k_sigma(torch.tensor([1000, 0])), **settings)
    assert (operator.project(x) - x).abs().max() < 1e-6


def test_in_latents_alone_the_known_cells_are_the_pictures():
    operator = Inpaint(picture((64, 128)), F.pad(torch.ones(1, 1, 3, 3), (30, 95, 8, 53)), grow=0)
    known, x0 = torch.randn(1, 4, 8, 16), torch.randn(1, 4, 8, 16)
    drawn = ProjectedLatent.of(operator, known)(x0, 0)
    changed = (drawn != known).any(1)[0].nonzero().tolist()
    assert changed == [[1, 3], [1, 4]]  # columns 30 to 32 lie in two cells
    assert torch.equal(drawn[..., 1, 3:5], x0[..., 1, 3:5])
    with pytest.raises(ValueError, match="Colorize keeps sums of pixels, which no cell of a latent holds"):
        ProjectedLatent.of(Colorize(picture()), known)


@pytest.mark.parametrize("size", [(1, 1), (50, 70), (64, 64), (65, 130)], ids=str)
def test_any_size_goes_in_and_comes_out(size):
    class Cells:
        """Encodes as a VAE does, cell by cell; a ragged picture would fail here."""

        def encode(self, pixels):
            assert all(side % CELL == 0 for side in pixels.shape[-2:])
            return F.pixel_unshuffle(pixels, CELL)

        def decode(self, latents):
            return F.pixel_shuffle(latents, CELL)

    operator = Identity(picture(size))
    latents = begin(operator, Cells())
    assert latents.shape[-2:] == tuple(side // CELL for side in canvas(size))
    assert torch.equal(finish(operator, Cells(), latents), operator.start)
    coloured = Colorize(picture(size, seed=1))
    x0 = Projected(coloured, Cells())(latents, 0)
    kept = finish(coloured, Cells(), x0)
    assert (coloured.project(kept) - kept).abs().max() < 1e-6


def test_the_canvas_is_the_next_multiple_and_repeats_the_edge():
    assert canvas((50, 70)) == (64, 72) and canvas((65, 64), 16) == (80, 64)
    x = extended(picture((50, 70)), (64, 72))
    assert torch.equal(x[..., 50:, :70], x[..., 49:50, :70].expand(-1, -1, 14, -1))
    assert torch.equal(x[..., :, 70:], x[..., :, 69:70].expand(-1, -1, -1, 2))


def test_a_vae_that_overflows_is_named():
    class Broken(NoVae):
        def decode(self, latents):
            return latents * torch.nan

    operator = Colorize(picture())
    for call in (lambda: Projected(operator, Broken())(picture(), 0), lambda: finish(operator, Broken(), picture())):
        with pytest.raises(ValueError, match="numbers that are not finite for a picture of 64x64.*fp32 or bf16"):
            call()


@SCHEDULES
@pytest.mark.parametrize("tick", [250, 750])
def test_noising_is_the_forward_process(schedule, tick):
    """In the network's units: alpha * x0 + sigma * noise."""
    x0, noise, sigma = picture(), noises(1, picture())[0], schedule.k_sigma(tick)
    expected = jump(x0, noise, schedule.alpha(tick), schedule.sigma(tick))
    assert (noised(x0, noise, sigma, schedule) * schedule.k_scale(sigma) - expected).abs().max() < 1e-5


@SCHEDULES
def test_at_the_noisiest_level_the_network_sees_the_noise_whole(schedule):
    """Times its unit in the host's convention: a product, as the host and diffusers have it."""
    noise, sigma = noises(1, picture())[0], schedule.k_sigma(1000)
    assert torch.equal(noised(0 * noise, noise, sigma, schedule), noise * (1 / schedule.k_scale(sigma)))


@SCHEDULES
def test_strokes_take_two_levels_of_the_papers_ratio(schedule):
    """One phase: sigma / alpha falls to 2.24 / 5.38, up to the grid; SD1.5's at strength 0.75 are 4.08 and 1.70."""
    plan = stroke_plan(PhaseGrid(1000, 1), schedule, 0.75)
    ratios = k_noise_to_signal(schedule)[list(plan.ticks)]
    assert plan.ticks[0] == 750 and len(plan.ticks) == 3 and plan.denoise == 0.75
    assert (ratios[1] / ratios[0]).item() == pytest.approx(2.24 / 5.38, abs=0.002)
    if schedule is VP:
        assert ratios.tolist() == pytest.approx([4.08, 1.70, 0], abs=0.01)


def test_strokes_from_pure_noise_take_two_levels_too():
    """Where a flow model's ratio is infinite, SD's last is taken: 14.6, and 6.08 after it."""
    start, second, end = stroke_plan(PhaseGrid(1000, 1), FLOW, 1.0).ticks
    assert (start, end) == (1000, 0)
    assert k_noise_to_signal(FLOW)[second].item() == pytest.approx(0.416 * 14.6, abs=0.05)


def test_strokes_keep_to_the_phases_where_there_are_some():
    plan = stroke_plan(PhaseGrid(40, 4), VP, 0.7)
    assert plan.ticks == (750, 500, 250, 0)
    assert plan.notes == ("denoise 0.7 starts at the nearest phase edge, which is 0.75: 3 of 4 steps.",)
    assert stroke_plan(PhaseGrid(50, 1), VP, 0.02).ticks == (20, 0)  # no level lies between


@SCHEDULES
def test_denoising_starts_at_the_first_level_that_is_as_noisy(schedule):
    grid, ratios = PhaseGrid(40, 4), k_noise_to_signal(schedule)
    for start, after in ((3, (0,)), (250, (0,)), (251, (250, 0)), (907, (750, 500, 250, 0))):
        for ratio in (ratios[start], ratios[start] * 0.9999):
            assert denoise_plan(grid, schedule, ratio.item() * (1 - 1e-6)).ticks == (start, *after)
    assert denoise_plan(grid, schedule, 0.0).ticks == (0,)
    assert denoise_plan(PhaseGrid(40, 1), schedule, ratios[300].item() * 0.9999, steps=3).ticks == (300, 200, 100, 0)
    assert denoise_plan(grid, schedule, 1e9).ticks[0] == 1000


def test_steps_that_the_phases_leave_no_room_for_are_said():
    grid, ratio = PhaseGrid(40, 4), k_noise_to_signal(VP)[300].item() * 0.9999
    assert denoise_plan(grid, VP, ratio).notes == denoise_plan(grid, VP, ratio, 2).notes == ()
    assert denoise_plan(grid, VP, ratio, 4).notes == ("From the level of this noise on there are 2 steps, not 4.",)


@SCHEDULES
def test_what_a_latent_lacks_of_its_level_is_put_in(schedule):
    """Its own noise and the share that is added make up the level's, in variance."""
    grey = torch.full((1, 3, 256, 256), 0.5)
    plan, share = denoising(NoVae(), grey, 0.1, PhaseGrid(40, 4), schedule)
    below, level = k_noise_to_signal(schedule)[plan.ticks[0] - 1 : plan.ticks[0] + 1].tolist()
    assert below < 0.1 * 1.01 and plan.ticks[1:] == (0,)
    assert (0.1**2 + (share * level) ** 2) ** 0.5 == pytest.approx(level, rel=0.02)
    assert denoising(NoVae(), grey, 0.0, PhaseGrid(40, 4), schedule)[1] == 0


def test_latents_of_another_picture_are_refused():
    operator = Colorize(picture((50, 70)).expand(2, -1, -1, -1))
    check_latents(operator, torch.zeros(2, 4, 8, 9))
    check_latents(Colorize(picture((50, 70))), torch.zeros(3, 4, 8, 9))
    with pytest.raises(ValueError, match="latent is of a picture of 128x64, and the edit works on 72x64"):
        check_latents(operator, torch.zeros(2, 4, 8, 16))
    with pytest.raises(ValueError, match="3 latents for an edit of 2 pictures"):
        check_latents(operator, torch.zeros(3, 4, 8, 9))


def test_the_noise_in_a_latent_is_measured():
    """An encoder that averages blocks of 8 x 8 leaves an eighth of white noise."""

    class Mean:
        def encode(self, pixels):
            return F.avg_pool2d(pixels, CELL)

    grey = torch.full((1, 3, 256, 256), 0.5)
    assert latent_noise(Mean(), grey, 0.1) == pytest.approx(0.1 / CELL, rel=0.03)
    assert latent_noise(Mean(), grey, 0.0) == 0


def test_noise_is_estimated_from_second_differences():
    ramp = torch.linspace(0.2, 0.8, 128).expand(1, 3, 128, 128)  # has none
    assert estimated_noise(ramp) < 1e-6
    for std in (0.01, 0.05):
        noisy = ramp + std * torch.randn(ramp.shape)
        assert estimated_noise(noisy) == pytest.approx(std, rel=0.05)
    assert estimated_noise(torch.zeros(1, 3, 1, 1)) == 0


def test_slerp_keeps_the_ends_and_the_norm_at_even_angles():
    a, b = noises(2, torch.zeros(1, 4, 16, 16))
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    assert torch.equal(slerp(a, a, 0.3), a) or (slerp(a, a, 0.3) - a).abs().max() < 1e-6

    a, b = (z / z.norm() for z in (a, b))
    for share in (0.25, 0.5, 0.75):
        middle = slerp(a, b, share)
        angle, whole = (math.acos((a * x).sum()) for x in (middle, b))
        assert angle == pytest.approx(share * whole, abs=1e-4)
        assert middle.norm().item() == pytest.approx(1, abs=1e-5)


def test_the_noise_between_steps_is_mixed_alike():
    like = torch.zeros(1, 4, 8, 8)
    ends = [seeded_noise(like, seed) for seed in (1, 2)]
    mixed = slerped(*(seeded_noise(like, seed) for seed in (1, 2)), 0.4)
    for _ in range(2):
        assert torch.equal(mixed(0, 0), slerp(*(end(0, 0) for end in ends), 0.4))
