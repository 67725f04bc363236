"""The memory that a run takes, from copies of its networks without weights (meta device): nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .adapter import Adapter, learner
from .adversarial import Discriminator
from .config import Config
from .export import DTYPES
from .families import Base
from .families.base import outputs_of

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2}
VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
# What diffusers recomputes with gradient checkpointing, keeping only its inputs.
CHECKPOINTED = (ResnetBlock2D, BasicTransformerBlock, JointTransformerBlock)
OUTSIDE = 0
# What CUDA's autocast runs in low precision and in fp32, of all that these networks call.
TO_LOW = (F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, torch.bmm)
TO_FULL = (F.group_norm, F.layer_norm, F.rms_norm)
NETWORKS = {"unet": "UNet", "transformer": "transformer"}


def estimate_memory(config: Config, family: type[Base]) -> dict[str, Any]:
    """GiB of each thing a run holds at its peak, the LoRA's modules, and the parameters that are trained.

    Activations are the tensors that autograd would keep for the student's pass; with gradient checkpointing, the
    inputs of the blocks and the largest block. Libraries, fragmentation and kernels' workspaces come on top.
    Raises ValueError for a resolution that the network cannot take.
    """
    folder = family.config_folder(config.base.path, config.base.config)
    with torch.device("meta"):
        network = family.network_class.from_config(_read(folder / family.component)).to(DTYPES[config.base.dtype])
    parameters = sum(p.numel() for p in network.parameters())
    inputs = family.dummy_inputs(network.config, config.data.resolution, _maker(network.dtype))
    with torch.device("meta"):
        network.requires_grad_(False)
        trained = learner(network, family, config.lora.rank, config.lora.alpha, seed=0)
    learnt = sum(p.numel() for p in trained.parameters())
    train, width, title = config.train, BYTES[config.base.dtype], NETWORKS[family.component]
    kept = kept_bytes(network, lambda: network(**inputs), train.gradient_checkpointing)
    per_parameter = 4 + 4 + OPTIMIZER_BYTES[train.optimizer]
    held = {} if family.whole else {f"frozen {title}": parameters * width}
    what = title if family.whole else "LoRA"
    held |= {
        f"{what}, gradients, optimizer": learnt * (per_parameter + (4 if train.ema else 0)),
        f"activations, batch {train.batch_size}": kept * train.batch_size,
    }
    kept_weights = bool(config.objective.target_decay()) + (config.objective.stage(1.0) > 0)
    if kept_weights:
        held["averaged or earlier weights"] = learnt * 4 * kept_weights
    if config.adversarial.weight:
        held |= _discriminator(config, family, network, trained, inputs, per_parameter)
    gib = {name: value / GIB for name, value in held.items()}
    gib["training in all, at least"] = sum(gib.values())
    gib[f"before: {title} and encoders"] = (parameters * width + _encoder_bytes(config, family, folder)) / GIB
    return {
        "gib": {k: round(v, 3) for k, v in gib.items()},
        "lora_modules": 0 if family.whole else len(trained.layers),
        "trained_parameters": learnt,
    }


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def _maker(dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *shape: torch.empty(*shape, device="meta", dtype=dtype)


def _discriminator(
    config: Config, family: type[Base], network: nn.Module, adapter: Adapter, inputs: dict, per_parameter: int
) -> dict[str, float]:
    """Bytes of the heads, and of the bare base's pass over the student's points that they judge."""
    stand_in = family(network, None, [], [], None, "", False, "", "", "")
    x = next(iter(inputs.values())).requires_grad_()
    run = lambda: outputs_of(stand_in.feature_blocks(), lambda: network(**inputs))  # noqa: E731
    with adapter.off():
        channels = [stand_in.feature_map(output, x).shape[1] for output in run()]
        kept = kept_bytes(network, run, config.train.gradient_checkpointing)
    heads = Discriminator(channels, config.adversarial.width, seed=0)
    return {
        "discriminator, gradients, optimizer": sum(p.numel() for p in heads.parameters()) * per_parameter,
        "its features' activations": kept * config.train.batch_size,
    }


def _encoder_bytes(config: Config, family: type[Base], folder: Path) -> int:
    """VAE and text encoders in fp32, T5 in bf16 where there is a GPU, as they are loaded."""
    total = 0
    for own in family.configs.iterdir():
        part = folder / own.name if (folder / own.name / "config.json").is_file() else own
        if own.name != "vae" and not own.name.startswith("text_encoder"):
            continue
        settings = _read(part)
        with torch.device("meta"):
            if own.name == "vae":
                model = VAES[settings["_class_name"]].from_config(settings)
            else:
                kind = getattr(transformers, settings["architectures"][0])
                model = kind(kind.config_class(**settings))
        t5 = isinstance(model, transformers.T5EncoderModel)
        if not (t5 and config.base.t5 is False):
            width = 2 if t5 and torch.cuda.is_available() else 4
            total += width * sum(p.numel() for p in model.parameters())
    return total


class _AsOnGPU(TorchFunctionMode):
    """A pass on the meta device as it runs on a GPU: CUDA's autocast to `dtype`, and attention by fused kernels.

    Without weights torch has no autocast, and falls back to the form of attention that keeps its matrices.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.dtype != torch.float32 and func in TO_LOW + TO_FULL:
            to = self.dtype if func in TO_LOW else torch.float32
            args = [_cast(a, to) for a in args]
            kwargs = {name: _cast(value, to) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            return _Attention.apply(named["query"], named["key"], named["value"])
        return func(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class _Attention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: query, key, value and the result. Never run backward."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result)
        return result


def kept_bytes(network: nn.Module, run: Callable[[], object], checkpointing: bool) -> int:
    """Bytes that autograd keeps for the backward of `run`, a pass through the network on the meta device.

    With checkpointing: the blocks' inputs, what is kept outside of them, and the largest block.
    """
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    # storages by their address, held here so that no address comes twice
    kept: dict[int, dict[int, torch.UntypedStorage]] = {OUTSIDE: {}}
    entered: dict[int, torch.UntypedStorage] = {}
    inside = [OUTSIDE]

    def note(tensor: Tensor, into: dict) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            into[storage._cdata] = storage

    def enter(block, args, kwargs) -> None:
        inside.append(id(block))
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor) and tensor.ndim > 2:
                note(tensor, entered)

    def pack(tensor: Tensor) -> Tensor:
        note(tensor, kept.setdefault(inside[-1], {}))
        return tensor

    blocks = [m for m in network.modules() if isinstance(m, CHECKPOINTED)]
    handles = [b.register_forward_pre_hook(enter, with_kwargs=True) for b in blocks]
    handles += [b.register_forward_hook(lambda *_: inside.pop() and None) for b in blocks]
    try:
        with _AsOnGPU(network.dtype), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            graph = run()  # held, so that every storage stays where it is
    finally:
        for handle in handles:
            handle.remove()
    del graph
    if checkpointing:
        outside = kept.pop(OUTSIDE)
        return _bytes(outside, entered) + max(map(_bytes, kept.values()), default=0)
    return _bytes(*kept.values())


def _bytes(*storages: dict[int, torch.UntypedStorage]) -> int:
    """Of all of them together, each once."""
    return sum(storage.nbytes() for storage in {k: v for some in storages for k, v in some.items()}.values())
