"""LoRA files of every kind that people share, small and random, each beside one that ComfyUI's own loader reads.

The two say the same. Where ComfyUI reads a file whole by itself, they are one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from host.tiny import ALPHA, RANK, RECIPE
from phased_consistency.samplers.recipe import HEADER_KEY

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LINEAR = [f"{ATTENTION}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
CONVOLUTION, NORM = "conv_in", "down_blocks.0.resnets.0.norm1"
SCALE = ALPHA / RANK
Tensors = dict[str, Tensor]


class Kind(NamedTuple):
    """A file's tensors and PEFT entry, and the tensors of the file that says the same to ComfyUI's loader; None for one
    of `NOT_IN_CORE`."""

    tensors: Tensors
    core: Tensors | None
    peft: dict | None = None


class Random:
    """Random tensors for a network's modules, under names as they are in files."""

    def __init__(self, network: nn.Module):
        self.network, self.generator = network, torch.Generator().manual_seed(5)

    def weight(self, module: str) -> Tensor:
        return self.network.get_submodule(module).weight

    def __call__(self, *shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=self.generator)

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        out, inner, *kernel = self.weight(module).shape
        return self(RANK, inner, *kernel), self(out, RANK, *[1] * len(kernel))

    def magnitude(self, module: str) -> Tensor:
        """(out,), near the norms of the weight's rows."""
        norms = self.weight(module).detach().flatten(1).norm(dim=1)
        return norms * (1 + self(len(norms)))


def named(module: str, parts: Tensors) -> Tensors:
    return {f"lora_unet_{module.replace('.', '_')}.{part}": tensor.contiguous() for part, tensor in parts.items()}


def plain(pair: tuple[Tensor, Tensor], **more: Tensor) -> Tensors:
    down, up = pair
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)} | more


def peft(module: str, pair: tuple[Tensor, Tensor], adapter: str = "", **more: Tensor) -> Tensors:
    down, up = pair
    parts = {f"lora_A{adapter}.weight": down, f"lora_B{adapter}.weight": up} | more
    return {f"unet.{module}.{part.replace('__', '.')}": tensor for part, tensor in parts.items()}


NAMES = (
    *(
        "LoRA",
        "DoRA",
        "DoRA by columns",
        "LoHa",
        "LoKr",
        "LoCon with a middle",
        "LoRA and LoHa",
        "OFT",
        "GLoRA",
        "norms",
        "weights and biases",
    ),
    *("PEFT", "PEFT with an adapter's name", "PEFT DoRA", "PEFT bias", "kohya with dots", "IA3"),
)


NOT_IN_CORE = ("PEFT DoRA", "IA3")  # for which ComfyUI has no patch


def kinds(network: nn.Module) -> dict[str, Kind]:
    """Every kind by its name."""
    random = Random(network)
    pairs = {module: random.pair(module) for module in (*LINEAR, CONVOLUTION)}
    kohya = {k: v for module, pair in pairs.items() for k, v in named(module, plain(pair)).items()}
    adapter = {"unet.lora_alpha": ALPHA, "unet.r": RANK}
    magnitudes = {module: random.magnitude(module) for module in pairs}
    rows = {m: s.view(-1, *[1] * (pairs[m][0].ndim - 1)) for m, s in magnitudes.items()}
    dora = {k: v for m, pair in pairs.items() for k, v in named(m, plain(pair, dora_scale=rows[m])).items()}
    # PEFT's own shapes: one side for a linear layer, four for a convolution, of which the second is the rows
    in_peft = {m: s if pairs[m][0].ndim == 2 else s.view(1, -1, 1, 1) for m, s in magnitudes.items()}
    bias = random(random.weight(LINEAR[3]).shape[0])
    whole = {
        "LoRA": kohya,
        "DoRA": dora,
        "DoRA by columns": named(CONVOLUTION, plain(pairs[CONVOLUTION], dora_scale=1 + random(1, 4, 1, 1)))
        | named(LINEAR[0], plain(pairs[LINEAR[0]], dora_scale=1 + random(1, 320))),
        "LoHa": _by_module(LINEAR, lambda m: _loha(random, m)),
        "LoKr": _by_module(LINEAR, lambda m: _lokr(random, m)),
        "LoCon with a middle": named(CONVOLUTION, _tucker(random)) | named(LINEAR[0], plain(pairs[LINEAR[0]])),
        "LoRA and LoHa": named(LINEAR[0], plain(pairs[LINEAR[0]]))
        | _by_module(LINEAR[1:], lambda m: _loha(random, m, alpha=1.0)),
        "OFT": _by_module(LINEAR, lambda m: {"oft_blocks": random(4, 80, 80)}),
        "GLoRA": _by_module(LINEAR, lambda m: _glora(random, m)),
        "norms": named(NORM, {"w_norm": random(320), "b_norm": random(320)}) | kohya,
        "weights and biases": named(LINEAR[3], {"diff": random(320, 320), "diff_b": bias}),
    }
    found = {name: Kind(tensors, tensors) for name, tensors in whole.items()}
    found["PEFT"] = Kind(_peft(pairs), kohya, adapter)
    found["PEFT with an adapter's name"] = Kind(_peft(pairs, ".default_0"), kohya, adapter)
    magnitude = {k: v for m, pair in pairs.items() for k, v in peft(m, pair, lora_magnitude_vector=in_peft[m]).items()}
    found["PEFT DoRA"] = Kind(magnitude, None, adapter)
    found["PEFT bias"] = Kind(
        peft(LINEAR[3], pairs[LINEAR[3]], lora_B__bias=bias),
        named(LINEAR[3], plain(pairs[LINEAR[3]], diff_b=SCALE * bias)),
        adapter,
    )
    found["kohya with dots"] = Kind({k.replace("attn1_", "attn1."): v for k, v in kohya.items()}, kohya)
    columns, by_row = random(320), random(320)
    found["IA3"] = Kind(
        named(LINEAR[1], {"weight": columns, "on_input": torch.tensor(1)})
        | named(LINEAR[0], {"weight": by_row, "on_input": torch.tensor(0)}),
        None,
    )
    return found


def _by_module(modules: list[str], make) -> Tensors:
    return {k: v for module in modules for k, v in named(module, make(module)).items()}


def _peft(pairs: dict[str, tuple[Tensor, Tensor]], adapter: str = "") -> Tensors:
    return {k: v for module, pair in pairs.items() for k, v in peft(module, pair, adapter).items()}


def _loha(random: Random, module: str, alpha: float = 2.0) -> Tensors:
    out, inner = random.weight(module).shape
    halves = {f"hada_w{n}_{half}": random(*((out, 4) if half == "a" else (4, inner))) for n in "12" for half in "ab"}
    return halves | {"alpha": torch.tensor(alpha)}


def _lokr(random: Random, module: str) -> Tensors:
    out, inner = random.weight(module).shape
    second = {"lokr_w2_a": random(out // 16, 4), "lokr_w2_b": random(4, inner // 20)}
    return {"lokr_w1": random(16, 20), "alpha": torch.tensor(2.0)} | second


def _glora(random: Random, module: str) -> Tensors:
    out, inner = random.weight(module).shape
    shapes = {"a1": (inner, 4), "a2": (4, inner), "b1": (out, 4), "b2": (4, inner)}
    return {f"{part}.weight": random(*shape) for part, shape in shapes.items()} | {"alpha": torch.tensor(2.0)}


def _tucker(random: Random) -> Tensors:
    out, inner, *kernel = random.weight(CONVOLUTION).shape
    pair = random(RANK, inner, 1, 1), random(out, RANK, 1, 1)
    return plain(pair, **{"lora_mid.weight": random(RANK, RANK, *kernel)})


def write_kinds(folder: Path, network: nn.Module) -> list[str]:
    """Write the files of each kind, `<name>.safetensors` and where core has it `<name>.core.safetensors`; returns the
    names."""
    for name, kind in (made := kinds(network)).items():
        metadata = {HEADER_KEY: RECIPE.to_header()}
        in_header = metadata | ({"lora_adapter_metadata": json.dumps(kind.peft)} if kind.peft else {})
        save_file(kind.tensors, folder / f"{name}.safetensors", in_header)
        if kind.core:
            save_file(kind.core, folder / f"{name}.core.safetensors", metadata)
    return list(made)
