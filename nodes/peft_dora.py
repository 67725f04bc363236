"""A DoRA as PEFT means it: rows come to the length of its magnitudes, where the host's own are relative to the base."""

from __future__ import annotations

from typing import Any

from comfy.model_management import cast_to_device
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor


class PEFTDoRA(WeightAdapterBase):
    """W + strength * (m (W + dW) / |W + dW| - W), row by row (arXiv 2402.09353).

    weights: (the host's patch that adds dW, m as (out,) or in PEFT's form of a convolution's, (1, out, 1, 1)).
    """

    name = "peft_dora"

    def __init__(self, loaded_keys: set[str], weights: tuple[WeightAdapterBase, Tensor]):
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset,
        function,
        *rest: Any,
        **more: Any,
    ) -> Tensor:
        """The weight with the patch, in place; called by the host, of which later versions hand on more."""
        added, magnitude = self.weights
        whole = added.calculate_weight(weight.clone(), key, 1.0, strength_model, offset, function, *rest, **more)
        lengths = whole.flatten(1).norm(dim=1)
        # in the host's order of rows, which is another in a few layers of SD3
        rows = function(cast_to_device(magnitude, weight.device, weight.dtype).flatten())
        weight += strength * (whole * (rows / lengths).view(-1, *[1] * (weight.ndim - 1)) - weight)
        return weight
