"""CLIP text encoders, of which SD1.5 has one and SDXL and SD3 two."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from .base import TOKENS
from .loading import has_clip_words, load_clip_tokenizer


def text_states(encoder: nn.Module, tokenizer, prompts: list[str], layer: int) -> tuple[Tensor, Tensor]:
    """Encode prompts: the hidden states of one layer (B, 77, C) and the encoder's first output, in fp32.

    layer: -1 is the last, after its norm; -2 the last but one, without. The first output is the pooled
    embedding for a model with a projection, else the last hidden states. Longer prompts are cut at 77 tokens.
    """
    ids = tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        output = encoder(ids.to(encoder.device), output_hidden_states=True)
    hidden = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    return hidden.float(), output[0].float()


def clip_tokenizers(chosen: str | None, defaults: list[Path | None], base: str) -> list[CLIPTokenizer]:
    """CLIP-L's and CLIP-bigG's tokenizers, from the first of these folders that has words, else from the hub's cache.

    A folder is a diffusers folder, or one with CLIP's own files; bigG's words are CLIP-L's.
    chosen: base.tokenizer. defaults: where to look without it. base: its path, for errors. Raises ValueError
    where `chosen` holds neither CLIP's words nor, in tokenizer_3/, T5's.
    """
    if chosen and not _has_words(Path(chosen)) and not (Path(chosen) / "tokenizer_3").is_dir():
        raise ValueError(
            f"base.tokenizer is {chosen}, which holds no tokenizer. Set it to a folder with CLIP's vocab.json and "
            "merges.txt (or tokenizer.json), or leave it out."
        )

    folders = [Path(p) for p in (chosen, *defaults) if p]
    source = next((f for f in folders if _has_words(f)), folders[-1])
    first = source / "tokenizer" if (source / "tokenizer").is_dir() else source
    has_second = (source / "tokenizer_2").is_dir()
    second = load_clip_tokenizer(source / "tokenizer_2" if has_second else first, base)
    if not has_second:
        second.pad_token = "!"  # token 0, with which bigG was trained
    return [load_clip_tokenizer(first, base), second]


def _has_words(folder: Path) -> bool:
    """Whether there is a CLIP tokenizer in the folder or in its tokenizer/."""
    return has_clip_words(folder) or has_clip_words(folder / "tokenizer")
