"""Schedules against diffusers' tables and the host's numbers, and the algebra that all predictions share."""

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from phased_consistency.samplers import (
    FlowSchedule,
    VPSchedule,
    jump,
    output_from_x0_eps,
    renoise,
    sample_phased,
    x0_eps_from_output,
)
from phased_consistency.samplers.sampling import seeded_noise
from phased_consistency.samplers.schedule import RatioFlowSchedule

TICKS = torch.arange(1, 1001)
SCHEDULES = {
    "vp": VPSchedule.from_betas(),
    "vp-zero-snr": VPSchedule.from_betas(zero_terminal_snr=True),
    "flow-1": FlowSchedule(1.0),
    "flow-3": FlowSchedule(3.0),
}
PREDICTIONS = [("vp", "epsilon"), ("vp", "v_prediction"), ("vp-zero-snr", "v_prediction"), ("flow-3", "flow")]


def sd_scheduler(**options) -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


@pytest.mark.parametrize(("kind", "ends"), [("scaled_linear", (0.00085, 0.012)), ("linear", (0.0001, 0.02))])
def test_alphas_equal_diffusers(kind, ends):
    theirs = DDIMScheduler(beta_start=ends[0], beta_end=ends[1], beta_schedule=kind).alphas_cumprod
    ours = VPSchedule.from_betas(*ends, kind=kind)
    torch.testing.assert_close(ours.alpha(TICKS) ** 2, theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.sigma(TICKS) ** 2, 1 - theirs, atol=1e-6, rtol=0)


def test_zero_terminal_snr_equals_diffusers():
    betas = rescale_zero_terminal_snr(sd_scheduler().betas)
    theirs = (1 - betas).cumprod(0)
    ours = SCHEDULES["vp-zero-snr"]
    torch.testing.assert_close(ours.alpha(TICKS) ** 2, theirs, atol=1e-6, rtol=0)
    assert ours.alpha(1000) == 0 and ours.sigma(1000) == 1
    assert ours.k_sigma(1000).item() == pytest.approx(4518.76, rel=1e-4)  # the host's finite stand-in


def test_host_sigmas():
    sigmas = SCHEDULES["vp"].k_sigma(torch.tensor([1000, 750, 500, 250, 0]))
    torch.testing.assert_close(sigmas, torch.tensor([14.6146, 4.0817, 1.6129, 0.6932, 0.0]), atol=6e-5, rtol=0)


def test_from_k_sigmas_is_the_same_schedule():
    vp = SCHEDULES["vp"]
    again = VPSchedule.from_k_sigmas(vp.k_sigma(TICKS))
    torch.testing.assert_close(again.alpha(TICKS), vp.alpha(TICKS), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("shift", "sigmas"), [(1.0, [1, 0.75, 0.5, 0.25, 0]), (3.0, [1, 0.9, 0.75, 0.5, 0])])
def test_flow_sigmas(shift, sigmas):
    flow = FlowSchedule(shift)
    levels = torch.tensor([1000, 750, 500, 250, 0])
    torch.testing.assert_close(flow.sigma(levels), torch.tensor(sigmas, dtype=torch.float32))
    torch.testing.assert_close(flow.network_time(levels), 1000 * flow.sigma(levels))
    torch.testing.assert_close(flow.alpha(levels), 1 - flow.sigma(levels))


def test_network_time_of_vp_is_the_timestep():
    assert SCHEDULES["vp"].network_time(torch.tensor([1000, 250, 1])).tolist() == [999, 249, 0]


def test_the_clean_end_is_exact(schedule):
    assert schedule.alpha(0) == 1 and schedule.sigma(0) == 0 and schedule.k_sigma(0) == 0 and schedule.tick(0.0) == 0


@pytest.mark.parametrize("offset", [0.0, 0.25, 0.5])
def test_tick_inverts_k_sigma(schedule, offset):
    ticks = torch.arange(0, 999, dtype=torch.float64) + offset
    torch.testing.assert_close(schedule.tick(schedule.k_sigma(ticks)).double(), ticks, atol=2e-3, rtol=0)
    assert (schedule.k_sigma(ticks).diff() > 0).all()


def test_host_levels_are_the_schedule_in_another_convention(schedule):
    """A host point times k_scale is the network's point: alpha and sigma follow from k_sigma alone."""
    ticks = torch.arange(0, 1000)
    k = schedule.k_sigma(ticks)
    torch.testing.assert_close(schedule.k_scale(k) * schedule.k_alpha(k), schedule.alpha(ticks), atol=1e-6, rtol=0)
    torch.testing.assert_close(schedule.k_scale(k) * k, schedule.sigma(ticks), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "prediction"), PREDICTIONS)
def test_outputs_hold_x0_and_eps(name, prediction):
    schedule, ticks = SCHEDULES[name], torch.tensor([1, 40, 500, 999])
    alpha, sigma = schedule.alpha(ticks), schedule.sigma(ticks)
    x0, eps = torch.randn(2, 4, 3, 8, 8).unbind()
    x = jump(x0, eps, alpha, sigma)
    output = output_from_x0_eps(x0, eps, alpha, sigma, prediction)
    got_x0, got_eps = x0_eps_from_output(output, x, alpha, sigma, prediction)
    torch.testing.assert_close(got_x0, x0, atol=2e-5, rtol=0)  # eps-prediction divides by alpha, 1/15 at the noisy end
    torch.testing.assert_close(got_eps, eps, atol=2e-5, rtol=0)


def test_v_prediction_at_zero_snr_gives_x0():
    x0, eps = torch.randn(2, 1, 4, 8, 8).unbind()
    alpha, sigma = torch.tensor(0.0), torch.tensor(1.0)
    output = output_from_x0_eps(x0, eps, alpha, sigma, "v_prediction")
    torch.testing.assert_close(x0_eps_from_output(output, eps, alpha, sigma, "v_prediction")[0], x0)


def test_a_jump_is_the_same_in_every_convention():
    """VP (DDIM), the host's sigma space (Euler) and flow (Euler) land on one point, after scaling."""
    vp, x0, eps = SCHEDULES["vp"], *torch.randn(2, 1, 4, 8, 8, dtype=torch.float64).unbind()
    start, end = 750, 250
    reached = jump(x0, eps, vp.alpha(end), vp.sigma(end))

    k_start, k_end = vp.k_sigma(start), vp.k_sigma(end)
    ve = (x0 + k_start * eps) + (k_end - k_start) * eps
    torch.testing.assert_close((ve * vp.k_scale(k_end)).float(), reached, atol=1e-5, rtol=0)

    s_start, s_end = k_start / (1 + k_start), k_end / (1 + k_end)
    flow = (1 - s_start) * x0 + s_start * eps + (s_end - s_start) * (eps - x0)
    torch.testing.assert_close((flow * (1 + k_end) * vp.k_scale(k_end)).float(), reached, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1000), (250, 251), (249, 750), (500, 1000), (999, 1000)])
def test_renoise_reaches_the_marginal_of_the_higher_level(schedule, low, high):
    """For x0 ~ N(0, 0.3^2): Var[x_to] = (alpha_to * 0.3)^2 + sigma_to^2, and x_to keeps alpha_to of x0."""
    alpha, sigma, alpha_to, sigma_to = levels = [f(n) for n in (low, high) for f in (schedule.alpha, schedule.sigma)]
    unit, none = torch.ones(1), torch.zeros(1)
    kept, added = renoise(unit, none, *levels).double(), renoise(none, unit, *levels).double()
    got = kept**2 * ((0.3 * alpha) ** 2 + sigma**2) + added**2
    torch.testing.assert_close(got, ((0.3 * alpha_to) ** 2 + sigma_to**2).double()[None], atol=2e-6, rtol=0)
    torch.testing.assert_close(kept * alpha, alpha_to.double()[None], atol=1e-6, rtol=0)


def test_renoise_in_two_goes_is_one(schedule):
    unit, none = torch.ones(1), torch.zeros(1)
    low, middle, high = ((schedule.alpha(n), schedule.sigma(n)) for n in (100, 400, 900))
    kept = renoise(renoise(unit, none, *low, *middle), none, *middle, *high)
    noises = [renoise(renoise(none, unit, *low, *middle), none, *middle, *high), renoise(none, unit, *middle, *high)]
    torch.testing.assert_close(kept, renoise(unit, none, *low, *high))
    torch.testing.assert_close(sum(n**2 for n in noises), renoise(none, unit, *low, *high) ** 2)


def test_renoise_is_not_the_published_sd3_kernel():
    """That one adds (r - s) / (1 - s) of noise, 0.5 here, and so falls short of its level: 0.3125 for 0.5625."""
    s, r = torch.tensor(0.5), torch.tensor(0.75)
    added = renoise(torch.zeros(1), torch.ones(1), 1 - s, s, 1 - r, r)
    assert added.item() == pytest.approx(0.5**0.5, abs=1e-6)
    kept = renoise(torch.ones(1), torch.zeros(1), 1 - s, s, 1 - r, r)
    assert (kept * s) ** 2 + added**2 == pytest.approx(0.5625)
    assert (kept * s) ** 2 + ((r - s) / (1 - s)) ** 2 == pytest.approx(0.3125)


def test_renoise_takes_a_level_per_sample_and_ends_in_pure_noise():
    schedule, low, high = SCHEDULES["vp-zero-snr"], torch.tensor([0, 500, 1000]), torch.tensor([1000, 500, 1000])
    x, noise = torch.randn(2, 3, 4, 8, 8).unbind()
    levels = (schedule.alpha(low), schedule.sigma(low), schedule.alpha(high), schedule.sigma(high))
    got = renoise(x.half(), noise, *levels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.stack([noise[0], x[1].half().float(), noise[2]]), atol=1e-6, rtol=0)


def test_renoise_down_is_an_error(schedule):
    levels = [f(n) for n in (500, 250) for f in (schedule.alpha, schedule.sigma)]
    with pytest.raises(ValueError, match="goes up in noise only; got sigma / alpha from .* Use jump to go down"):
        renoise(torch.zeros(1), torch.zeros(1), *levels)


@pytest.mark.parametrize("tick", [1, 250, 521, 522, 1000])
def test_the_clamp_divides_by_at_least_min_alpha(tick):
    vp, (output, x) = SCHEDULES["vp"], torch.randn(2, 1, 4, 8, 8).unbind()
    alpha, sigma = vp.alpha(tick), vp.sigma(tick)
    x0, eps = x0_eps_from_output(output, x, alpha, sigma, "epsilon", min_alpha=0.5)
    torch.testing.assert_close(x0, (x - sigma * output) / max(alpha.item(), 0.5))
    assert torch.equal(eps, output)
    assert (tick <= 521) == torch.equal(x0, x0_eps_from_output(output, x, alpha, sigma, "epsilon")[0])


@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
def test_a_clamp_without_a_division_is_an_error(prediction):
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match=f"min_alpha 0.5 .* only eps-prediction has one; got '{prediction}'"):
        x0_eps_from_output(x, x, torch.tensor(0.5), torch.tensor(0.5), prediction, min_alpha=0.5)


def test_algebra_is_fp32_for_half_inputs():
    half = torch.randn(1, 4, 8, 8, dtype=torch.float16)
    one = torch.tensor(0.5)
    assert jump(half, half, one, one).dtype == torch.float32
    assert {t.dtype for t in x0_eps_from_output(half, half, one, one, "epsilon")} == {torch.float32}


def test_eps_prediction_without_signal_is_an_error():
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="zero-terminal-SNR model must predict v"):
        x0_eps_from_output(x, x, torch.tensor(0.0), torch.tensor(1.0), "epsilon")


@pytest.mark.parametrize("function", [x0_eps_from_output, output_from_x0_eps])
def test_unknown_prediction_is_an_error(function):
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="Unknown prediction 'sample'; available: epsilon, v_prediction, flow"):
        function(x, x, torch.tensor(0.5), torch.tensor(0.5), "sample")


@pytest.mark.parametrize("shift", [0, -1.0, float("nan"), float("inf")])
def test_bad_shift_is_an_error(shift):
    with pytest.raises(ValueError, match="shift must be a positive number"):
        FlowSchedule(shift)


@pytest.mark.parametrize("bars", [[0.5, 0.5], [0.1, 0.2], [1.5, 0.5], [[0.5, 0.1]]])
def test_alphas_that_do_not_decrease_are_an_error(bars):
    with pytest.raises(ValueError, match="strictly decreasing"):
        VPSchedule(torch.tensor(bars))


def test_unknown_betas_are_an_error():
    with pytest.raises(ValueError, match="Unknown beta schedule 'cosine'"):
        VPSchedule.from_betas(kind="cosine")


def test_fractional_tick_is_an_error():
    with pytest.raises(ValueError, match="whole ticks only; got 0.5"):
        SCHEDULES["vp"].alpha(0.5)


def test_ratios_are_the_flow_schedules_sigma_over_alpha():
    """Cosmos Predict2 in ComfyUI: up to 80, which stands for pure noise."""
    ratio, flow = RatioFlowSchedule(2.0, 80.0), FlowSchedule(2.0)
    levels = torch.arange(0, 960)
    torch.testing.assert_close(ratio.k_sigma(levels), flow.sigma(levels) / flow.alpha(levels), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ratio.tick(ratio.k_sigma(levels)), levels.float(), rtol=1e-5, atol=1e-3)
    assert ratio.k_sigma(torch.tensor([1000, 990])).tolist() == [80, 80]
    assert ratio.tick(80.0) == ratio.tick(79.9999) == 1000
    assert ratio.k_scale(3.0) == 0.25 and ratio.k_alpha(3.0) == 1


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_a_run_by_ratios_is_the_run_by_sigmas(gamma):
    """The same model in both conventions, from one point and with the same noise."""
    flow, ratio = FlowSchedule(1.0), RatioFlowSchedule(1.0, 1e4)
    ticks = torch.tensor([900, 600, 300, 0])
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def denoise(x, level):
        return torch.tanh(x * (1 + level.view(-1, 1, 1, 1)))

    def by_ratio(x, k):
        return denoise(x / (1 + k.view(-1, 1, 1, 1)), k / (1 + k))

    options = {"gamma": gamma, "extra_args": {}}
    noise = [seeded_noise(x, 7) for _ in range(2)]
    ours = sample_phased(denoise, x, flow.k_sigma(ticks), schedule=flow, noise_sampler=noise[0], **options)
    start = x * (1 + ratio.k_sigma(900))
    theirs = sample_phased(by_ratio, start, ratio.k_sigma(ticks), schedule=ratio, noise_sampler=noise[1], **options)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
