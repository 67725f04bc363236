"""The sizes of a run's networks, counted on copies without weights (meta device): what estimates are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from ..config.config import Config
from ..families import Base, look_at_base
from ..families.base import DTYPES, outputs_of
from ..lora.adapter import Learner, learner
from ..objectives.discriminator import Discriminator
from .activations import Activations, kept_activations, most_bytes
from .blocks import blocks_of
from .half import add_in_one_product
from .quantize import ROW_BYTES, quantizable, storage

VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


@dataclass(frozen=True)
class Frozen:
    """One block's frozen parameters, those of them in layers that may be quantised, and these layers' rows."""

    parameters: int
    quantizable: int
    rows: int

    def bytes(self, width: int, quantize: str | None) -> int:
        if quantize is None:
            return self.parameters * width
        rest = self.parameters - self.quantizable
        return rest * width + self.quantizable + self.rows * ROW_BYTES[storage(quantize)]


@dataclass(frozen=True)
class Footprint:
    """The sizes that estimates are made of: the same whatever is switched on to save memory.

    parameters: of the network, of its blocks in `blocks`; learnt: the trained ones, in `modules`. activations: of the
    student's pass with one sample; pass_bytes: what a pass without gradients holds for one. features, heads: the
    discriminator's pass and parameters. vae, text: bytes of weights; encoding, decoding: what the VAE holds for one
    picture.
    """

    parameters: int
    blocks: dict[str, Frozen]
    learnt: int
    modules: int
    activations: Activations
    pass_bytes: int
    features: Activations | None
    heads: int
    vae: int
    text: int
    encoding: int
    decoding: int


@dataclass(frozen=True)
class CountedPass:
    """Whose pass is counted: a network of this family and dtype (a key of `DTYPES`) by the config in a folder, with one
    square picture and a prompt of so many tokens, None where it is told no words."""

    family: type[Base]
    folder: Path
    dtype: str
    resolution: int
    tokens: int | None

    @classmethod
    def of(cls, config: Config, family: type[Base]) -> CountedPass:
        """The pass of a run's network. Raises what `look_at_base` raises."""
        folder = family.config_folder(config.base.path, config.base.config)
        tokens = look_at_base(config.base.path, **config.base.reading()).tokens
        return cls(family, folder, config.base.dtype, config.data.resolution, tokens)

    def inputs(self) -> dict[str, Any]:
        """What the network is called with, without memory. Raises ValueError for a resolution that it cannot take."""
        config = self.family.network_config(str(self.folder), None)
        return self.family.dummy_inputs(config, self.resolution, _maker(DTYPES[self.dtype]), self.tokens)

    def network(self) -> nn.Module:
        """The network without weights, frozen."""
        with torch.device("meta"):
            network = self.family.network_class.from_config(_read(self.folder / self.family.component))
        return network.to(DTYPES[self.dtype]).requires_grad_(False)


@dataclass(frozen=True)
class Adapting:
    """The settings of `lora` that its size hangs on."""

    rank: int
    ranks: tuple[tuple[str, int], ...]
    dora: bool | None

    @classmethod
    def of(cls, config: Config) -> Adapting:
        lora = config.lora
        return cls(lora.rank, tuple((lora.ranks or {}).items()), lora.dora)


def footprint(config: Config, family: type[Base]) -> Footprint:
    """The sizes of this configuration's networks, worked out once for all the switches that are tried on them."""
    return _measure(
        CountedPass.of(config, family),
        Adapting.of(config),
        t5=config.base.t5 is not False,
        heads_width=config.adversarial.width if config.adversarial.weight else 0,
    )


def check_network(config: Config, family: type[Base]) -> None:
    """Raise ValueError for a resolution that the network cannot take, and for lora.ranks that find no module of it."""
    CountedPass.of(config, family).inputs()
    if config.lora.ranks and not family.whole:
        trained_parameters(config, family)


def trained_parameters(config: Config, family: type[Base]) -> list[nn.Parameter]:
    """What a run's student trains, by shape alone (meta device). Raises ValueError as `check_network`."""
    *_, trained = _adapted(CountedPass.of(config, family), Adapting.of(config))
    return trained.parameters()


@lru_cache(maxsize=8)
def _measure(counted: CountedPass, adapting: Adapting, t5: bool, heads_width: int) -> Footprint:
    # first of all: a resolution that the network cannot take needs no network to be refused
    inputs, family = counted.inputs(), counted.family
    network, parameters, blocks, trained = _adapted(counted, adapting)
    activations, pass_bytes = _student(counted, adapting)
    channels, features = _features(family, network, trained, inputs) if heads_width else ([], None)
    heads = Discriminator(channels, heads_width, seed=0).parameters() if heads_width else []
    vae, text, encoding, decoding = _encoders(family, counted.folder, t5, counted.resolution)
    return Footprint(
        parameters=parameters,
        blocks=blocks,
        learnt=sum(p.numel() for p in trained.parameters()),
        modules=0 if family.whole else len(trained.layers),
        activations=activations,
        pass_bytes=pass_bytes,
        features=features,
        heads=sum(p.numel() for p in heads),
        vae=vae,
        text=text,
        encoding=encoding,
        decoding=decoding,
    )


@lru_cache(maxsize=2)
def _adapted(counted: CountedPass, adapting: Adapting) -> tuple[nn.Module, int, dict[str, Frozen], Learner]:
    """A network without weights; its parameters and its blocks, counted before an adapter is in it; what is trained."""
    network, family, rank = counted.network(), counted.family, adapting.rank
    parameters, blocks = sum(p.numel() for p in network.parameters()), _frozen_blocks(network)
    with torch.device("meta"):
        trained = learner(network, family, rank, rank, seed=0, ranks=dict(adapting.ranks), dora=adapting.dora)
    if not family.whole and network.dtype != torch.float32:
        add_in_one_product(trained)  # a run has autocast off, too, which the meta device does not know
    return network, parameters, blocks, trained


@lru_cache(maxsize=8)
def _student(counted: CountedPass, adapting: Adapting) -> tuple[Activations, int]:
    """What autograd keeps of the student's pass with one sample, and what a pass without gradients holds: the same
    with a discriminator and without."""
    network, *_, trained = _adapted(counted, adapting)
    inputs = counted.inputs()
    run = lambda: network(**inputs)  # noqa: E731
    # a DoRA makes tensors as large as weights, which there are once for all samples, and not in the teacher's pass
    with trained.off() if adapting.dora else nullcontext():
        held = most_bytes(run)
    return kept_activations(network, run), held


def _frozen_blocks(network: nn.Module) -> dict[str, Frozen]:
    layers = quantizable(network)
    blocks = {}
    for path, block in blocks_of(network).items():
        within = [layer for name, layer in layers.items() if name.startswith(f"{path}.")]
        blocks[path] = Frozen(
            parameters=sum(p.numel() for p in block.parameters()),
            quantizable=sum(layer.weight.numel() for layer in within),
            rows=sum(layer.out_features for layer in within),
        )
    return blocks


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def _maker(dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *shape: torch.empty(*shape, device="meta", dtype=dtype)


def _features(
    family: type[Base], network: nn.Module, trained: Learner, inputs: dict[str, Any]
) -> tuple[list[int], Activations]:
    """Channels of the maps that a discriminator judges, and the bare base's pass for them over the student's points."""
    name, points = next(iter(inputs.items()))
    x = points.detach().requires_grad_()
    inputs = {**inputs, name: x}
    run = lambda: outputs_of(family.feature_blocks(network), lambda: network(**inputs))  # noqa: E731
    with trained.off():
        channels = [family.feature_map(network, output, x).shape[1] for output in run()]
        return channels, kept_activations(network, run)


def _encoders(family: type[Base], folder: Path, t5: bool, resolution: int) -> tuple[int, int, int, int]:
    """Bytes of the VAE and of the text encoders, in fp32, T5 in bf16 as on a GPU; and what encoding and decoding a
    picture holds."""
    vae_bytes = text = encoding = decoding = 0
    for usual in family.configs.iterdir():
        if usual.name != "vae" and not usual.name.startswith("text_encoder"):
            continue
        settings = _read(folder / usual.name if (folder / usual.name / "config.json").is_file() else usual)
        with torch.device("meta"):
            if usual.name == "vae":
                model = VAES[settings["_class_name"]].from_config(settings)
                latents = torch.empty(1, model.config.latent_channels, resolution // 8, resolution // 8)
                pixels = torch.empty(1, model.config.in_channels, resolution, resolution)
                encoding = most_bytes(lambda m=model, x=pixels: m.encode(x))
                decoding = most_bytes(lambda m=model, x=latents: m.decode(x))
                vae_bytes = 4 * sum(p.numel() for p in model.parameters())
                continue
            kind = getattr(transformers, settings["architectures"][0])
            model = kind(kind.config_class(**settings))
        is_t5 = isinstance(model, transformers.T5EncoderModel)
        if t5 or not is_t5:
            text += (2 if is_t5 else 4) * sum(p.numel() for p in model.parameters())
    return vae_bytes, text, encoding, decoding
