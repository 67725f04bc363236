"""Bases of full size that need no files: the components of a family's own configs, with random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers.models.modeling_utils import ModelMixin
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from ...families import FAMILIES, loading
from ...system.files import write_tensors, write_text
from ...tiny.bundled import EMOJI, bundled_folder

TINY = {"sd15": "tiny-sd15", "sdxl": "tiny-sdxl", "sd3": EMOJI}  # family -> its bundled base
# What is smaller in the least network of each family that has one of each kind of layer than in the bundled one.
LEVEL = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
SPECKS = {
    "sd15": LEVEL,
    "sdxl": LEVEL | {"transformer_layers_per_block": (2,)},
    "sd3": {"num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 32, "caption_projection_dim": 32},
}
# Random numbers that are repeated to fill a weight: drawing billions takes longer than all else. Their count is a
# prime, so that rows of a weight are not alike.
NUMBERS = 999_983


def base_folder(family: str, root: Path, speck: bool = False) -> Path:
    """The diffusers folder in `root` of a base of this family's full size; its weights are made by `made_of_configs`.

    speck: of the least size instead. It is written at the first call: configs, the tokenizers of the bundled base, one
    for T5 that knows letters, and in place of weights a file without any.
    """
    kind, folder, bundled = FAMILIES[family], root / family, bundled_folder(TINY[family])
    if folder.exists():
        return folder
    shutil.copytree(bundled if speck else kind.configs, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if speck:
        file = folder / kind.component / "config.json"
        write_text(file, json.dumps(json.loads(file.read_text(encoding="utf-8")) | SPECKS[family]))
    else:
        for words in bundled.glob("tokenizer*"):
            shutil.copytree(words, folder / words.name)
    if (folder / "text_encoder_3").exists():
        t5_tokenizer().save_pretrained(folder / "tokenizer_3")
    for config in folder.glob("*/config.json"):
        write_tensors(config.with_name("none.safetensors"), {"none": torch.zeros(1)}, {"format": "pt"})
    return folder


@contextmanager
def made_of_configs(root: Path) -> Iterator[None]:
    """Load the components of diffusers folders in `root`, inside this block, as `random_part` makes them."""
    load = loading.load_part

    def load_or_make(folder: Path, part: str, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        if not Path(folder).is_relative_to(root):
            return load(folder, part, kind, dtype)
        return random_part(kind, folder / part, dtype)

    with patch.object(loading, "load_part", load_or_make):
        yield


def random_part(kind: type[nn.Module], folder: Path, dtype: torch.dtype) -> nn.Module:
    """A component by the config in its folder, on the CPU, with random weights, the same at every call.

    Weights are as large as keeps what passes through them at its size; norms change nothing.
    """
    with torch.device("meta"):
        if issubclass(kind, ModelMixin):
            module = kind.from_config(kind.load_config(folder))
        else:
            module = kind(kind.config_class.from_pretrained(folder))
    module.to(dtype).to_empty(device="cpu")

    with torch.no_grad():
        for name, tensor in chain(module.named_parameters(), module.named_buffers()):
            if not tensor.is_floating_point():  # positions of tokens
                tensor.copy_(torch.arange(tensor.shape[-1]))
            elif tensor.ndim < 2:
                tensor.fill_(name.endswith("weight"))
            else:
                numbers = _noise()[: tensor.numel()] * tensor[0].numel() ** -0.5
                _fill(tensor.view(-1), numbers.to(dtype))
    return module


@cache
def _noise() -> torch.Tensor:
    return torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0))


def _fill(flat: torch.Tensor, numbers: torch.Tensor) -> None:
    """Repeat numbers, one-dimensional, over a tensor as flat."""
    rest = len(flat) % len(numbers)
    flat[: len(flat) - rest].view(-1, len(numbers)).copy_(numbers)
    flat[len(flat) - rest :].copy_(numbers[:rest])


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Letters as words, with T5's padding and its end of text."""
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    letters += [(chr(ord("a") + i), -3.0) for i in range(26)]
    tokenizer = Tokenizer(models.Unigram(letters, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
