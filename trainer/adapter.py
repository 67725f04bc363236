"""The LoRA on the one base: inject it, switch it off for the teacher, average it, name its tensors.

There is never a second copy of the network. The frozen weights keep their dtype, the LoRA's are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NAME = "default"


@contextmanager
def bare(network: nn.Module) -> Iterator[None]:
    """Every adapter of a diffusers model is off inside this block, whatever happens in it; it may have none."""
    if not getattr(network, "peft_config", None):
        yield
        return
    network.disable_adapters()
    try:
        yield
    finally:
        network.enable_adapters()


class Adapter:
    """A LoRA of `rank` and `alpha` injected into `network` (a diffusers model) on its target modules.

    Starts as the identity: B is zero. `seed` fixes A. Raises ValueError when no module matches.
    """

    def __init__(self, network: nn.Module, targets: tuple[str, ...], rank: int, alpha: float, seed: int):
        self.network, self.rank, self.alpha = network, rank, alpha
        self.is_off = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network.add_adapter(
                LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=True), NAME
            )
        self.layers = {name: m for name, m in network.named_modules() if isinstance(m, LoraLayer)}
        if not self.layers:
            raise ValueError(f"No module of the base matches the LoRA targets {', '.join(targets)}.")
        for parameter in self.parameters():
            parameter.data = parameter.data.float()

    @contextmanager
    def off(self) -> Iterator[None]:
        """The bare base inside this block: the teacher."""
        before, self.is_off = self.is_off, True
        try:
            with bare(self.network):
                yield
        finally:
            self.is_off = before

    def checkpoint_gradients(self) -> None:
        """Keep no activations for the backward pass. Each block is computed again with the adapter as it was: a
        discriminator's body ran without, though the adapter is on by then."""

        def as_it_was():
            return nullcontext(), self.off() if self.is_off else nullcontext()

        self.network.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, context_fn=as_it_was))
        self.network.train()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Module path + ".lora_A" or ".lora_B" -> parameter, in a fixed order."""
        return {
            f"{name}.{part}": getattr(layer, part)[NAME].weight
            for name, layer in self.layers.items()
            for part in ("lora_A", "lora_B")
        }

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())

    def state(self) -> dict[str, Tensor]:
        """A copy of the weights, in fp32 on the CPU."""
        return {name: p.detach().float().cpu().clone() for name, p in self.named_parameters().items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Overwrite the weights; raises ValueError unless the names and shapes are exactly the adapter's own."""
        own = self.named_parameters()
        shapes, given = ({n: t.shape for n, t in tensors.items()} for tensors in (own, state))
        wrong = sorted(n for n in own.keys() | state.keys() if shapes.get(n) != given.get(n))
        if wrong:
            raise ValueError(f"These weights are for another adapter: {len(wrong)} tensors differ, such as {wrong[0]}.")
        for name, parameter in own.items():
            parameter.copy_(state[name])

    @contextmanager
    def using(self, state: dict[str, Tensor]) -> Iterator[None]:
        """Other weights inside this block (an average, say), the present ones afterwards."""
        present = self.state()
        self.load(state)
        try:
            yield
        finally:
            self.load(present)


class Average:
    """Moving average of an adapter's weights, in fp32: m <- d * m + (1 - d) * w, with d rising from 0 to `decay`."""

    def __init__(self, adapter: Adapter, decay: float):
        self.adapter, self.decay = adapter, decay
        self.weights = {n: p.detach().clone() for n, p in adapter.named_parameters().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update `step` (from 1)."""
        decay = min(self.decay, (step - 1) / (step + 9))
        for name, parameter in self.adapter.named_parameters().items():
            self.weights[name].lerp_(parameter, 1 - decay)
