"""One optimizer update: forward and backward passes, gradients shared and clipped, the step.

Nothing in it waits for a GPU. What an update gave, its losses and whether they were finite, is on its way to the host
as an `Outcome`, to be read when the next update is under way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config.config import Config
from ..efficiency.attention import preferring
from ..system.clock import Clock
from ..system.processes import Processes
from .engine import Batch, Engine, Losses
from .matching import Unrolled
from .optimizers import STUDENT, Learners, lr_factor

Work = Batch | Unrolled  # what an engine's passes go by


@dataclass(frozen=True)
class Outcome:
    """What update `step` (from 1) gave: its samples, and numbers that may still be on their way from the GPU.

    numbers: named in `names`; "stop" is the share of processes that were asked to stop, "bad" of those with a loss or
    gradient that is not finite. totals: (samples,) what was minimised. landed: when both are in main memory; None where
    they were there from the start.
    """

    step: int
    samples: list[int]
    names: list[str]
    numbers: Tensor
    totals: Tensor
    landed: torch.cuda.Event | None

    def read(self) -> dict[str, float]:
        """The numbers by name, once they are here."""
        if self.landed:
            self.landed.synchronize()
        return dict(zip(self.names, self.numbers.tolist(), strict=True))

    def bad_samples(self) -> list[int]:
        """The samples of this process whose loss is not finite."""
        return [self.samples[i] for i in (~self.totals.isfinite()).nonzero().flatten().tolist()]


class Updater:
    """Makes the updates of one run from the batches that come."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        coming: Iterator[tuple[list[int], Batch]],
        accumulation: int,
        optimizer: torch.optim.Optimizer,
        learners: Learners,
        processes: Processes,
    ):
        self.config = config
        self.engine = engine
        self.coming = coming
        self.accumulation = accumulation
        self.optimizer = optimizer
        self.learners = learners
        self.processes = processes
        self.accelerator: Accelerator = processes.accelerator
        self.clock: Clock = engine.clock
        # an opponent with updates of its own has none in the student's
        self.rounds = engine.opponent.rounds if engine.opponent else 0
        self.together = {name: p for name, p in learners.items() if not self.rounds or name == STUDENT}

    def __call__(self, step: int, stop: bool) -> Outcome:
        """Update `step` (from 1) of the learners. stop: whether this process was asked to."""
        opponent = self.engine.opponent
        for group in self.optimizer.param_groups:
            waits = group["learner"] == STUDENT and opponent is not None and step <= opponent.warmup
            group["lr"] = 0.0 if waits else group["full_lr"] * lr_factor(self.config, step)

        means: Counter[str] = Counter()
        drawn: Iterable[tuple[list[int], Work]] = (self._next() for _ in range(self.accumulation))
        if self.rounds:
            drawn = list(drawn)
        with preferring(self.config.train.attention):
            for number in range(self.rounds):
                means = self._opponent(number, drawn)
            samples, totals = self._student(drawn, means)

        with self.clock.part("optimizer"):
            numbers, names = self._step(stop, torch.cat(totals), means)
        numbers, totals, landed = self._to_host(numbers, torch.cat(totals))
        return Outcome(step, samples, names, numbers, totals, landed)

    def _next(self) -> tuple[list[int], Work]:
        with self.clock.part("data"):
            numbers, batch = next(self.coming)
            batch = batch.to(self.accelerator.device)
        with self.accelerator.autocast():
            return numbers, self.engine.unrolled(batch)

    def _student(self, drawn: Iterable[tuple[list[int], Work]], means: Counter[str]) -> tuple[list[int], list[Tensor]]:
        """The student's passes, forward and backward; the samples, and what was minimised of them, (B,) by batch.

        means: takes in the mean of each loss.
        """
        self.optimizer.zero_grad()
        samples: list[int] = []
        totals: list[Tensor] = []
        for numbers, work in drawn:
            whole: list[Tensor] = []
            for run in self.engine.passes(work):
                with self.accelerator.autocast():
                    losses = run()
                total = self._total(losses)
                self._backward(total)
                whole.append(total.detach())
                means.update({name: loss.detach().mean() / self.accumulation for name, loss in losses.named().items()})
            samples += numbers
            totals.append(torch.stack(whole).sum(0))
        return samples, totals

    def _opponent(self, number: int, drawn: list[tuple[list[int], Work]]) -> Counter[str]:
        """Update `number` of the opponent's own before the student's; the means of its loss and its gradient's norm.

        A loss that is not finite is left to the student's, which asks the opponent, to bring to light.
        """
        opponent = self.engine.opponent
        self.optimizer.zero_grad()
        means: Counter[str] = Counter()
        for _, work in drawn:
            for run in self.engine.opponent_passes(work, number):
                with self.accelerator.autocast():
                    loss = run()
                self._backward(loss)
                means.update({f"{opponent.name} loss": loss.detach().mean() / self.accumulation})

        with self.clock.part("optimizer"):
            parameters = opponent.named_parameters()
            shared = self.processes.mean(_gradients({opponent.name: parameters}), torch.stack([*means.values()]))
            self.accelerator.unscale_gradients()
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), opponent.most_grad_norm(self.config))
            self.optimizer.step()
        return Counter(dict(zip(means, shared, strict=True)) | {f"gradient norm of the {opponent.name}": norm})

    def _backward(self, total: Tensor) -> None:
        with self.clock.part("backward"):
            self.accelerator.backward(total.mean() / self.accumulation)

    def _total(self, losses: Losses) -> Tensor:
        """(B,) the sum that is minimised: each part reaches its own weights alone, so one backward pass serves all."""
        if losses.generator is None:
            return losses.distance
        return losses.distance + self.config.adversarial.weight * losses.generator + losses.discriminator

    def _step(self, stop: bool, totals: Tensor, means: dict[str, Tensor]) -> tuple[Tensor, list[str]]:
        """Share and clip the gradients and step; the update's numbers with their names."""
        # What the processes must agree on travels with the gradients: one exchange an update, and no number is read.
        stopping = totals.new_full((), float(stop))
        bad = (~totals.isfinite()).any().to(totals.dtype)
        means = {name: mean.to(totals) for name, mean in means.items()}
        shared = self.processes.mean(_gradients(self.together), torch.stack([stopping, bad, *means.values()]))

        self.accelerator.unscale_gradients()
        most = self.config.train.max_grad_norm
        norms = [torch.nn.utils.clip_grad_norm_(parameters.values(), most) for parameters in self.together.values()]
        if self.accelerator.scaler is None:  # fp16's scaler skips steps with infinite gradients by itself
            shared[1] += (~torch.stack(norms).isfinite()).any()
        self.optimizer.step()

        names = ["stop", "bad", *means, *(f"gradient norm of the {name}" for name in self.together)]
        return torch.cat([shared, torch.stack(norms).to(shared)]), names

    def _to_host(self, *tensors: Tensor) -> tuple[Tensor | torch.cuda.Event | None, ...]:
        """The tensors on their way to main memory, and the event that tells when they are there."""
        if self.accelerator.device.type != "cuda":
            return *tensors, None
        copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        landed = torch.cuda.Event()
        landed.record()
        return *copies, landed


def _gradients(learners: Learners) -> list[Tensor]:
    """The gradients of these learners, in a fixed order; zero where no loss reached."""
    parameters = [p for named in learners.values() for p in named.values()]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [p.grad for p in parameters]
