"""CLIP text encoders, one or two of which every family has."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def text_states(encoder: nn.Module, tokenizer, prompts: list[str], layer: int) -> tuple[Tensor, Tensor]:
    """CLIP's hidden states of one layer (B, 77, C), -1 the last after its norm, and its first output, in fp32."""
    ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        output = encoder(ids.to(encoder.device), output_hidden_states=True)
    hidden = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    return hidden.float(), output[0].float()
