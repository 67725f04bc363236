"""Noise schedules on ticks, and the one map that every first-order sampler is.

A noisy point is `x_t = alpha_t * x0 + sigma_t * eps`. Levels are counted in ticks t = 0..T (T = 1000): tick 0
is the clean end (alpha 1, sigma 0) and tick T the noisiest level. In a VP model (SD1.5, SDXL) tick t is
timestep t - 1; in a flow model (SD3) it is the unshifted time t / T. Phase edges and solver points are ticks
in both, so one engine serves both.

The clean end is a level of its own, below timestep 0, where the papers' solvers end: SD1.5 has sigma 0.03
there, and a jump to it hands back a picture with that much noise in it. Here the last jump is to x0 itself.

`k_sigma` is the same level in the host's (k-diffusion's) convention: sigma / alpha for VP, where the sampled
point is x / alpha, and sigma itself for flow, with one exception (`RatioFlowSchedule`). All tables are float64
and all results float32.

The functions below are the algebra between (x0, eps), points and network outputs, on tensors (B, ...):

    x0_eps_from_output    network output -> (x0, eps)
    jump                  (x0, eps) -> the point at any level: DDIM, Euler, and the phase jump
    renoise               a point -> a point at a noisier level, with fresh noise

They compute in fp32, whatever the network runs in: at SD1.5's noisiest level 1 / alpha is 14.6, which
multiplies the rounding of x and of eps in x0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

TICKS = 1000
PREDICTIONS = ("epsilon", "v_prediction", "flow")
# The host keeps this little signal at the end of a zero-terminal-SNR schedule: its sigma stays finite.
TERMINAL_ALPHA_BAR = 4.8973451890853435e-08
LEAST_SIGMA = 1e-12  # stands for 0 in logarithms whose result is then not used


class Schedule(ABC):
    """alpha, sigma, network time and host sigma at ticks 0..T.

    Ticks are numbers or tensors of any shape; results are fp32 tensors of that shape.
    """

    ticks: int = TICKS

    @abstractmethod
    def alpha(self, tick: int | float | Tensor) -> Tensor:
        """Signal coefficient alpha_t, at whole ticks."""

    @abstractmethod
    def sigma(self, tick: int | float | Tensor) -> Tensor:
        """Noise coefficient sigma_t, at whole ticks."""

    @abstractmethod
    def network_time(self, tick: int | float | Tensor) -> Tensor:
        """The time that the network takes as input: the timestep 0..999 for VP, 1000 * sigma for flow."""

    @abstractmethod
    def k_sigma(self, tick: int | float | Tensor) -> Tensor:
        """The level in the host's sigma convention; fractional ticks are interpolated."""

    @abstractmethod
    def tick(self, k_sigma: float | Tensor) -> Tensor:
        """The fractional tick of a level in the host's convention: the inverse of `k_sigma`."""

    @abstractmethod
    def k_alpha(self, k_sigma: float | Tensor) -> Tensor:
        """Signal coefficient of a point in the host's convention: 1 for VP, 1 - k_sigma for flow."""

    @abstractmethod
    def k_scale(self, k_sigma: float | Tensor) -> Tensor:
        """The factor that takes a point in the host's convention to the network's.

        1 / sqrt(1 + k_sigma^2) for VP, 1 for flow.
        """


class VPSchedule(Schedule):
    """Variance-preserving schedule of SD1.5 and SDXL.

    alphas_bar: (T,) cumulative alpha products of timesteps 0..T-1, decreasing.
    Raises ValueError if they do not decrease within [0, 1].
    """

    def __init__(self, alphas_bar: Tensor):
        bar = torch.as_tensor(alphas_bar, dtype=torch.float64)
        if bar.ndim != 1 or bar.min() < 0 or bar.max() > 1 or (bar.diff() >= 0).any():
            raise ValueError(
                f"alphas_bar must be one strictly decreasing row within [0, 1]; got shape {tuple(bar.shape)}, "
                f"range {bar.min():.3g}..{bar.max():.3g}."
            )
        self.ticks = len(bar)

        bar = torch.cat([torch.ones(1, dtype=torch.float64), bar])  # tick 0, the clean end
        self._alpha = _Table(bar.sqrt())
        self._sigma = _Table((1 - bar).sqrt())

        finite = bar.clamp(min=TERMINAL_ALPHA_BAR)
        self._k_sigma = ((1 - finite) / finite).sqrt()

    @classmethod
    def from_betas(
        cls,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        kind: str = "scaled_linear",
        ticks: int = TICKS,
        zero_terminal_snr: bool = False,
    ) -> VPSchedule:
        """The schedule of betas between two ends; the defaults are SD1.5's and SDXL's.

        kind: "scaled_linear" (linear in sqrt(beta)) or "linear".
        zero_terminal_snr: shift and scale sqrt(alpha_bar) so that the last is 0 (arXiv 2305.08891, Alg. 1).
        Raises ValueError for another kind.
        """
        if kind == "scaled_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, ticks, dtype=torch.float64) ** 2
        elif kind == "linear":
            betas = torch.linspace(beta_start, beta_end, ticks, dtype=torch.float64)
        else:
            raise ValueError(f"Unknown beta schedule {kind!r}; available: 'scaled_linear', 'linear'.")
        root = (1 - betas).cumprod(0).sqrt()
        if zero_terminal_snr:  # the first value stays as it is
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        return cls(root**2)

    @classmethod
    def from_k_sigmas(cls, k_sigmas: Tensor) -> VPSchedule:
        """The schedule behind the host's table of sigma / alpha at timesteps 0..T-1, increasing."""
        k = torch.as_tensor(k_sigmas).cpu().double()  # on the CPU first: not every device has float64
        return cls(1 / (1 + k**2))

    def alpha(self, tick: int | float | Tensor) -> Tensor:
        return self._alpha.at(tick)

    def sigma(self, tick: int | float | Tensor) -> Tensor:
        return self._sigma.at(tick)

    def network_time(self, tick: int | float | Tensor) -> Tensor:
        return torch.as_tensor(tick).float() - 1

    def k_sigma(self, tick: int | float | Tensor) -> Tensor:
        tick = _double(tick)
        low = tick.floor().long().clamp(0, self.ticks)
        high = (low + 1).clamp(max=self.ticks)
        weight = tick - low
        table = self._k_sigma.to(tick.device)
        below, above = table[low], table[high]

        # Log-linear between timesteps, as in the host. From the clean end to the first one it is linear,
        # since the logarithm of the clean end's 0 has no end.
        log_linear = (below.clamp(min=LEAST_SIGMA).log() * (1 - weight) + above.log() * weight).exp()
        between = torch.where(low > 0, log_linear, above * weight)

        # Whole ticks are read as they stand: exp(log(.)) would not give back their last bit.
        return torch.where(weight > 0, between, below).float()

    def tick(self, k_sigma: float | Tensor) -> Tensor:
        sigma = _double(k_sigma)
        table = self._k_sigma.to(sigma.device)
        sigma = sigma.clamp(max=table[-1])  # the host's noisiest sigma may be a rounding above the table's
        high = torch.searchsorted(table, sigma.contiguous()).clamp(1, self.ticks)
        below, above = table[high - 1], table[high]

        log_from_below = (sigma.clamp(min=LEAST_SIGMA) / below.clamp(min=LEAST_SIGMA)).log()
        log_step = (above / below.clamp(min=LEAST_SIGMA)).log()
        weight = torch.where(high > 1, log_from_below / log_step, sigma / above)  # as `k_sigma` interpolates
        return (high - 1 + weight).float()

    def k_alpha(self, k_sigma: float | Tensor) -> Tensor:
        return torch.ones_like(torch.as_tensor(k_sigma, dtype=torch.float32))

    def k_scale(self, k_sigma: float | Tensor) -> Tensor:
        return (1 + _double(k_sigma) ** 2).rsqrt().float()


class FlowSchedule(Schedule):
    """Rectified-flow schedule of SD3, with its time shift (arXiv 2403.03206, Sec. 5.3.2).

    sigma = shift * u / (1 + (shift - 1) * u) with u = t / T, and alpha = 1 - sigma.
    Raises ValueError for a shift that is not a positive number.
    """

    def __init__(self, shift: float = 3.0, ticks: int = TICKS):
        if not shift > 0 or not math.isfinite(shift):
            raise ValueError(f"shift must be a positive number; got {shift}. SD3 uses 3.0, and 1.0 means no shift.")
        self.shift = float(shift)
        self.ticks = ticks

    def sigma(self, tick: int | float | Tensor) -> Tensor:
        u = _double(tick) / self.ticks
        return (self.shift * u / (1 + (self.shift - 1) * u)).float()

    def alpha(self, tick: int | float | Tensor) -> Tensor:
        return 1 - self.sigma(tick)

    def network_time(self, tick: int | float | Tensor) -> Tensor:
        return self.sigma(tick) * TICKS

    def k_sigma(self, tick: int | float | Tensor) -> Tensor:
        return self.sigma(tick)

    def tick(self, k_sigma: float | Tensor) -> Tensor:
        sigma = _double(k_sigma)
        return (self.ticks * sigma / (self.shift - (self.shift - 1) * sigma)).float()

    def k_alpha(self, k_sigma: float | Tensor) -> Tensor:
        return 1 - torch.as_tensor(k_sigma, dtype=torch.float32)

    def k_scale(self, k_sigma: float | Tensor) -> Tensor:
        return torch.ones_like(torch.as_tensor(k_sigma, dtype=torch.float32))


class RatioFlowSchedule(FlowSchedule):
    """A flow schedule in the host's convention of VP, sigma / alpha and x / alpha (Cosmos Predict2).

    noisiest: the level that the host has for pure noise, where sigma / alpha has no end.
    """

    def __init__(self, shift: float, noisiest: float, ticks: int = TICKS):
        super().__init__(shift, ticks)
        self.noisiest = noisiest

    def k_sigma(self, tick: int | float | Tensor) -> Tensor:
        u = _double(tick) / self.ticks
        return (self.shift * u / (1 - u)).clamp(max=self.noisiest).float()

    def tick(self, k_sigma: float | Tensor) -> Tensor:
        k = _double(k_sigma)
        # the host's own table may be a rounding below its end
        u = torch.where(k < self.noisiest * (1 - 1e-5), k / (k + self.shift), 1.0)
        return (self.ticks * u).float()

    def k_alpha(self, k_sigma: float | Tensor) -> Tensor:
        return torch.ones_like(torch.as_tensor(k_sigma, dtype=torch.float32))

    def k_scale(self, k_sigma: float | Tensor) -> Tensor:
        return (1 / (1 + _double(k_sigma))).float()


def _double(level: float | Tensor) -> Tensor:
    """A level as float64, on the CPU where the device has no such type (Apple's, Intel's)."""
    level = torch.as_tensor(level)
    return (level if level.device.type == "cuda" else level.cpu()).double()


class _Table:
    """A float64 row by whole ticks, read in float32 on the device where the ticks are; moved there once."""

    def __init__(self, row: Tensor):
        self.rows = {torch.device("cpu"): row.float()}

    def at(self, tick: int | float | Tensor) -> Tensor:
        """The values at ticks, in their shape; ValueError for ticks that are not whole."""
        n = torch.as_tensor(tick)
        if n.is_floating_point() and (n != n.round()).any():
            raise ValueError(
                f"alpha and sigma exist at whole ticks only; got {n.tolist()}. Use k_sigma for levels between."
            )
        if n.device not in self.rows:
            self.rows[n.device] = self.rows[torch.device("cpu")].to(n.device)
        return self.rows[n.device][n.long()]


def _holds_on_cpu(condition: Tensor) -> bool:
    """Whether a condition holds anywhere. One on a GPU is not looked at: every step would wait for it."""
    return condition.device.type == "cpu" and bool(condition.any())


def _columns(coefficient: Tensor, like: Tensor) -> Tensor:
    """A coefficient () or (B,), in fp32, shaped to multiply `like` (B, ...) sample by sample, on its device."""
    c = coefficient.to(like.device, torch.float32)
    return rows(c, like) if c.ndim else c


def rows(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,), shaped to be broadcast over `like` (B, ...) sample by sample: (B, 1, 1, 1) for pictures."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def jump(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The point x_s = alpha_s * x0 + sigma_s * eps of the path through x0 and eps, in fp32.

    x0, eps: (B, ...), as the network sees them at x_t. alpha, sigma: () or (B,), of the level s to land on.
    With s an edge of `PhaseGrid` this is PCM's phase jump (arXiv 2405.18407, Eq. 3); one DDIM step and one
    Euler step are the same line. At s = t it is x_t again, the boundary condition of a consistency function,
    whatever the network says.
    """
    return _columns(alpha, x0) * x0.float() + _columns(sigma, x0) * eps.float()


def eps_of(x: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The eps that x = alpha * x0 + sigma * eps holds beside this x0, in fp32.

    x, x0: (B, ...). alpha, sigma: () or (B,); sigma not 0.
    """
    return (x.float() - _columns(alpha, x) * x0.float()) / _columns(sigma, x)


Level = tuple[Tensor, Tensor]  # alpha and sigma


def extrapolated(x0: Tensor, x0_before: Tensor, before: Level, now: Level, then: Level) -> Tensor:
    """x0 halfway from level `now` to `then`, on the line through its values at `before` and `now`.

    A jump with it is one step of DPM-Solver++(2M) (arXiv 2211.01095, Alg. 2):
    D = x0 + h / (2 h_before) (x0 - x0_before), with h the steps in lambda = log(alpha / sigma).
    x0, x0_before: (B, ...). Levels: () or (B,), in any one convention. Samples without a step before (of no
    length, or from a level without signal) keep their x0, and so do those that end at the clean level, where
    lambda has no end.
    """
    lambda_before, lambda_now, lambda_then = (
        (torch.as_tensor(alpha) / torch.as_tensor(sigma)).log() for alpha, sigma in (before, now, then)
    )
    h_before, h = lambda_now - lambda_before, lambda_then - lambda_now
    ratio = torch.where((h_before > 0) & h.isfinite(), h / (2 * h_before), 0.0)
    return x0 + _columns(ratio, x0) * (x0 - x0_before)


def renoise(x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, alpha_to: Tensor, sigma_to: Tensor) -> Tensor:
    """A point at one level taken up to a noisier one, (alpha_to, sigma_to), by the forward process, in fp32.

    q(x_to | x) is normal with mean r * x and variance sigma_to^2 - (r * sigma)^2, where r = alpha_to / alpha
    (arXiv 2107.00630, App. A.1). That is exact for VP and for flow: x with the marginal distribution of its
    level gives x_to with that of the other. x, noise: (B, ...), noise standard normal. The levels: () or
    (B,), in any one convention; alpha_to may be 0.
    Raises ValueError when a target level is the cleaner one, which is looked at on the CPU alone: noise
    cannot be taken out this way.
    """
    alpha, sigma, alpha_to, sigma_to = (_columns(torch.as_tensor(c), x) for c in (alpha, sigma, alpha_to, sigma_to))

    # From pure noise to pure noise this is 0 / tiny, and all noise is fresh. Without the clamp it were 0 / 0.
    ratio = alpha_to / alpha.clamp(min=torch.finfo(torch.float32).tiny)
    kept = ratio * sigma
    if _holds_on_cpu(kept > sigma_to * (1 + 1e-4)):
        raise ValueError(
            f"renoise goes up in noise only; got sigma / alpha from {(sigma / alpha).flatten().tolist()} "
            f"to {(sigma_to / alpha_to).flatten().tolist()}. Use jump to go down."
        )

    # sigma_to^2 - kept^2 as a product: a difference of squares would lose the digits in which they differ.
    added = ((sigma_to - kept) * (sigma_to + kept)).clamp(min=0).sqrt()
    return ratio * x.float() + added * noise.float()


def x0_eps_from_output(
    output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, prediction: str, min_alpha: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The (x0, eps) that a network output stands for at the point x = alpha * x0 + sigma * eps, in fp32.

    output, x: (B, ...). alpha, sigma: () or (B,).
    prediction: "epsilon", "v_prediction" (v = alpha * eps - sigma * x0, arXiv 2202.00512) or "flow"
    (v = eps - x0).
    min_alpha: eps-prediction divides by max(alpha, min_alpha), PCM's clamp for one-step models (arXiv
    2405.18407, Eq. 39); 0 for none.
    Raises ValueError for another prediction, for a clamp without "epsilon", and for "epsilon" where alpha is
    0, since the output of an eps-network holds no x0 there (looked at on the CPU alone).
    """
    a, s = _columns(alpha, x), _columns(sigma, x)
    output, x = output.float(), x.float()
    if min_alpha and prediction != "epsilon":
        raise ValueError(
            f"min_alpha {min_alpha:g} clamps a division by alpha, and only eps-prediction has one; got {prediction!r}. "
            "Set min_alpha to 0."
        )
    if prediction == "epsilon":
        if _holds_on_cpu(a == 0):
            raise ValueError("eps-prediction has no x0 where alpha is 0: a zero-terminal-SNR model must predict v.")
        return (x - s * output) / a.clamp(min=min_alpha), output
    if prediction == "v_prediction":
        return a * x - s * output, s * x + a * output
    if prediction == "flow":
        return x - s * output, x + (1 - s) * output
    raise ValueError(f"Unknown prediction {prediction!r}; available: {', '.join(PREDICTIONS)}.")


def output_from_x0_eps(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """The network output that `x0_eps_from_output` would read as (x0, eps), without a clamp; shapes as there.

    Raises ValueError for another prediction.
    """
    a, s = _columns(alpha, x0), _columns(sigma, x0)
    x0, eps = x0.float(), eps.float()
    if prediction == "epsilon":
        return eps
    if prediction == "v_prediction":
        return a * eps - s * x0
    if prediction == "flow":
        return eps - x0
    raise ValueError(f"Unknown prediction {prediction!r}; available: {', '.join(PREDICTIONS)}.")
