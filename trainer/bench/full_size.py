"""One update of a configuration with its networks at full size, on the emulated GPU: what it asks of it, by part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...samplers import FlowSchedule, VPSchedule
from ..config.config import Config
from ..efficiency.prepare import prepare
from ..families import Base, BaseFacts, Condition, look_at_base
from ..families.base import DTYPES
from ..lora.adapter import learner
from ..objectives import Levels
from ..system.processes import Processes
from ..training.adversary import Judged
from ..training.critic import Critic
from ..training.engine import Batch
from ..training.setup import assemble
from ..training.state import Trained
from ..training.update import Updater
from .ledger import GPU, Ledger, LedgerClock

DRAWN = 64  # samples drawn for each of a batch's, to find those whose target takes a pass


class _Fake(FakeTensorMode):
    avoid_device_init = True  # also for the few tensors that have numbers, such as a schedule's


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention by the kernels that torch takes on a GPU, in place of torch's own function, which without a GPU takes
    the form that keeps its matrices: flash attention in half precision, else the memory-efficient kernel."""
    if torch.is_autocast_enabled(GPU):
        query, key, value = (t.to(torch.get_autocast_dtype(GPU)) for t in (query, key, value))
    if query.dtype == torch.float32 or attn_mask is not None:
        efficient, keeps = torch.ops.aten._scaled_dot_product_efficient_attention, torch.is_grad_enabled()
        return efficient(query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale)[0]
    width = query.shape[-1]
    query, key, value = (F.pad(t, (0, -width % 8)) if width % 8 else t for t in (query, key, value))
    result = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    return result[..., :width] if width % 8 else result


def counted(config: Config) -> dict[str, Any]:
    """What one pass of an update and the optimizer's step ask of a GPU, as JSON-ready values: see `Ledger.report`.

    "resident": bytes that are there before the update: weights, gradients, moments. "notes": what was made ready.
    "passes": how many such passes an update has. Every sample is one whose target takes a pass, where the objective
    has such samples.
    """
    facts = look_at_base(config.base.path, **config.base.reading())
    base = _base(config, facts)
    size = config.train.batch_size
    rows = base.dummy_condition(base.network.config, lambda _, *rest: torch.zeros(size, *rest), facts.tokens)
    batch = batch_of(config, base, rows, torch.zeros)
    ledger = Ledger()
    # in one thread: those of autograd would not have the modes of this block
    with (
        patch.object(F, "scaled_dot_product_attention", attention),
        _Fake(allow_non_fake_inputs=True),
        ledger,
        torch.autograd.set_multithreading_enabled(False),
    ):
        _to_gpu(base)
        updater, trained, notes = _made(config, base, facts.tokens, batch.pinned(), ledger)
        trained.optimizer.optimizer.step()  # makes the moments
        ledger.clear()
        resident = ledger.now
        updater(1, stop=False)
        trained.updated(1, config.train.steps)
    return {"passes": config.train.accumulation, "resident": resident, "notes": notes, **ledger.report()}


def _base(config: Config, facts: BaseFacts) -> Base:
    """The base, with a network on the meta device and without encoders, which are gone when a run trains."""
    kind, zero_snr = facts.family, facts.zero_terminal_snr
    folder = kind.config_folder(config.base.path, config.base.config)
    with torch.device("meta"):
        network = kind.network_class.from_config(kind.network_class.load_config(folder / kind.component))
    network.to(DTYPES[config.base.dtype]).requires_grad_(False).eval()
    if kind.channels_last:
        network.to(memory_format=torch.channels_last)
    schedule = FlowSchedule(facts.shift) if facts.shift else VPSchedule.from_betas(zero_terminal_snr=zero_snr)
    return kind(network, None, [], [], schedule, facts.prediction, zero_snr, "empty", config.base.path, "")


def batch_of(config: Config, base: Base, condition: Condition, make: Callable[..., Tensor]) -> Batch:
    """A batch as a run makes it, on the CPU, of samples whose target takes a pass where there are such.

    condition: the prompts' encodings (B, ...). make: makes the points and the noise, like `torch.zeros`.
    """
    count, objective = config.train.batch_size, config.objective
    shape = base.latent_shape(config.data.resolution)
    generator = torch.Generator().manual_seed(0)
    if objective.matching:
        levels = objective.levels(count, base.schedule, 0.0, generator)
        guidance, draws = objective.draw_guidance(count, 0.0, generator), objective.draws(levels, shape, generator)
        return Batch(None, make(count, *shape), levels, guidance, condition, draws=draws)
    levels = objective.levels(DRAWN * count, base.schedule, 0.0, generator)
    chosen = (levels.r > levels.s).int().argsort(descending=True)[:count]
    levels = Levels(levels.u[chosen], levels.r[chosen], levels.s[chosen])
    judged = None
    if config.adversarial.weight:
        judged = Judged(objective.judged_at(levels, generator), make(count, *shape), make(count, *shape))
    return Batch(
        x0=make(count, *shape),
        noise=make(count, *shape),
        levels=levels,
        guidance=objective.draw_guidance(count, 0.0, generator),
        condition=condition,
        judged=judged,
        inner=(levels.r > levels.s).nonzero().squeeze(1),
    )


def _made(
    config: Config, base: Base, tokens: int | None, batch: Batch, ledger: Ledger
) -> tuple[Updater, Trained, list[str]]:
    """The parts of a run as `Run` makes them, as far as an update goes."""
    processes = Processes.start(config.base.dtype)
    lora = config.lora
    adapter = learner(base.network, type(base), lora.rank, lora.alpha, config.train.seed, lora.ranks, lora.dora)
    on_gpu = lambda *shape: torch.zeros(shape, device=GPU)  # noqa: E731
    null = base.dummy_condition(base.network.config, on_gpu, tokens)
    null.pop("time_ids", None)
    critic = Critic(config, base, adapter) if config.objective.matching else None
    notes = prepare(config, base, adapter, None)
    engine = assemble(config, base, adapter, null, critic, LedgerClock(ledger))
    trained = Trained(config, processes.accelerator, adapter, engine)

    learners = trained.learners()
    for parameters in learners.values():
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
    coming = iter([([*range(len(batch.noise))], batch)])
    return Updater(config, engine, coming, 1, trained.optimizer, learners, processes), trained, notes


def _to_gpu(base: Base) -> None:
    """Put tensors that say they are on the GPU in place of a meta network's, and the schedule's tables beside them."""
    for table in (base.schedule.alpha, base.schedule.sigma):
        table(torch.zeros(1, dtype=torch.long, device=GPU))
    for module in base.network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=GPU), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=GPU)
