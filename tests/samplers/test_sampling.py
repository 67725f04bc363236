"""Samplers against closed forms (a Gaussian has an exact denoiser and an exact flow) and against diffusers."""

import inspect
import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, TCDScheduler

from phased_consistency.samplers import (
    SAMPLERS,
    FlowSchedule,
    PhaseGrid,
    VPSchedule,
    jump,
    recipe_for_file,
    sample_consistency,
    sample_dpmpp_2m,
    sample_phased,
    seeded_noise,
    x0_eps_from_output,
)
from phased_consistency.samplers.sampling import block_noise

VP, FLOW = VPSchedule.from_betas(), FlowSchedule(3.0)
SCHEDULES = pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
MEAN, STD = 0.7, 0.4  # of the Gaussian that the data come from
SHAPE = (2, 4, 8, 8)
SEED = {"extra_args": {"seed": 1}}


class Gaussian:
    """Exact denoiser and probability-flow map of N(MEAN, STD^2) data, in the host's convention."""

    def __init__(self, schedule):
        self.schedule = schedule

    def std(self, sigma):
        return (self.schedule.k_alpha(sigma) ** 2 * STD**2 + sigma**2).sqrt()

    def denoise(self, x, sigma):
        sigma = sigma[0]
        alpha = self.schedule.k_alpha(sigma)
        return MEAN + alpha * STD**2 / self.std(sigma) ** 2 * (x - alpha * MEAN)

    def flow(self, x, sigma, sigma_to):
        from_mean, to_mean = (self.schedule.k_alpha(s) * MEAN for s in (sigma, sigma_to))
        return to_mean + self.std(sigma_to) / self.std(sigma) * (x - from_mean)

    def phase_map(self, grid):
        """The model a perfect training would give: its jump to the phase's edge lands on the exact flow."""

        def model(x, sigma):
            sigma = sigma[0]
            target = self.schedule.k_sigma(grid.target(self.schedule.tick(sigma).round().long()))
            alpha, alpha_target = self.schedule.k_alpha(sigma), self.schedule.k_alpha(target)
            landing = self.flow(x, sigma, target)
            return (landing - target / sigma * x) / (alpha_target - target / sigma * alpha)

        return model


def start_noise(schedule, sigmas, seed=0):
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    return z / schedule.k_scale(sigmas[0])


def levels(schedule, grid, steps=None):
    return schedule.k_sigma(torch.tensor(grid.plan(steps).ticks))


def eps_model(network):
    """A diffusers eps-network (x, timestep) as the host's model."""

    def model(x, sigma):
        timestep = VP.tick(sigma[0]).round().long() - 1
        return x - sigma[0] * network(x * VP.k_scale(sigma[0]), timestep)

    return model


def network(x, timestep):
    return torch.sin(3 * x) * (0.5 + timestep / 2000) + 0.3 * x


@SCHEDULES
@pytest.mark.parametrize(("points", "phases"), [(40, 1), (40, 4), (50, 4), (50, 8)])
def test_a_perfect_phase_map_is_sampled_exactly(schedule, points, phases):
    gaussian, grid = Gaussian(schedule), PhaseGrid(points, phases)
    sigmas = levels(schedule, grid)
    x = start_noise(schedule, sigmas)
    got = sample_phased(gaussian.phase_map(grid), x, sigmas, schedule=schedule)
    torch.testing.assert_close(got, gaussian.flow(x, sigmas[0], torch.tensor(0.0)), atol=5e-5, rtol=0)


@SCHEDULES
def test_many_steps_converge_to_the_exact_flow_at_first_order(schedule):
    gaussian = Gaussian(schedule)

    def error(steps):
        sigmas = levels(schedule, PhaseGrid(1000, 1), steps)
        x = start_noise(schedule, sigmas)
        got = sample_phased(gaussian.denoise, x, sigmas, schedule=schedule)
        return (got - gaussian.flow(x, sigmas[0], torch.tensor(0.0))).abs().mean().item()

    errors = [error(steps) for steps in (50, 100, 200)]
    assert errors[-1] < 0.02
    assert all(1.7 < a / b < 2.3 for a, b in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_gamma_0_is_diffusers_ddim(steps):
    ddim = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    ddim.set_timesteps(steps)
    sigmas = levels(VP, PhaseGrid(40, 1), steps)
    x = start_noise(VP, sigmas)
    theirs = x * VP.k_scale(sigmas[0])
    for timestep in ddim.timesteps:
        theirs = ddim.step(network(theirs, timestep), timestep, theirs, eta=0.0).prev_sample
    ours = sample_phased(eps_model(network), x, sigmas, schedule=VP)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)  # eps at t = 999 is divided by 0.068


def test_gamma_1_is_lcm():
    """To x0, then diffusers' add_noise with the same noise: the step of LCM and of PCM's stochastic mode."""
    forward = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    grid, model = PhaseGrid(50, 1, from_noise=True), eps_model(network)
    sigmas, noise = levels(VP, grid, 4), torch.randn(3, *SHAPE)
    x = theirs = start_noise(VP, sigmas)
    for i, tick in enumerate(grid.plan(4).ticks[1:]):
        x0 = model(theirs, sigmas[i].expand(len(x)))
        theirs = forward.add_noise(x0, noise[i], torch.tensor(tick - 1)) / VP.k_scale(sigmas[i + 1]) if tick else x0
    for sample, options in ((sample_phased, {"gamma": 1.0}), (sample_consistency, {})):
        draws = iter(noise)
        ours = sample(model, x, sigmas, schedule=VP, noise_sampler=lambda *_, d=draws: next(d), **options)
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("gamma", [0.05, 0.3, 0.95])
def test_gamma_is_diffusers_tcd(gamma, steps):
    """Their clean end is timestep 0, sigma 0.029, where ours is x0: the last eps tells theirs. At gamma 1 see LCM."""
    tcd = TCDScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    tcd.set_timesteps(steps)
    recipe = recipe_for_file("TCD-SD15-LoRA.safetensors", {})
    ticks = recipe.grid().plan(steps).ticks
    assert tcd.timesteps.tolist() == [tick - 1 for tick in ticks[:-1]]
    sigmas, generator = VP.k_sigma(torch.tensor(ticks)), torch.Generator().manual_seed(4)
    x = start_noise(VP, sigmas)
    theirs = x * VP.k_scale(sigmas[0])
    for timestep in tcd.timesteps:
        eps = network(theirs, timestep)
        theirs = tcd.step(eps, timestep, theirs, eta=gamma, generator=generator).prev_sample
    theirs = (theirs - VP.sigma(1) * eps) / VP.alpha(1)
    ours = sample_phased(eps_model(network), x, sigmas, schedule=VP, gamma=gamma, noise_sampler=block_noise(x, 4 - 1))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["lcm-lora-sdv1-5", "dmd2_sdxl_4step_lora"])
def test_lcm_and_dmd2_files_are_diffusers_lcm(name):
    """DMD2's authors give it their timesteps. LCM's boundary terms are below 1e-6 here, down to timestep 249."""
    recipe = recipe_for_file(f"{name}.safetensors", {})
    ticks = recipe.grid().plan(recipe.steps).ticks
    lcm = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    lcm.set_timesteps(**({"timesteps": [999, 749, 499, 249]} if "dmd2" in name else {"num_inference_steps": 4}))
    assert lcm.timesteps.tolist() == [tick - 1 for tick in ticks[:-1]]
    sigmas, generator = VP.k_sigma(torch.tensor(ticks)), torch.Generator().manual_seed(4)
    x = start_noise(VP, sigmas)
    theirs = x * VP.k_scale(sigmas[0])
    for timestep in lcm.timesteps:
        theirs = lcm.step(network(theirs, timestep), timestep, theirs, generator=generator).prev_sample
    options = {"gamma": recipe.gamma, "noise_sampler": block_noise(x, 4 - 1)}
    ours = sample_phased(eps_model(network), x, sigmas, schedule=VP, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("start", "end"), [(1000, 0), (1000, 500), (750, 250), (521, 20), (400, 0)])
@pytest.mark.parametrize("min_alpha", [0.0, 0.5])
def test_the_clamp_is_the_same_in_training_and_sampling(start, end, min_alpha):
    """Training reads the network's output itself; sampling is given the unclamped x0, in the host's convention."""
    alpha, sigma, output = VP.alpha(start), VP.sigma(start), torch.randn(SHAPE)
    x = torch.randn(SHAPE)
    trained = jump(
        *x0_eps_from_output(output, x, alpha, sigma, "epsilon", min_alpha=min_alpha), VP.alpha(end), VP.sigma(end)
    )
    sigmas, seen = VP.k_sigma(torch.tensor([start, end])), []
    options = {"schedule": VP, "min_alpha": min_alpha, "callback": seen.append}
    host_x = x / VP.k_scale(sigmas[0])
    got = sample_phased(lambda x, sigma: x - sigma[0] * output, host_x, sigmas, **options)
    torch.testing.assert_close(got * VP.k_scale(sigmas[1]), trained, atol=2e-5, rtol=1e-5)
    if end == 0:
        assert torch.equal(seen[0]["denoised"], got)
        torch.testing.assert_close(
            sample_consistency(lambda x, sigma, seed: x - sigma[0] * output, host_x, sigmas, **options | SEED), got
        )


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_clamp_on_flow_is_an_error(name):
    with pytest.raises(ValueError, match="min_alpha 0.5 is for eps-prediction; a flow model divides by no alpha"):
        SAMPLERS[name](None, torch.zeros(SHAPE), torch.tensor([1.0, 0.0]), schedule=FLOW, min_alpha=0.5)


@SCHEDULES
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_every_level_has_its_amount_of_noise(schedule, gamma):
    """With a model that knows x0, what is not x0 in x is unit noise times sigma, however it was mixed."""
    sigmas = levels(schedule, PhaseGrid(40, 8))
    x0 = MEAN + STD * torch.randn(4, 4, 64, 64)
    x = schedule.k_alpha(sigmas[0]) * x0 + sigmas[0] * torch.randn(x0.shape)
    seen = []
    sample_phased(
        lambda x, sigma, **_: x0,
        x,
        sigmas,
        schedule=schedule,
        gamma=gamma,
        extra_args={"seed": 1},
        callback=seen.append,
    )
    for step in seen:
        noise = (step["x"] - schedule.k_alpha(step["sigma"]) * x0) / step["sigma"]
        assert noise.mean().abs() < 0.02
        assert noise.var().item() == pytest.approx(1, abs=0.02)


@SCHEDULES
def test_gamma_lands_at_tcds_level(schedule):
    """The jump goes to (1 - gamma) of the next level's tick (TCD: of its timestep); the rest of the noise is fresh."""
    sigmas = schedule.k_sigma(torch.tensor([1000, 750]))
    x0, eps = torch.randn(2, *SHAPE).unbind()
    x = schedule.k_alpha(sigmas[0]) * x0 + sigmas[0] * eps
    options = {"gamma": 0.2, "noise_sampler": lambda *_: torch.zeros(SHAPE)}
    got = sample_phased(lambda x, sigma: x0, x, sigmas, schedule=schedule, **options)
    kept = schedule.sigma(600) / schedule.alpha(600) * schedule.alpha(750)  # eps of tick 600, carried up to tick 750
    want = (schedule.alpha(750) * x0 + kept * eps) / schedule.k_scale(sigmas[1])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_flow_is_ve_after_scaling(gamma):
    gaussian, s = Gaussian(VP), torch.tensor([0.95, 0.7, 0.5, 0.2, 0.0])
    x = (s / (1 - s))[0] * torch.randn(SHAPE)
    runs = []
    for schedule, sigmas, scale in ((VP, s / (1 - s), torch.ones(5)), (FlowSchedule(1.0), s, 1 - s)):
        seen = []

        def model(y, sigma, flow=schedule is not VP, **_):
            return gaussian.denoise(y / (1 - sigma[0]), sigma / (1 - sigma)) if flow else gaussian.denoise(y, sigma)

        options = {"schedule": schedule, "gamma": gamma, "extra_args": {"seed": 3}, "callback": seen.append}
        end = sample_phased(model, scale[0] * x, sigmas, **options)
        runs.append([*(step["x"] / c for step, c in zip(seen, scale, strict=False)), end])
    for ve, flow in zip(*runs, strict=True):
        torch.testing.assert_close(flow, ve, atol=2e-4, rtol=1e-4)


@SCHEDULES
@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_the_models_x0(name, schedule):
    sigmas, x0, seen = schedule.k_sigma(torch.tensor([1000, 0])), torch.randn(SHAPE), []

    def model(x, sigma, **extra):
        seen.append((sigma.tolist(), extra))
        return x0

    got = SAMPLERS[name](model, torch.randn(SHAPE), sigmas, schedule=schedule, extra_args={"seed": 5})
    assert torch.equal(got, x0)
    assert seen == [([sigmas[0].item()] * SHAPE[0], {"seed": 5})]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_one_model_call_and_one_report_per_step(name, steps):
    sigmas, calls, reports = levels(VP, PhaseGrid(40, 4), steps), [], []

    def model(x, sigma, **_):
        calls.append(sigma[0].item())
        return x * 0.1

    options = {"schedule": VP, "extra_args": {"seed": 0}, "callback": reports.append}
    end = SAMPLERS[name](model, start_noise(VP, sigmas), sigmas, **options)
    assert calls == sigmas[:-1].tolist()
    assert [r["i"] for r in reports] == list(range(steps))
    assert [r["sigma"].item() for r in reports] == calls
    assert all(torch.equal(r["denoised"], r["x"] * 0.1) for r in reports)
    assert torch.equal(end, reports[-1]["denoised"])


def test_a_cut_schedule_ends_at_its_last_level():
    """The host splits schedules: the two halves in a row are the whole."""
    gaussian, sigmas = Gaussian(VP), levels(VP, PhaseGrid(40, 4))
    x = start_noise(VP, sigmas)
    half = sample_phased(gaussian.denoise, x, sigmas[:3], schedule=VP)
    whole = sample_phased(gaussian.denoise, x, sigmas, schedule=VP)
    assert torch.equal(sample_phased(gaussian.denoise, half, sigmas[2:], schedule=VP), whole)


def test_a_seed_gives_one_picture():
    sigmas = levels(VP, PhaseGrid(40, 4))
    x = start_noise(VP, sigmas)

    def draw(seed, gamma=0.5):
        options = {"schedule": VP, "gamma": gamma, "extra_args": {"seed": seed}}
        return sample_phased(lambda x, sigma, seed: x * 0.1, x, sigmas, **options)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, gamma=0), draw(2, gamma=0))
    draw(2**64 - 1)  # the host's largest seed


def test_a_picture_is_the_same_alone_and_in_any_batch():
    """Bit for bit, by the seed and its index in the batch that it is of; the first one's noise is the host's."""
    x, sigmas = torch.randn(3, 4, 8, 8), levels(VP, PhaseGrid(40, 4))
    options = {"schedule": VP, "gamma": 1.0, "extra_args": {"seed": 7}}

    def draw(x, indices=None):
        noise = seeded_noise(x, 7, indices) if indices else None
        return sample_phased(lambda x, sigma, seed: x * 0.1, x, sigmas, noise_sampler=noise, **options)

    three = draw(x)
    assert all(torch.equal(draw(x[k : k + 1], [k]), three[k : k + 1]) for k in range(3))
    assert torch.equal(draw(x[1:], [1, 2]), three[1:]) and not torch.equal(draw(x[1:]), three[1:])
    assert torch.equal(seeded_noise(x[:1], 7)(None, None), block_noise(x[:1], 7)(None, None))
    with pytest.raises(ValueError, match="2 indices were given for a batch of 3; expected one for each"):
        seeded_noise(x, 7, [0, 1])


def test_the_first_noise_is_not_the_starting_noise():
    x = torch.zeros(SHAPE)
    assert not torch.equal(
        seeded_noise(x, 7)(None, None), torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_algebra_is_fp32_for_half_input(name):
    sigmas, seen = levels(VP, PhaseGrid(40, 4)), set()

    def model(x, sigma, **_):
        seen.update((x.dtype, sigma.dtype))
        return (x * 0.1).half()

    got = SAMPLERS[name](model, start_noise(VP, sigmas).half(), sigmas, schedule=VP, extra_args={"seed": 0})
    assert seen | {got.dtype} == {torch.float32}


@SCHEDULES
def test_dpmpp_2m_is_of_second_order(schedule):
    """Inside the schedule, where its last step is no first-order one."""
    exact, errors = Gaussian(schedule), []
    for steps in (10, 20, 40):
        sigmas = schedule.k_sigma(torch.linspace(900, 100, steps + 1).round().long())
        x = start_noise(schedule, sigmas)
        drawn = sample_dpmpp_2m(exact.denoise, x, sigmas, schedule=schedule)
        errors.append((drawn - exact.flow(x, sigmas[0], sigmas[-1])).abs().mean())
    orders = [(coarse / fine).log2().item() for coarse, fine in itertools.pairwise(errors)]
    assert all(1.6 < order < 3 for order in orders), orders


def test_dpmpp_2m_is_diffusers():
    """The same levels, with the first step and the last one of first order there too."""
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
        algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(8)
    sigmas = VP.k_sigma(torch.tensor([*(scheduler.timesteps + 1).tolist(), 0]))
    torch.testing.assert_close(sigmas, scheduler.sigmas.float(), atol=1e-4, rtol=1e-4)
    exact = Gaussian(VP)
    x = start_noise(VP, sigmas)
    latents = x * VP.k_scale(sigmas[0])
    for timestep, sigma in zip(scheduler.timesteps, sigmas[:-1], strict=True):
        in_host = latents / VP.k_scale(sigma)
        eps = (in_host - exact.denoise(in_host, sigma.expand(len(x)))) / sigma
        latents = scheduler.step(eps, timestep, latents).prev_sample
    drawn = sample_dpmpp_2m(exact.denoise, x, sigmas, schedule=VP)
    torch.testing.assert_close(drawn, latents, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_gamma_outside_its_range_is_an_error(gamma):
    with pytest.raises(ValueError, match="gamma must be between 0 .* and 1"):
        sample_phased(None, torch.zeros(SHAPE), torch.tensor([1.0, 0.0]), schedule=VP, gamma=gamma)


def test_noise_without_a_seed_is_an_error():
    with pytest.raises(ValueError, match="needs a noise_sampler, or a seed in extra_args"):
        sample_consistency(None, torch.zeros(SHAPE), torch.tensor([1.0, 0.0]), schedule=VP)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_share_the_hosts_form_and_name_their_source(name):
    sampler = SAMPLERS[name]
    parameters = inspect.signature(sampler).parameters.values()
    assert sampler.__name__ == f"sample_{name}"
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert positional == ["model", "x", "sigmas"]
    assert list(keyword)[:4] == ["extra_args", "callback", "disable", "schedule"]
    assert [keyword[n] for n in ("extra_args", "callback", "disable", "noise_sampler")] == [None] * 4
    assert "arXiv" in sampler.__doc__.splitlines()[0]
