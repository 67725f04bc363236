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
from ..families import Base
from ..families.base import DTYPES, outputs_of
from ..lora.adapter import Learner, learner
from ..objectives.discriminator import Discriminator
from .activations import Activations, kept_activations, most_bytes
from .blocks import blocks_of
from .half import add_in_one_product
from .quantize import ROW_BYTES, quantizable, storage

VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
Ranks = tuple[tuple[str, int], ...]  # `lora.ranks`, as what is cached can be asked for by it


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


def footprint(config: Config, family: type[Base]) -> Footprint:
    """The sizes of this configuration's networks, worked out once for all the switches that are tried on them."""
    return _measure(
        family,
        family.config_folder(config.base.path, config.base.config),
        dtype=config.base.dtype,
        t5=config.base.t5 is not False,
        resolution=config.data.resolution,
        rank=config.lora.rank,
        ranks=_ranks(config),
        dora=config.lora.dora,
        heads_width=config.adversarial.width if config.adversarial.weight else 0,
    )


def check_network(config: Config, family: type[Base]) -> None:
    """Raise ValueError for a resolution that the network cannot take, and for lora.ranks that find no module of it."""
    folder = family.config_folder(config.base.path, config.base.config)
    _inputs(family, folder, config.base.dtype, config.data.resolution)
    if config.lora.ranks and not family.whole:
        trained_parameters(config, family)


def trained_parameters(config: Config, family: type[Base]) -> list[nn.Parameter]:
    """What a run's student trains, by shape alone (meta device). Raises ValueError as `check_network`."""
    folder, lora = family.config_folder(config.base.path, config.base.config), config.lora
    *_, trained = _adapted(family, folder, config.base.dtype, lora.rank, _ranks(config), lora.dora)
    return trained.parameters()


def _ranks(config: Config) -> Ranks:
    return tuple((config.lora.ranks or {}).items())


@lru_cache(maxsize=8)
def _network_config(family: type[Base], folder: Path) -> Any:
    """The config of a network in a folder, with every default filled in."""
    with torch.device("meta"):
        return family.network_class.from_config(_read(folder / family.component)).config


def _inputs(family: type[Base], folder: Path, dtype: str, resolution: int) -> dict[str, Any]:
    """What the network is called with, without memory. Raises ValueError for a resolution that it cannot take."""
    return family.dummy_inputs(_network_config(family, folder), resolution, _maker(DTYPES[dtype]))


@lru_cache(maxsize=8)
def _measure(
    family: type[Base],
    folder: Path,
    dtype: str,
    t5: bool,
    resolution: int,
    rank: int,
    ranks: Ranks,
    dora: bool | None,
    heads_width: int,
) -> Footprint:
    # first of all: a resolution that the network cannot take needs no network to be refused
    inputs = _inputs(family, folder, dtype, resolution)
    network, parameters, blocks, trained = _adapted(family, folder, dtype, rank, ranks, dora)
    activations, pass_bytes = _student(family, folder, dtype, resolution, rank, ranks, dora)
    channels, features = _features(family, network, trained, inputs) if heads_width else ([], None)
    heads = Discriminator(channels, heads_width, seed=0).parameters() if heads_width else []
    vae, text, encoding, decoding = _encoders(family, folder, t5, resolution)
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


def network_and_inputs(
    family: type[Base], folder: Path, dtype: str, resolution: int
) -> tuple[nn.Module, dict[str, Any]]:
    """A network without weights, and what it is called with for one sample. Raises ValueError as `check_network`."""
    inputs = _inputs(family, folder, dtype, resolution)
    return _network(family, folder, dtype), inputs


def _network(family: type[Base], folder: Path, dtype: str) -> nn.Module:
    with torch.device("meta"):
        network = family.network_class.from_config(_read(folder / family.component)).to(DTYPES[dtype])
    return network.requires_grad_(False)


@lru_cache(maxsize=2)
def _adapted(
    family: type[Base], folder: Path, dtype: str, rank: int, ranks: Ranks, dora: bool | None
) -> tuple[nn.Module, int, dict[str, Frozen], Learner]:
    """A network without weights; its parameters and its blocks, counted before an adapter is in it; what is trained."""
    network = _network(family, folder, dtype)
    parameters, blocks = sum(p.numel() for p in network.parameters()), _frozen_blocks(network)
    with torch.device("meta"):
        trained = learner(network, family, rank, rank, seed=0, ranks=dict(ranks), dora=dora)
    if not family.whole and network.dtype != torch.float32:
        add_in_one_product(trained)  # a run has autocast off, too, which the meta device does not know
    return network, parameters, blocks, trained


@lru_cache(maxsize=8)
def _student(
    family: type[Base], folder: Path, dtype: str, resolution: int, rank: int, ranks: Ranks, dora: bool | None
) -> tuple[Activations, int]:
    """What autograd keeps of the student's pass with one sample, and what a pass without gradients holds: the same
    with a discriminator and without."""
    network, *_, trained = _adapted(family, folder, dtype, rank, ranks, dora)
    inputs = _inputs(family, folder, dtype, resolution)
    run = lambda: network(**inputs)  # noqa: E731
    # a DoRA makes tensors as large as weights, which there are once for all samples, and not in the teacher's pass
    with trained.off() if dora else nullcontext():
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
