"""Several processes of one run, as `accelerate launch` starts them: what they share at each update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor

# How long a process waits for another in an update; the first one may be saving. A dead one is noticed at
# once.
PATIENCE = timedelta(minutes=30)


class ProcessLost(RuntimeError):
    """Another process of the run has ended or hangs."""


class Processes:
    """The processes of one run; with a single one nothing is shared."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.count = accelerator.num_processes
        self.rank = accelerator.process_index
        # a group of its own: processes may wait for hours while one of them caches, but not in an update
        self.group = dist.new_group(timeout=PATIENCE) if self.count > 1 else None

    @classmethod
    def start(cls, dtype: str) -> Processes:
        """Join the processes that this one was started with. dtype: of the passes, "fp32", "bf16" or "fp16"."""
        # caching may take one process hours longer than another
        patience = InitProcessGroupKwargs(timeout=timedelta(days=2))
        precision = "no" if dtype == "fp32" else dtype
        return cls(Accelerator(mixed_precision=precision, kwargs_handlers=[patience]))

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and speaks to the user."""
        return self.rank == 0

    def by_first(self, context: AbstractContextManager) -> AbstractContextManager:
        """The context in the first process, and one that does nothing in the others."""
        return context if self.first else nullcontext()

    def wait(self) -> None:
        """Wait until all processes are here. Raises `ProcessLost` when one is gone."""
        with _lost():
            self.accelerator.wait_for_everyone()

    def check_together(self, step: int, parameters: list[Tensor]) -> None:
        """Raise ValueError where the processes do not begin at the same update with the same weights.

        They would not when each machine resumes from a folder of its own. Weights are compared by their sum.
        """
        if self.count == 1:
            return
        here = torch.stack(
            [sum(p.detach().double().sum() for p in parameters), parameters[0].new_tensor(step).double()]
        )
        least, most = here.clone(), here.clone()
        with _lost():
            dist.all_reduce(least, dist.ReduceOp.MIN, self.group)
            dist.all_reduce(most, dist.ReduceOp.MAX, self.group)
        if not torch.equal(least, most):
            raise ValueError(
                f"The processes do not begin alike: this one at update {step}, others between {int(least[1])} and "
                f"{int(most[1])}. All machines must see one run folder: set output to a disk that they share."
            )

    def least(self, number: float) -> float:
        """The least of what all processes give. Raises `ProcessLost` when another process is gone."""
        if self.count == 1:
            return number
        least = torch.tensor(number, dtype=torch.float64, device=self.accelerator.device)
        with _lost():
            dist.all_reduce(least, dist.ReduceOp.MIN, self.group)
        return least.item()

    def mean(self, tensors: list[Tensor], more: Tensor) -> Tensor:
        """The mean over all processes, in one exchange: of `tensors` in place, and of the row `more` as the result.

        Every exchange costs a wait for the slowest process, so all travel as one row of numbers. Raises
        `ProcessLost` when another process is gone.
        """
        if self.count == 1:
            return more
        flat = torch.cat([t.flatten() for t in (*tensors, more)])
        with _lost():
            dist.all_reduce(flat, group=self.group)
        *means, row = flat.div_(self.count).split([t.numel() for t in (*tensors, more)])
        torch._foreach_copy_(tensors, [m.view_as(t) for m, t in zip(means, tensors, strict=True)])
        return row


@contextmanager
def _lost() -> Iterator[None]:
    """Raise `ProcessLost` in place of the RuntimeError that a collective call in this block raises."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ProcessLost(f"Another process of this run has ended, or hangs ({reason})") from error
