"""Is it fast: what the card reaches, our updates beside the reference loop's, single switches, sampling."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ....samplers import sample_phased
from ...config.config import Config
from ...efficiency.attention import KERNELS, kernel_seconds
from ...efficiency.work import product_speed
from ...families import load_base
from ...families.base import DTYPES
from ...families.generate import sampling_model
from ...reporting.progress import Reporter
from ...system.machine import GIB, out_of_memory
from ..comparison import bench
from ..report import machine
from .section import Unfit, Verdict, Workplace, gib

UPDATES, WARMUP = 3, 1
# GiB that one update of a family's plain preset moves, with one pass (docs/measurements/speed.md).
MOVED = {"sd15": 483, "sdxl": 361, "sd3": 349}
# What of the card's own speeds an update is expected to reach, in products and in copies, and how much longer it may
# take. The shares are assumptions until they are measured.
PRODUCTS, COPIES, SLACK = 0.55, 0.75, 1.5
OVERHEAD = 1.05  # times a bare loop's, of sampling
ATTENTION = torch.Size((4, 24, 4250, 64))  # of an SD3 at 1024 px: two samples, guided


@dataclass(frozen=True)
class Switch:
    """One change to a preset: its settings. gpu: whether it needs one. again: whether it runs no code that another
    does not, so it is left out on a tiny base."""

    preset: str
    settings: tuple[str, ...] = ()
    gpu: bool = False
    again: bool = True


SDXL = "sdxl-4step", ("train.accumulation=1",)
SWITCHES = {
    "sdxl B=2": Switch(*SDXL, again=False),
    "sdxl B=10": Switch("sdxl-4step", ("train.accumulation=1", "train.batch_size=10")),
    "sdxl fp8": Switch("sdxl-4step", ("train.accumulation=1", "base.quantize=fp8")),
    "sdxl int8": Switch("sdxl-4step", ("train.accumulation=1", "base.quantize=int8"), again=False),
    "sd3 B=2": Switch("sd3-4step"),
    "sd3 compile": Switch("sd3-4step", ("train.compile=true",), gpu=True),
    "sd15 fp16": Switch("sd15-4step", ("base.dtype=fp16",), gpu=True),
    "sdxl offload": Switch("sdxl-4step", ("train.accumulation=1", "train.offload=true"), again=False),
    "sdxl no checkpointing": Switch("sdxl-4step", ("train.accumulation=1", "train.gradient_checkpointing=false")),
    "sdxl int8 no checkpointing": Switch(
        "sdxl-4step", ("train.accumulation=1", "train.gradient_checkpointing=false", "base.quantize=int8")
    ),
    "sdxl int8-compute": Switch("sdxl-4step", ("train.accumulation=1", "base.quantize=int8-compute")),
    "sdxl fp8-compute": Switch("sdxl-4step", ("train.accumulation=1", "base.quantize=fp8-compute"), gpu=True),
    "sdxl cudnn attention": Switch("sdxl-4step", ("train.accumulation=1", "train.attention=cudnn"), gpu=True),
    "sdxl compile": Switch("sdxl-4step", ("train.accumulation=1", "train.compile=true"), gpu=True),
    "sd15 compile": Switch("sd15-4step", ("train.compile=true",), gpu=True),
    "sdxl compile fp8": Switch(
        "sdxl-4step", ("train.accumulation=1", "train.compile=true", "base.quantize=fp8"), gpu=True
    ),
    "sdxl compile int8-compute": Switch(
        "sdxl-4step", ("train.accumulation=1", "train.compile=true", "base.quantize=int8-compute"), gpu=True
    ),
}


class _Notes(Reporter):
    """Keeps what a run says."""

    def __init__(self):
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


# --- the card


def measure_card(place: Workplace) -> Verdict:
    """What the card reaches in large products and copies, what a launch costs, and which attention is fastest."""
    dtype = DTYPES[place.half] if place.on_gpu else torch.float32
    side, numbers, launches = (8192, 2**29, 2000) if place.on_gpu else (256, 2**20, 50)
    x = torch.randn(numbers, device=place.device)
    y, one = torch.empty_like(x), torch.zeros(1, device=place.device)

    place.ceilings["matmul"] = product_speed(place.device, dtype, side)
    place.ceilings["copy"] = 2 * x.nbytes / _seconds(place, lambda: y.copy_(x))
    launch = _seconds(place, lambda: [one.add_(1) for _ in range(launches)]) / launches
    matmul, copy = place.ceilings["matmul"], place.ceilings["copy"]
    figures = {**machine(), "matmul_flops": matmul, "copy_bytes_per_second": copy, "seconds_a_launch": launch}
    if place.on_gpu:
        figures["free_bytes"] = torch.cuda.mem_get_info()[0]
        figures["attention_seconds"] = {
            name: kernel_seconds(name, ATTENTION, ATTENTION, dtype, place.device) for name in KERNELS
        }
    products, copies = f"{matmul / 1e12:.3g} TFLOP/s in products", f"{copy / 1e12:.3g} TB/s in copies"
    return Verdict(f"{products}, {copies}, {launch * 1e6:.2g} us a launch", figures)


def _seconds(place: Workplace, run: Callable[[], object], times: int = 5) -> float:
    """The median of what `run` takes, until the GPU is done with it."""
    seconds = []
    for _ in range(times):
        _wait(place)
        start = time.perf_counter()
        run()
        _wait(place)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _wait(place: Workplace) -> None:
    if place.on_gpu:
        torch.cuda.synchronize()


# --- updates


def beside_reference(place: Workplace, family: str) -> Verdict:
    """Plain and adversarial updates of a family's preset, with one pass each, beside the reference loop's.

    Raises `Unfit` where our own updates do not fit.
    """
    config = place.config(f"{family}-4step-adv", "train.accumulation=1")
    details = _bench(place, config) or _bench(place, config, reference=False)
    if details is None:
        raise Unfit("more memory than this card has")

    holds, parts = True, []
    for kind in ("plain", "adversarial"):
        ours, ratios = details[kind]["ours"], details[kind].get("ratios")
        parts.append(f"{kind} {_rate(place, ours)}")
        if ratios:
            parts[-1] += f", {ratios['updates_per_second']:.2f} times the reference's in {ratios['peak_bytes']:.2f} of"
            parts[-1] += " its memory"
            holds &= ratios["updates_per_second"] >= 1 and ratios["peak_bytes"] <= 1
        else:
            parts[-1] += "; the reference loop is out of memory"
    if not place.tiny:
        if not place.ceilings:
            measure_card(place)
        seconds, most = 1 / details["plain"]["ours"]["updates_per_second"], SLACK * _expected(place, family, details)
        details["allowed_seconds"] = most
        parts.append(f"a plain update takes {seconds:.3g} s and may, by its count, take {most:.3g}")
        holds &= seconds <= most
    return Verdict("; ".join(parts), details, place.judged(holds))


def _expected(place: Workplace, family: str, details: dict[str, Any]) -> float:
    """Seconds of a plain update by its operations, by the bytes that it moves, and by what the card reaches."""
    operations = details["plain"]["ours"]["flops_per_update"]
    products = operations / (PRODUCTS * place.ceilings["matmul"])
    return products + MOVED[family] * GIB / (COPIES * place.ceilings["copy"])


def switched(place: Workplace, name: str) -> Verdict:
    """The plain updates of ours alone with one of `SWITCHES`. Raises `Unfit` for what cannot run here."""
    switch = SWITCHES[name]
    if switch.gpu:
        place.need_gpu()
    if switch.again and place.tiny:
        raise Unfit("full size: on a tiny base it runs what others run")
    notes = _Notes()
    warmup = 3 if "train.compile=true" in switch.settings else WARMUP
    details = _bench(place, place.config(switch.preset, *switch.settings), warmup, False, notes)
    if details is None:
        raise Unfit("more memory than this card has")

    details["said"] = [line for line in notes.lines if "off by" in line or "computed again" in line]
    errors = [line for line in details["said"] if "off by" in line]
    sentence = f"{_rate(place, details['plain']['ours'])}, peak {gib(details['plain']['ours']['peak_bytes'])}"
    return Verdict(". ".join([sentence, *errors]), details)


def _bench(
    place: Workplace,
    config: Config,
    warmup: int = WARMUP,
    reference: bool = True,
    reporter: Reporter | None = None,
) -> dict[str, Any] | None:
    """What `bench` measures; None where memory runs out."""
    updates = 1 if place.tiny else UPDATES
    try:
        return bench(config, updates=updates, warmup=warmup, reference=reference, reporter=reporter)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    place.clean()
    return None


def _rate(place: Workplace, figures: dict[str, Any]) -> str:
    """The speed of a loop in words, with its share of what the card reaches in products."""
    words = f"{figures['samples_per_second']:.3g} samples/s"
    if "matmul" in place.ceilings:
        share = figures["flops_per_update"] * figures["updates_per_second"] / place.ceilings["matmul"]
        words += f", {share:.0%} of the card"
    if figures["utilisation"] is not None:
        words += f" ({figures['utilisation']:.0%} of its data sheet)"
    if figures["host_seconds"] is not None:
        words += f", host busy {figures['host_seconds'] * figures['updates_per_second']:.0%}"
    return words


# --- sampling


def sampler_overhead(place: Workplace) -> Verdict:
    """Four steps of `sample_phased` on SDXL, one picture, by turns with a bare Euler loop over the same network."""
    config = place.config("sdxl-4step")
    base = load_base(config.base.path, dtype=DTYPES[config.base.dtype], device=place.device)
    base.drop_encoders()
    draw = lambda *shape: torch.randn(shape, device=place.device)  # noqa: E731
    model = sampling_model(base, base.dummy_condition(base.network.config, draw))
    sigmas = base.schedule.k_sigma(torch.tensor([1000, 750, 500, 250, 0])).to(place.device)
    noise = draw(1, *base.latent_shape(config.data.resolution)) * sigmas[0]

    @torch.no_grad()
    def euler() -> torch.Tensor:
        x = noise
        for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
            x = x + (x - model(x, now * x.new_ones(1))) / now * (then - now)
        return x

    ours = lambda: sample_phased(model, noise, sigmas, schedule=base.schedule)  # noqa: E731
    ours(), euler()
    pairs = [(_seconds(place, ours, 1), _seconds(place, euler, 1)) for _ in range(9)]
    phased, bare = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    figures = {"sample_phased_seconds": phased, "euler_seconds": bare, "ratio": phased / bare}
    sentence = f"{phased / bare:.3f} times a bare Euler loop's time, {1000 * (phased - bare) / 4:+.2f} ms a step"
    return Verdict(sentence, figures, place.judged(phased / bare <= OVERHEAD))
