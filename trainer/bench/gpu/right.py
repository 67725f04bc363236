"""Is it right: what a GPU computes is what a CPU computes, nothing waits, and a killed run ends in the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...config.config import Config
from ...efficiency.prepare import prepare
from ...families import load_base
from ...families.base import DTYPES
from ...lora.adapter import learner
from ...reporting.progress import Reporter, Status
from ...system.clock import Clock
from ...training.failure import RunFailed, RunStopped
from ...training.loop import Run, train
from ...training.setup import assemble
from ..full_size import batch_of
from .bases import TINY
from .section import Verdict, Workplace, place_of

PROMPTS = {"sd15": "a red star", "sdxl": "a red star", "sd3": "a star"}
# Relative errors of losses and gradients that are allowed against fp32 on the CPU: of fp32, and of 16 bits, where a
# gradient in bf16 is off by up to 0.19 on a CPU too.
EXACT, IN_HALF = (1e-3, 1e-3), (0.05, 0.3)
WITH_ALL = ("adversarial.weight=0.1", "train.accumulation=2", "train.ema=0.9")
# Updates of a run, those until its checkpoint, and the one that is shown when it is killed.
STEPS, SAVED, KILLED = 6, 3, 4


def devices_agree(place: Workplace) -> Verdict:
    """One adversarial batch of each family, in fp32 without TF32 and in 16 bits: are its losses and its gradients those
    of the CPU in fp32?"""
    errors, holds = {}, True
    limits = {"fp32": EXACT, place.half: IN_HALF}
    with _without_tf32():
        for family in TINY:
            exact = _losses_and_gradients(place, family, "fp32", torch.device("cpu"))
            for dtype, allowed in limits.items():
                result = _losses_and_gradients(place, family, dtype, place.device)
                apart = [((a - b).norm() / b.norm()).item() for a, b in zip(result, exact, strict=True)]
                errors[f"{family} {dtype}"] = dict(zip(("losses", "gradients"), apart, strict=True))
                holds &= all(error <= most for error, most in zip(apart, allowed, strict=True))
    worst = {
        dtype: [max(e[what] for name, e in errors.items() if name.endswith(dtype)) for what in ("losses", "gradients")]
        for dtype in limits
    }
    parts = [f"{dtype}: losses {pair[0]:.1e}, gradients {pair[1]:.1e}" for dtype, pair in worst.items()]
    return Verdict(f"off by at most, {'; '.join(parts)}", errors, holds)


def _losses_and_gradients(place: Workplace, family: str, dtype: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The losses of a batch, and the gradients of their sum in the LoRA, each as one row in fp32 on the CPU."""
    config = place.tiny_config(f"{family}-4step-adv", f"base.dtype={dtype}", "train.batch_size=4")
    base = load_base(config.base.path, dtype=DTYPES[dtype], device=device)
    condition = base.encode_prompts([PROMPTS[family]] * config.train.batch_size)
    null = base.null_condition(base.encode_prompts([""]))
    adapter = learner(base.network, type(base), config.lora.rank, config.lora.alpha, 0)

    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    for weight in adapter.parameters():  # one that is not the identity
        weight.data += 0.02 * draw(*weight.shape).to(device)
    batch = batch_of(config, base, {name: rows.cpu() for name, rows in condition.items()}, draw)
    with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
        prepare(config, base, adapter, None)
        engine = assemble(config, base, adapter, null, None, Clock())
        losses = engine.step(batch.to(device)).named()
    sum(loss.mean() for loss in losses.values()).backward()
    gradients = [weight.grad.flatten() for weight in adapter.parameters() if weight.grad is not None]
    return torch.cat([*losses.values()]).detach().float().cpu(), torch.cat(gradients).float().cpu()


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Let products in fp32 be in fp32 on a GPU, inside this block."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def nothing_waits(place: Workplace) -> Verdict:
    """Steady updates while torch raises an error wherever the host would wait for the GPU: each family, plain, and
    adversarial with accumulation and an average."""
    waits = {}
    for family in TINY:
        cache = f"data.cache={place.new_folder()}"
        for kind, settings in (("plain", ()), ("adversarial", WITH_ALL)):
            run = Run(place.tiny_config(f"{family}-4step", "train.steps=100", cache, *settings), Reporter())
            try:
                for _ in range(2):
                    run.update()
                with _waits_are_errors(place):
                    for _ in range(2):
                        run.update()
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
                waits[f"{family} {kind}"] = place_of(error)
            finally:
                run.updater.coming.close()
    place.need_gpu()  # after the updates, which are tried anywhere
    lines = "; ".join(f"{name} at {line}" for name, line in waits.items())
    return Verdict(f"the host waits: {lines}" if waits else "no wait in 12 updates", {"waits": waits}, not waits)


@contextmanager
def _waits_are_errors(place: Workplace) -> Iterator[None]:
    if place.on_gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if place.on_gpu:
            torch.cuda.set_sync_debug_mode("default")


def resumes(place: Workplace) -> Verdict:
    """A run whole, whole again, and killed after its checkpoint and gone on with, in each precision: are the LoRAs the
    same bytes? Where not even two whole runs are, the same with torch's deterministic algorithms."""
    figures, holds = {}, True
    for dtype in ("bf16", "fp32", "fp16"):
        if (dtype, place.half) == ("bf16", "fp16") or (dtype == "fp16" and not place.on_gpu):
            figures[dtype] = "needs a newer card" if place.on_gpu else "needs CUDA"
            continue
        ways = figures[dtype] = {"default": _resumed(place, dtype)}
        if not ways["default"]["twice"]:
            ways["deterministic"] = _resumed(place, dtype, deterministic=True)
        holds &= [*ways.values()][-1] == {"twice": True, "resumed": True}
    return Verdict("; ".join(f"{dtype} {_in_words(ways)}" for dtype, ways in figures.items()), figures, holds)


def _in_words(ways: dict[str, dict[str, bool]] | str) -> str:
    if isinstance(ways, str):
        return ways
    kind, same = [*ways.items()][-1]
    result = "the same bytes" if same["resumed"] else "OTHER BYTES"
    if not same["twice"]:
        return f"{result}, as two whole runs differ"
    return result if kind == "default" else f"{result} with deterministic algorithms; two whole runs differ without"


def _resumed(place: Workplace, dtype: str, deterministic: bool = False) -> dict[str, bool]:
    """Whether a run in this precision comes to the same bytes when it is made twice, and when it is killed."""
    place.clean()  # accelerate has one precision at a time
    settings = [f"base.dtype={dtype}", f"train.steps={STEPS}", f"train.save_every={SAVED}", "train.lr=1e-3"]
    settings += ["lora.dtype=fp32", f"data.cache={place.new_folder()}", *WITH_ALL]
    whole, again, killed = (place.tiny_config("sd15-4step", *settings) for _ in range(3))
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        expected, second = _trained(whole), _trained(again)
        _kill(killed)
        return {"twice": second == expected, "resumed": _trained(killed) == expected}
    finally:
        torch.use_deterministic_algorithms(False)


def _trained(config: Config) -> str:
    return hashlib.sha256(train(config).read_bytes()).hexdigest()


class _Killer(Reporter):
    """Interrupts a run as Ctrl-C would that comes a second time: at once, in the middle of an update."""

    def __init__(self):
        self.done = False

    def update(self, status: Status) -> None:
        if status.step == KILLED:
            self.done = True
            raise KeyboardInterrupt


def _kill(config: Config) -> None:
    """Begin a run, and let it be killed between its checkpoint and its end."""
    killer = _Killer()
    try:
        train(config, killer)
    except RunStopped:
        raise
    except RunFailed:
        if not killer.done:
            raise
