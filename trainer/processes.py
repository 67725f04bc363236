"""Several processes of one run, as `accelerate launch` starts them: what they share at each update."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

# How long one waits for another in an update, while the first one may be saving; a dead one is noticed at once.
PATIENCE = timedelta(minutes=30)


class ProcessLost(RuntimeError):
    """Another process of the run has ended or hangs."""


class Processes:
    """The processes of one run; with a single one nothing is shared."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.count, self.rank = accelerator.num_processes, accelerator.process_index
        # a group of its own: the others may wait for hours while one caches, but not in an update
        self.group = dist.new_group(timeout=PATIENCE) if self.count > 1 else None

    def wait(self) -> None:
        """Until all are here."""
        self.accelerator.wait_for_everyone()

    def mean(self, tensors: list[Tensor], more: Tensor) -> Tensor:
        """The mean over all processes: of `tensors` in place, and of the row `more` as the result, in one exchange.

        Raises `ProcessLost` when another process is gone.
        """
        if self.count == 1:
            return more
        flat = torch.cat([t.flatten() for t in (*tensors, more)])
        try:
            dist.all_reduce(flat, group=self.group)
        except RuntimeError as error:
            raise ProcessLost(f"Another process of this run has ended, or hangs ({_first_line(error)})") from error
        *means, row = (flat / self.count).split([t.numel() for t in (*tensors, more)])
        torch._foreach_copy_(tensors, [m.view_as(t) for m, t in zip(means, tensors, strict=True)])
        return row


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
