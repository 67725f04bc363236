"""How much longer Sample PCM takes than core's KSampler for the same picture: `python -m host.overhead`, in tests/.

Both sample a deterministic 4-step LoRA on SD1.5, the KSampler with euler and simple, which are the same levels. They
take turns, with a new seed each turn, and what they make is compared. Seconds are by the clock, and of the processor,
which other programs disturb less; both least in what is left when the network's are taken away, and the network's are
the same.
"""

from __future__ import annotations

import argparse
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from host.graphs import ksampler, loaded, sample
from host.server import Server, hosts, out, start
from host.tiny import make_checkpoint, make_loras

NODES = {"Sample PCM": sample, "KSampler": ksampler}
HEAD = ("picture", "wall: Sample PCM, s", "KSampler, s", "ratio", "CPU: Sample PCM, s", "KSampler, s", "ratio")
HEAD += ("CPU beside the network: Sample PCM, ms", "KSampler, ms", "ratio of all")


@dataclass(frozen=True)
class Cost:
    """Seconds of one node, by the clock and of the processor, and of the processor beside the network."""

    wall: float
    cpu: float
    beside: float


def drawn(server: Server, name: str, side: int, seed: int) -> tuple[Cost, torch.Tensor]:
    """What a node costs, and what it makes."""
    graph, links = loaded()
    empty = graph.add("EmptyLatentImage", width=side, height=side, batch_size=1)
    clock = graph.add("TestClock", model=links["model"], samples=out(empty), name=uuid.uuid4().hex)
    node = NODES[name](graph, {**links, "model": out(clock), "latent": out(clock, 1)}, seed=seed)
    stop = graph.add("TestClockStop", clock=out(clock, 2), samples=out(node))
    run, (latent,) = server.tensors(graph, out(node))
    wall, cpu = run.outputs[stop]["all"]
    return Cost(wall, cpu, cpu - run.outputs[stop]["network"][1]), latent


def measure(server: Server, side: int, runs: int) -> dict[str, list[Cost]]:
    """The costs of both nodes for a picture of this side; raises ValueError if what they make differs."""
    costs = {name: [] for name in NODES}
    for seed in range(runs + 1):
        latents = []
        for name in sorted(NODES, reverse=seed % 2 == 1):  # by turns each is the first
            each, latent = drawn(server, name, side, seed)
            costs[name].append(each)
            latents.append(latent)
        if (latents[0] - latents[1]).abs().max() > 1e-4 * latents[1].abs().max():
            raise ValueError(f"The nodes made two different pictures of side {side}, seed {seed}: nothing to compare.")
    return {name: each[1:] for name, each in costs.items()}  # the first of each warms up


def row(side: int, costs: dict[str, list[Cost]]) -> tuple[str, ...]:
    """A line of the table: medians, and the ratios of Sample PCM's to the KSampler's.

    The last ratio takes the KSampler's median for the network of both.
    """
    wall, cpu, beside = (
        [median(getattr(cost, kind) for cost in costs[name]) for name in NODES] for kind in ("wall", "cpu", "beside")
    )
    cells = [f"{side} x {side}"]
    for ours, theirs in (wall, cpu):
        cells += [f"{ours:.3f}", f"{theirs:.3f}", f"{ours / theirs:.3f}"]
    return (*cells, *(f"{1000 * each:.1f}" for each in beside), f"{1 + (beside[0] - beside[1]) / cpu[1]:.4f}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--host", type=Path, default=next(iter(hosts()), None), help="a ComfyUI folder")
    options.add_argument("--sides", type=int, nargs="+", default=[64, 256, 512], help="of the pictures, in pixels")
    options.add_argument("--runs", type=int, default=5, help="of each node for each picture, after one to warm up")
    arguments = options.parse_args()
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    with tempfile.TemporaryDirectory() as name:
        models, base = Path(name, "models"), Path(name, "base")
        for place in (models / "checkpoints", models / "loras", base):
            place.mkdir(parents=True)
        make_loras(models / "loras", make_checkpoint(models / "checkpoints" / "tiny.safetensors"))
        with start(arguments.host, base, models) as server:
            for side in arguments.sides:
                print(f"| {' | '.join(row(side, measure(server, side, arguments.runs)))} |", flush=True)


if __name__ == "__main__":
    main()
