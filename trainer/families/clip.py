"""CLIP text encoders, one or two of which every family has."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from .loading import has_clip_words, load_clip_tokenizer


def text_states(encoder: nn.Module, tokenizer, prompts: list[str], layer: int) -> tuple[Tensor, Tensor]:
    """CLIP's hidden states of one layer (B, 77, C), -1 the last after its norm, and its first output, in fp32."""
    ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        output = encoder(ids.to(encoder.device), output_hidden_states=True)
    hidden = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    return hidden.float(), output[0].float()


def clip_tokenizers(asked: str | None, others: list[Path | None], base: str) -> list[CLIPTokenizer]:
    """CLIP-L's and CLIP-bigG's tokenizers, from the first of these folders that has words, else from the hub's cache.

    A place is a diffusers folder, or a folder with CLIP's own files; bigG's words are CLIP-L's.
    asked: base.tokenizer. Raises ValueError when it holds neither CLIP's words nor, in tokenizer_3/, T5's.
    """
    if asked and not _has_words(Path(asked)) and not (Path(asked) / "tokenizer_3").is_dir():
        raise ValueError(
            f"base.tokenizer is {asked}, which holds no tokenizer. Set it to a folder with CLIP's vocab.json and "
            "merges.txt (or tokenizer.json), or leave it out."
        )
    folders = [Path(p) for p in (asked, *others) if p]
    place = next((f for f in folders if _has_words(f)), folders[-1])
    first = place / "tokenizer" if (place / "tokenizer").is_dir() else place
    own = (place / "tokenizer_2").is_dir()
    second = load_clip_tokenizer(place / "tokenizer_2" if own else first, base)
    if not own:
        second.pad_token = "!"  # token 0, with which bigG was trained
    return [load_clip_tokenizer(first, base), second]


def _has_words(folder: Path) -> bool:
    """Whether there is a CLIP tokenizer in the folder or in its tokenizer/."""
    return has_clip_words(folder) or has_clip_words(folder / "tokenizer")
