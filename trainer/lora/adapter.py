"""What is trained: a LoRA on the one base, or where there is no teacher all of its weights.

The LoRA is injected, and switched off for the teacher, so there is never a second copy of the network. Frozen weights
keep their dtype, trained ones are fp32.
"""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..families import Base
from .dora import is_dora, match_magnitudes

NAME = "default"
CRITIC = "critic"  # the second adapter of a run whose objective has a critic


def trained_alone(layer: LoraLayer) -> str | None:
    """The name of the adapter that is active in a layer, where it is one alone and of those that a run trains."""
    active = layer.active_adapters
    return active[0] if active in ([NAME], [CRITIC]) else None


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


class Learner(ABC):
    """The weights that a run trains, by name, and the ways to keep and to exchange them."""

    network: nn.Module

    @abstractmethod
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, in a fixed order."""

    @abstractmethod
    def off(self) -> AbstractContextManager:
        """The teacher inside this block. Raises ValueError where there is none."""

    def as_it_is(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """torch's checkpoint's two contexts, for a pass now and for the same pass later: on or off as it is now."""
        return nullcontext(), nullcontext()

    @abstractmethod
    def sentence(self) -> str:
        """What is trained, for people."""

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())

    def state(self) -> dict[str, Tensor]:
        """A copy of the weights, in fp32 on the CPU."""
        return {name: p.detach().float().cpu().clone() for name, p in self.named_parameters().items()}

    def copy(self) -> dict[str, Tensor]:
        """A copy of the weights where they are."""
        return {name: p.detach().clone() for name, p in self.named_parameters().items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Overwrite the weights; raises ValueError unless the names and shapes are exactly its own."""
        self._check(state)
        for name, parameter in self.named_parameters().items():
            parameter.copy_(state[name])

    @contextmanager
    def using(self, state: dict[str, Tensor]) -> Iterator[None]:
        """Other weights inside this block (an average, say), the present ones afterwards. Raises as `load` does."""
        self._check(state)
        present = {name: parameter.data for name, parameter in self.named_parameters().items()}
        try:
            self._put(state)
            yield
        finally:
            self._put(present)

    def _put(self, state: dict[str, Tensor]) -> None:
        """Let the parameters be these tensors."""
        for name, parameter in self.named_parameters().items():
            parameter.data = state[name].to(parameter.device)
        # autocast knows a weight by its parameter, and would hand out the low-precision copy of another
        torch.clear_autocast_cache()

    def _check(self, state: dict[str, Tensor]) -> None:
        shapes = {name: parameter.shape for name, parameter in self.named_parameters().items()}
        others = {name: tensor.shape for name, tensor in state.items()}
        wrong = sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
        if wrong:
            raise ValueError(f"These weights are of another run: {len(wrong)} tensors differ, such as {wrong[0]}.")


class Adapter(Learner):
    """A LoRA of `rank` and `alpha` injected into `network` (a diffusers model) on its target modules.

    ranks: of modules whose path a pattern finds, 0 for none, all at the same alpha / rank (see `lora.ranks`). dora:
    with magnitudes. Starts as the identity: B is zero. `seed` fixes A. A second one, of another name, is off until it
    stands `in_place` of the first. Raises ValueError when no module matches, for a pattern that finds none, and for a
    DoRA where a row of a weight is 0.
    """

    def __init__(
        self,
        network: nn.Module,
        targets: tuple[str, ...],
        rank: int,
        alpha: float,
        seed: int,
        name: str = NAME,
        ranks: Mapping[str, int] | None = None,
        dora: bool | None = None,
    ):
        self.network = network
        self.rank = rank
        self.ranks = dict(ranks or {})
        self.dora = bool(dora)
        self.alpha = alpha
        self.name = name
        self.is_off = False
        self.stand_in: Adapter | None = None  # the other adapter that is on in its place
        self._strengths: dict[bool, Tensor] = {}  # the LoRA's part off and on, where a number switches it
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second one is meant
            torch.manual_seed(seed)
            network.add_adapter(self._peft_config(targets), name)
        self.layers = {name: m for name, m in network.named_modules() if isinstance(m, LoraLayer)}
        if not self.layers:
            raise ValueError(f"No module of the base matches the LoRA targets {', '.join(targets)}.")
        # PEFT makes them in the base's dtype, in which steps as small as a learning rate's would round to nothing
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
        self.match_magnitudes()
        if name != NAME:
            network.set_adapter(NAME)
            for parameter in self.parameters():  # which that has frozen, as of one that is not active
                parameter.requires_grad_(True)

    def _peft_config(self, targets: tuple[str, ...]) -> LoraConfig:
        if not self.ranks:
            return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(targets), use_dora=self.dora)

        ends = tuple(f".{target}" for target in targets)
        kinds = nn.Linear | nn.Conv2d | LoraLayer
        paths = [path for path, m in self.network.named_modules() if isinstance(m, kinds) and f".{path}".endswith(ends)]
        left = set(paths)  # those of no pattern so far
        for pattern in self.ranks:
            places = {path for path in paths if re.search(pattern, path)}
            if not places:
                raise ValueError(
                    f"lora.ranks: {pattern!r} finds none of the {len(paths)} modules that a LoRA of this base has, "
                    f"such as {', '.join(paths[:3])}. Take a part of such a path."
                )
            if not places & left:
                raise ValueError(
                    f"lora.ranks: all {len(places)} modules that {pattern!r} finds are found by a pattern before it, "
                    "and the first counts. Put it before the others, or leave it out."
                )
            left -= places
        ranks = {path: self._rank_of(path) for path in paths}
        chosen = {re.escape(path): rank for path, rank in ranks.items() if rank}
        if not chosen:
            raise ValueError("lora.ranks leaves no module to be trained: give one of them a rank.")
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules="|".join(chosen),
            rank_pattern={f"^{path}": rank for path, rank in chosen.items() if rank != self.rank},
            alpha_pattern={f"^{path}": self.alpha * r / self.rank for path, r in chosen.items() if r != self.rank},
            use_dora=self.dora,
        )

    def _rank_of(self, path: str) -> int:
        return next((rank for pattern, rank in self.ranks.items() if re.search(pattern, path)), self.rank)

    def match_magnitudes(self) -> None:
        """Let a DoRA's magnitudes be the lengths of the rows as they are, so that it is as without them."""
        for path, layer in self.layers.items():
            if is_dora(layer, self.name):
                try:
                    match_magnitudes(layer, self.name)
                except ValueError as error:
                    raise ValueError(
                        f"lora.dora: {path} has no lengths to be trained, {error}. Leave the module out, with a "
                        "pattern of its path in lora.ranks, or train without lora.dora."
                    ) from None

    @contextmanager
    def in_place(self, other: Adapter) -> Iterator[None]:
        """This adapter on inside this block, and learning, instead of another of the same network.

        The switch is a flag of each layer, not a walk through the network.
        """
        for parameter in self.parameters():  # PEFT freezes what is not active whenever it switches adapters itself
            parameter.requires_grad_(True)
        other.stand_in = self
        self._show()
        try:
            yield
        finally:
            other._show()
            other.stand_in = None

    def _show(self) -> None:
        for layer in self.layers.values():
            layer._active_adapter = [self.name]

    @contextmanager
    def off(self) -> Iterator[None]:
        """The bare base inside this block: the teacher."""
        if self.is_off:
            yield
            return
        self.is_off = True
        try:
            self._switch(on=False)
            yield
        finally:
            self._switch(on=True)
            self.is_off = False

    def _switch(self, on: bool) -> None:
        """Switch the layers by their own flag or number, without a walk through the network: a backward pass that
        computes the blocks of a discriminator's body again does so at each of them."""
        if self._strengths:
            self._set_strength(on)
        else:
            for layer in self.layers.values():
                layer._disable_adapters = not on

    def activate(self) -> None:
        """Make it the network's adapter again, at its own strength, after another has been."""
        self.network.set_adapters(NAME)
        if self._strengths:  # in whose place PEFT has put plain numbers
            self._set_strength(not self.is_off)

    def switch_by_number(self) -> None:
        """From now on `off` multiplies the LoRA's part by 0 instead of leaving it out, so that compiled code stays.

        The time of that part is then spent for the teacher too.
        """
        scaling = next(iter(self.layers.values())).scaling[NAME]
        device = next(self.network.parameters()).device
        self._strengths = {on: torch.tensor(scaling * on, device=device) for on in (False, True)}
        self._set_strength(not self.is_off)

    def _set_strength(self, on: bool) -> None:
        # two constants, not one that changes: autograd keeps the number for the backward pass
        for layer in self.layers.values():
            layer.scaling[NAME] = self._strengths[on]

    def as_it_is(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        if self.stand_in:
            return nullcontext(), self.stand_in.in_place(self)
        return nullcontext(), self.off() if self.is_off else nullcontext()

    def sentence(self) -> str:
        kind, rank = "DoRA" if self.dora else "LoRA", rank_text(self.rank, self.ranks)
        return f"{kind} of rank {rank}, alpha {self.alpha:g} on {len(self.layers)} modules."

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Module path + ".lora_A", ".lora_B" or ".lora_magnitude_vector" -> parameter, in a fixed order."""
        parts = ("lora_A", "lora_B", "lora_magnitude_vector") if self.dora else ("lora_A", "lora_B")
        return {
            f"{name}.{part}": getattr(layer, part)[self.name].weight
            for name, layer in self.layers.items()
            for part in parts
        }


def rank_text(rank: int, ranks: Mapping[str, int]) -> str:
    """A LoRA's ranks in words: of all modules, and of those that a pattern finds."""
    return ", ".join([str(rank), *(f"{pattern} {other or 'none'}" for pattern, other in ranks.items())])


class Whole(Learner):
    """All weights of a network, in fp32: for one that starts from nothing, so that there is no teacher."""

    def __init__(self, network: nn.Module):
        self.network = network.float().requires_grad_(True)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.network.named_parameters())

    def off(self) -> AbstractContextManager:
        raise ValueError("There is no teacher: all weights of the network are trained. Use an objective without one.")

    def sentence(self) -> str:
        return f"All {sum(p.numel() for p in self.parameters()):,} weights of the network are trained."


def learner(
    network: nn.Module,
    family: type[Base],
    rank: int,
    alpha: float,
    seed: int,
    ranks: Mapping[str, int] | None = None,
    dora: bool | None = None,
) -> Learner:
    """All of a family's network, or a LoRA on it (see `Adapter`), to be trained."""
    if family.whole:
        return Whole(network)
    return Adapter(network, family.lora_targets, rank, alpha, seed, ranks=ranks, dora=dora)


class Average:
    """Moving average of a learner's weights, in fp32: m <- d * m + (1 - d) * w, with d rising from 0 to `decay`."""

    def __init__(self, adapter: Learner, decay: float):
        self.adapter, self.decay = adapter, decay
        self.weights = adapter.copy()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update `step` (from 1)."""
        decay = min(self.decay, (step - 1) / (step + 9))
        parameters = self.adapter.named_parameters()
        torch._foreach_lerp_([self.weights[name] for name in parameters], list(parameters.values()), 1 - decay)
