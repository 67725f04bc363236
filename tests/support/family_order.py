"""The family on a closed form: two Gaussians in one dimension, an exact teacher, a small network, the trainer's engine.

    python -m support.family_order [--seeds 3] [--updates 1500] [--trials] [--rows "lcm;cd"]

Prints, for every objective that has a teacher or learns from data alone, how far its samples are from the data: the
1-Wasserstein distance, at 1 to 16 steps, deterministic and stochastic, mean over the seeds (half the range). With
--trials, for settings that are no default, each beside the row that it changes.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor, nn

from phased_consistency.samplers import PhaseGrid, VPSchedule, sample_phased, x0_eps_from_output
from phased_consistency.trainer.lora.adapter import Average, Learner
from phased_consistency.trainer.objectives import CD, CT, CTM, DSCD, LCF, LCM, PCM, TCD, Objective, Progressive
from phased_consistency.trainer.training.engine import Batch, Engine
from support.closed_form import StubBase, Switch

SCHEDULE, MODES, STD = VPSchedule.from_betas(), torch.tensor([-1.0, 1.0]), 0.25
STEPS, SAMPLES, BATCH = (1, 2, 4, 8, 16), 4000, 256
UNGUIDED = {"guidance_mode": "normalcfg"}
ROWS = {
    "pcm, 2 phases": PCM(phases=2, **UNGUIDED),
    "pcm, 4 phases": PCM(phases=4, **UNGUIDED),
    "pcm, 8 phases": PCM(phases=8, **UNGUIDED),
    "lcm": LCM(**UNGUIDED),
    "cd": CD(**UNGUIDED | {"target_ema": 0}),
    "tcd": TCD(**UNGUIDED),
    "ctm": CTM(**UNGUIDED),
    "dscd": DSCD(**UNGUIDED),
    "progressive, to 4": Progressive(phases=4, **UNGUIDED),
    "ct": CT(),
    "lcf": LCF(),
}


@dataclass(frozen=True)
class Trial:
    """An objective, of what the network predicts, and whether the rate falls in each stage."""

    objective: Objective
    prediction: str = "v_prediction"
    staged: bool = False


EPS = {"prediction": "epsilon"}
TRIALS = {
    "pcm, 4 phases": Trial(ROWS["pcm, 4 phases"]),
    "pcm, 4 phases, inside 0.5": Trial(PCM(phases=4, inside=0.5, **UNGUIDED)),
    "lcm": Trial(ROWS["lcm"]),
    "lcm, huber_c 0.03": Trial(LCM(huber_c=0.03, **UNGUIDED)),
    "lcm, distance_in output": Trial(LCM(distance_in="output", **UNGUIDED)),
    "lcm, distance_in output, huber_c 0.03": Trial(LCM(distance_in="output", huber_c=0.03, **UNGUIDED)),
    "lcm, target_ema 0.95": Trial(LCM(target_ema=0.95, **UNGUIDED)),
    "dscd": Trial(ROWS["dscd"]),
    "dscd, noisiest_share 0.2": Trial(DSCD(noisiest_share=0.2, **UNGUIDED)),
    "dscd of eps": Trial(ROWS["dscd"], **EPS),
    "dscd of eps, cos_power 0.5": Trial(DSCD(cos_power=0.5, **UNGUIDED), **EPS),
    "dscd of eps, cos_power 0": Trial(DSCD(cos_power=0.0, **UNGUIDED), **EPS),
    "ct": Trial(ROWS["ct"]),
    "ct, noisiest_share 0.2": Trial(CT(noisiest_share=0.2)),
    "progressive, to 4": Trial(ROWS["progressive, to 4"]),
    "progressive, to 4, lr_schedule stages": Trial(ROWS["progressive, to 4"], staged=True),
    "progressive, to 4, both": Trial(Progressive(phases=4, average_teaches=True, **UNGUIDED), staged=True),
}


def level(tick: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(c(tick).view(-1, 1, 1, 1) for c in (SCHEDULE.alpha, SCHEDULE.sigma))


def teacher(x: Tensor, tick: Tensor, condition: dict) -> tuple[Tensor, Tensor]:
    """The exact (x0, eps) of the mixture."""
    alpha, sigma = (c.unsqueeze(-1) for c in level(tick))
    off, variance = x.unsqueeze(-1) - alpha * MODES, alpha**2 * STD**2 + sigma**2
    posterior = torch.softmax(-(off**2) / (2 * variance), -1)
    x0 = (posterior * (MODES + alpha * STD**2 / variance * off)).sum(-1)
    return x0, (x - level(tick)[0] * x0) / level(tick)[1]


class Network(nn.Module):
    """Predicts v, or eps, from a point and its angle atan(sigma / alpha)."""

    def __init__(self, prediction: str = "v_prediction", width: int = 64):
        super().__init__()
        self.prediction = prediction
        self.layers = nn.Sequential(
            nn.Linear(9, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor, tick: Tensor, condition: dict) -> tuple[Tensor, Tensor]:
        alpha, sigma = level(tick)
        waves = torch.atan2(sigma, alpha).view(-1, 1) * torch.tensor([1.0, 2.0, 4.0, 8.0])
        output = self.layers(torch.cat([x.view(-1, 1), waves.sin(), waves.cos()], 1)).view_as(x)
        return x0_eps_from_output(output, x, SCHEDULE.alpha(tick), SCHEDULE.sigma(tick), self.prediction)


class AllWeights(Switch, Learner):
    """Stands for the adapter: the network's own weights, all of them learnt."""

    def __init__(self, network: Network):
        self.network = network

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.network.named_parameters())

    def sentence(self) -> str:
        return "all weights"


def data(count: int, generator: torch.Generator) -> Tensor:
    modes = MODES[torch.randint(2, (count, 1, 1, 1), generator=generator)]
    return modes + STD * torch.randn(count, 1, 1, 1, generator=generator)


def diffusion_model(updates: int, prediction: str = "v_prediction") -> dict[str, Tensor]:
    """What every run starts from: a network that has learnt the exact denoiser."""
    torch.manual_seed(0)
    network, generator = Network(prediction), torch.Generator().manual_seed(9)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(updates):
        tick = torch.randint(1, 1001, (BATCH,), generator=generator)
        (alpha, sigma), x0 = level(tick), data(BATCH, generator)
        x = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)
        (x0, eps), (x0_true, eps_true) = network(x, tick, {}), teacher(x, tick, {})
        optimizer.zero_grad()
        off = eps - eps_true if prediction == "epsilon" else alpha * (eps - eps_true) - sigma * (x0 - x0_true)
        off.square().mean().backward()
        optimizer.step()
    return network.state_dict()


def distilled(row: Objective | Trial, start: dict[str, Tensor], updates: int, seed: int) -> Network:
    """The network after so many updates of the engine, all its weights trained; the rate falls as a cosine."""
    trial = row if isinstance(row, Trial) else Trial(row)
    row = trial.objective
    network, generator = Network(trial.prediction), torch.Generator().manual_seed(seed)
    network.load_state_dict(start)
    learner = AllWeights(network)
    engine = Engine(StubBase(SCHEDULE, trial.prediction, learner, teacher, network), learner, row, {})
    average = Average(learner, 0.98) if row.averaged_teacher() else None
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)

    def rate(i: int) -> float:
        done = i / updates
        done = done * row.stage_count() - row.stage(done) if trial.staged else done
        return 0.5 * (1 + math.cos(math.pi * done))

    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for i in range(updates):
        x0 = data(BATCH, generator)
        noise = torch.randn(x0.shape, generator=generator)
        levels = row.levels(BATCH, SCHEDULE, i / updates, generator)
        batch = Batch(x0, noise, levels, None, {"hidden": torch.zeros(BATCH, 1)}, i / updates)
        optimizer.zero_grad()
        engine.step(batch).distance.mean().backward()
        optimizer.step()
        falling.step()
        if average:
            average.update(i + 1)
        engine.updated(i + 1, i / updates, (i + 1) / updates, average)
    return network


@torch.no_grad()
def error(network: Network, steps: int, gamma: float, phases: int) -> float:
    """1-Wasserstein distance of the samples to the data."""
    sigmas = SCHEDULE.k_sigma(torch.tensor(PhaseGrid(40, phases).plan(steps).ticks))
    noise = torch.randn(SAMPLES, 1, 1, 1, generator=torch.Generator().manual_seed(3))

    def model(x: Tensor, sigma: Tensor, **_) -> Tensor:
        tick = SCHEDULE.tick(sigma).round().long()
        return network(x * SCHEDULE.k_scale(sigma).view(-1, 1, 1, 1), tick, {})[0]

    how = {"schedule": SCHEDULE, "gamma": gamma, "extra_args": {"seed": 1}}
    made = sample_phased(model, noise / SCHEDULE.k_scale(sigmas[0]), sigmas, **how).flatten().sort().values
    true = data(50 * SAMPLES, torch.Generator().manual_seed(77)).flatten().sort().values
    return (made - true.view(SAMPLES, 50).mean(1)).abs().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--trials", action="store_true", help="settings that are no default")
    parser.add_argument("--rows", help="these alone, between semicolons")
    args = parser.parse_args()
    torch.set_num_threads(1)
    starts = {kind: diffusion_model(args.updates, kind) for kind in ("v_prediction", "epsilon")}
    untrained = Network()
    untrained.load_state_dict(starts["v_prediction"])
    rows = TRIALS if args.trials else {"the base itself": None} | {name: Trial(row) for name, row in ROWS.items()}
    rows = {name: row for name, row in rows.items() if args.rows is None or name in args.rows.split(";")}
    heads = " | ".join(f"{n} {mode}" for mode in ("det.", "stoch.") for n in STEPS)
    print(f"| | {heads} |\n|{'---|' * (1 + 2 * len(STEPS))}")
    for name, row in rows.items():
        trained, phases = [untrained], 1
        if row:
            phases = row.objective.grid().phases
            trained = [distilled(row, starts[row.prediction], args.updates, n) for n in range(args.seeds)]
        found = [[error(net, n, gamma, phases) for net in trained] for gamma in (0.0, 1.0) for n in STEPS]
        cells = " | ".join(f"{mean(v):.3f}" + (f" ({(max(v) - min(v)) / 2:.3f})" if len(v) > 1 else "") for v in found)
        print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
