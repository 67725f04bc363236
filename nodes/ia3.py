"""IA3, which scales rows or columns of a weight: the one published kind of LoRA that the host has no patch for."""

from __future__ import annotations

from typing import Any

from comfy.model_management import cast_to_device
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor


class IA3(WeightAdapterBase):
    """W + strength * s * W, where s has a number for each row of W, or for each column (arXiv 2205.05638).

    weights: (s of any shape, whether it is of columns, that is on the module's input).
    """

    name = "ia3"

    def __init__(self, loaded_keys: set[str], weights: tuple[Tensor, bool]):
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(
        self, weight: Tensor, key: str, strength: float, strength_model: float, offset, function, *_: Any, **__: Any
    ) -> Tensor:
        """The weight with the patch, in place; called by the host, of which later versions hand on more."""
        scale, on_input = self.weights
        scale = cast_to_device(scale, weight.device, weight.dtype).flatten()
        sides = (1, -1) if on_input else (-1, 1)
        weight += function(strength * scale.view(*sides, *[1] * (weight.ndim - 2)) * weight)
        return weight
