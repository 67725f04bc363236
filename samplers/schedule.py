"""Noise schedules on ticks, and the one map that every first-order sampler is.

A noisy point is `x = alpha * x0 + sigma * eps`. Levels are counted in ticks n = 0..T (T = 1000): tick 0 is the clean
end (alpha 1, sigma 0) and tick T the noisiest level. In a VP model (SD1.5, SDXL) tick n is timestep n - 1; in a flow
model (SD3) it is the unshifted time n / T. Phase edges and solver points are ticks in both, so one engine serves both.

`k_sigma` is the same level in the host's (k-diffusion's) convention: sigma / alpha for VP, where the sampled point is
x / alpha, and sigma itself for flow. All tables are float64 and all results float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

TICKS = 1000
PREDICTIONS = ("epsilon", "v_prediction", "flow")
# The host keeps this little signal at the last level of a zero-terminal-SNR model, so that its sigma stays finite.
TERMINAL_ALPHA_BAR = 4.8973451890853435e-08


class Schedule(ABC):
    """alpha, sigma, network time and host sigma at ticks 0..T. Ticks may be ints or tensors of any shape."""

    ticks: int = TICKS

    @abstractmethod
    def alpha(self, tick: int | float | Tensor) -> Tensor:
        """Signal coefficient."""

    @abstractmethod
    def sigma(self, tick: int | float | Tensor) -> Tensor:
        """Noise coefficient."""

    @abstractmethod
    def network_time(self, tick: int | float | Tensor) -> Tensor:
        """What the network is told: the timestep 0..999 for VP, 1000 * sigma for flow."""

    @abstractmethod
    def k_sigma(self, tick: int | float | Tensor) -> Tensor:
        """The level in the host's sigma convention; fractional ticks are interpolated."""

    @abstractmethod
    def tick(self, k_sigma: float | Tensor) -> Tensor:
        """Inverse of `k_sigma`, as a fractional tick."""

    @abstractmethod
    def k_alpha(self, k_sigma: float | Tensor) -> Tensor:
        """Signal coefficient of a point in the host's convention: 1 for VP, 1 - s for flow."""

    @abstractmethod
    def k_scale(self, k_sigma: float | Tensor) -> Tensor:
        """What turns a point in the host's convention into the network's: 1 / sqrt(1 + s^2) for VP, 1 for flow."""


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
        bar = torch.cat([torch.ones(1, dtype=torch.float64), bar])
        self._alpha, self._sigma = _Table(bar.sqrt()), _Table((1 - bar).sqrt())
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
        """From the betas' ends; the defaults are SD1.5's and SDXL's.

        kind: "scaled_linear" (linear in sqrt(beta)) or "linear".
        zero_terminal_snr: shift and scale sqrt(alpha_bar) so that the last is 0 (Lin et al., arXiv 2305.08891, Alg. 1).
        """
        if kind == "scaled_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, ticks, dtype=torch.float64) ** 2
        elif kind == "linear":
            betas = torch.linspace(beta_start, beta_end, ticks, dtype=torch.float64)
        else:
            raise ValueError(f"Unknown beta schedule {kind!r}; available: 'scaled_linear', 'linear'.")
        root = (1 - betas).cumprod(0).sqrt()
        if zero_terminal_snr:
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        return cls(root**2)

    @classmethod
    def from_k_sigmas(cls, k_sigmas: Tensor) -> VPSchedule:
        """From the host's table of sigma / alpha at timesteps 0..T-1, increasing."""
        k = torch.as_tensor(k_sigmas).cpu().double()  # on the CPU first: not every device has float64
        return cls(1 / (1 + k**2))

    def alpha(self, tick: int | float | Tensor) -> Tensor:
        return self._alpha.at(tick)

    def sigma(self, tick: int | float | Tensor) -> Tensor:
        return self._sigma.at(tick)

    def network_time(self, tick: int | float | Tensor) -> Tensor:
        return torch.as_tensor(tick).float() - 1

    def k_sigma(self, tick: int | float | Tensor) -> Tensor:
        n = _double(tick)
        low = n.floor().long().clamp(0, self.ticks)
        high = (low + 1).clamp(max=self.ticks)
        table = self._k_sigma.to(n.device)
        # log-linear between timesteps, as in the host; linear below the first one, whose logarithm has no end
        a, b, weight = table[low], table[high], n - low
        between = torch.where(low > 0, (a.clamp(min=1e-12).log() * (1 - weight) + b.log() * weight).exp(), b * weight)
        return torch.where(weight > 0, between, a).float()

    def tick(self, k_sigma: float | Tensor) -> Tensor:
        s = _double(k_sigma)
        table = self._k_sigma.to(s.device)
        s = s.clamp(max=table[-1])
        high = torch.searchsorted(table, s.contiguous()).clamp(1, self.ticks)
        a, b = table[high - 1], table[high]
        log_weight = (s.clamp(min=1e-12) / a.clamp(min=1e-12)).log() / (b / a.clamp(min=1e-12)).log()
        weight = torch.where(high > 1, log_weight, s / b)
        return (high - 1 + weight).float()

    def k_alpha(self, k_sigma: float | Tensor) -> Tensor:
        return torch.ones_like(torch.as_tensor(k_sigma, dtype=torch.float32))

    def k_scale(self, k_sigma: float | Tensor) -> Tensor:
        return (1 + _double(k_sigma) ** 2).rsqrt().float()


class FlowSchedule(Schedule):
    """Rectified-flow schedule of SD3: alpha = 1 - s, sigma = s = shift * u / (1 + (shift - 1) * u) with u = n / T."""

    def __init__(self, shift: float = 3.0, ticks: int = TICKS):
        if not shift > 0 or not math.isfinite(shift):
            raise ValueError(f"shift must be a positive number; got {shift}. SD3 uses 3.0, and 1.0 means no shift.")
        self.shift, self.ticks = float(shift), ticks

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
        s = _double(k_sigma)
        return (self.ticks * s / (self.shift - (self.shift - 1) * s)).float()

    def k_alpha(self, k_sigma: float | Tensor) -> Tensor:
        return 1 - torch.as_tensor(k_sigma, dtype=torch.float32)

    def k_scale(self, k_sigma: float | Tensor) -> Tensor:
        return torch.ones_like(torch.as_tensor(k_sigma, dtype=torch.float32))


def _double(level: float | Tensor) -> Tensor:
    """Level as float64, on the CPU where the device has no such type (Apple's, Intel's)."""
    level = torch.as_tensor(level)
    return (level if level.device.type == "cuda" else level.cpu()).double()


class _Table:
    """A float64 row by whole ticks, read in float32 on the device where they are; moved there once."""

    def __init__(self, row: Tensor):
        self.rows = {torch.device("cpu"): row.float()}

    def at(self, tick: int | float | Tensor) -> Tensor:
        n = torch.as_tensor(tick)
        if n.is_floating_point() and (n != n.round()).any():
            raise ValueError(
                f"alpha and sigma exist at whole ticks only; got {n.tolist()}. Use k_sigma for levels between."
            )
        if n.device not in self.rows:
            self.rows[n.device] = self.rows[torch.device("cpu")].to(n.device)
        return self.rows[n.device][n.long()]


def _seen(condition: Tensor) -> bool:
    """Whether a condition holds anywhere; levels on a GPU are not looked at, since every step would wait for it."""
    return condition.device.type == "cpu" and bool(condition.any())


def _columns(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) or () -> broadcastable over a (B, ...) tensor, in its device, fp32."""
    c = coefficient.to(like.device, torch.float32)
    return c.view(-1, *(1,) * (like.ndim - 1)) if c.ndim else c


def jump(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The point at level (alpha, sigma) of the path through x0 and eps: alpha * x0 + sigma * eps, in fp32.

    x0, eps: (B, ...). alpha, sigma: () or (B,). DDIM, Euler and PCM's phase jump (arXiv 2405.18407, Eq. 3) are this.
    """
    return _columns(alpha, x0) * x0.float() + _columns(sigma, x0) * eps.float()


def eps_of(x: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The eps that x = alpha * x0 + sigma * eps holds beside this x0, in fp32. Shapes as in `jump`; sigma not 0."""
    return (x.float() - _columns(alpha, x) * x0.float()) / _columns(sigma, x)


Level = tuple[Tensor, Tensor]  # alpha and sigma


def extrapolated(x0: Tensor, x0_before: Tensor, before: Level, now: Level, then: Level) -> Tensor:
    """x0 as it is halfway of the step from level `now` to `then`, on the line through its values at `before` and `now`.

    A jump with it is one step of DPM-Solver++(2M) (arXiv 2211.01095, Alg. 2): D = x0 + h / (2 h_before) (x0 -
    x0_before), h in log(alpha / sigma). Levels as in `jump`, in any one convention. Rows without a step before (of no
    length, or from a level without signal) keep their x0, and so do those that end at the clean one.
    """
    signal = [(torch.as_tensor(a) / torch.as_tensor(s)).log() for a, s in (before, now, then)]
    h_before, h = signal[1] - signal[0], signal[2] - signal[1]
    ratio = torch.where((h_before > 0) & h.isfinite(), h / (2 * h_before), 0.0)
    return x0 + _columns(ratio, x0) * (x0 - x0_before)


def renoise(x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, alpha_to: Tensor, sigma_to: Tensor) -> Tensor:
    """A point at level (alpha, sigma) taken up to a noisier level (alpha_to, sigma_to) by the forward process, in fp32.

    q(x_to | x) is normal with mean alpha_to / alpha * x and variance sigma_to^2 - (alpha_to / alpha * sigma)^2: exact
    for VP and for flow, so that x at its level's marginal gives x_to at its own (arXiv 2107.00630, App. A.1).
    x, noise: (B, ...), noise standard normal. The levels: () or (B,), in any one convention; alpha_to may be 0.
    Raises ValueError when a target level is the cleaner one (see `_seen`): noise cannot be taken out this way.
    """
    a, s, a_to, s_to = (_columns(torch.as_tensor(c), x) for c in (alpha, sigma, alpha_to, sigma_to))
    ratio = a_to / a.clamp(min=torch.finfo(torch.float32).tiny)  # from pure noise to pure noise: all of it fresh
    kept = ratio * s
    if _seen(kept > s_to * (1 + 1e-4)):
        raise ValueError(
            f"renoise goes up in noise only; got sigma / alpha from {(s / a).flatten().tolist()} "
            f"to {(s_to / a_to).flatten().tolist()}. Use jump to go down."
        )
    added = ((s_to - kept) * (s_to + kept)).clamp(min=0).sqrt()
    return ratio * x.float() + added * noise.float()


def x0_eps_from_output(
    output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, prediction: str, min_alpha: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What a network output says about (x0, eps) at the point x = alpha * x0 + sigma * eps, in fp32.

    output, x: (B, ...). alpha, sigma: () or (B,). prediction: "epsilon", "v_prediction" (v = alpha * eps - sigma * x0,
    arXiv 2202.00512) or "flow" (v = eps - x0). min_alpha: eps-prediction divides by max(alpha, min_alpha), PCM's clamp
    for one-step models (arXiv 2405.18407, Eq. 39); 0 for none. Raises ValueError for another prediction, for
    "epsilon" where alpha is 0 (the output of an eps-network holds no x0 there; see `_seen`), and for a clamp without
    "epsilon".
    """
    a, s = _columns(alpha, x), _columns(sigma, x)
    output, x = output.float(), x.float()
    if min_alpha and prediction != "epsilon":
        raise ValueError(
            f"min_alpha {min_alpha:g} clamps a division by alpha, and only eps-prediction has one; got {prediction!r}. "
            "Set min_alpha to 0."
        )
    if prediction == "epsilon":
        if _seen(a == 0):
            raise ValueError("eps-prediction has no x0 where alpha is 0: a zero-terminal-SNR model must predict v.")
        return (x - s * output) / a.clamp(min=min_alpha), output
    if prediction == "v_prediction":
        return a * x - s * output, s * x + a * output
    if prediction == "flow":
        return x - s * output, x + (1 - s) * output
    raise ValueError(f"Unknown prediction {prediction!r}; available: {', '.join(PREDICTIONS)}.")


def output_from_x0_eps(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """The network output that `x0_eps_from_output` would read as (x0, eps)."""
    a, s = _columns(alpha, x0), _columns(sigma, x0)
    x0, eps = x0.float(), eps.float()
    if prediction == "epsilon":
        return eps
    if prediction == "v_prediction":
        return a * eps - s * x0
    if prediction == "flow":
        return eps - x0
    raise ValueError(f"Unknown prediction {prediction!r}; available: {', '.join(PREDICTIONS)}.")
