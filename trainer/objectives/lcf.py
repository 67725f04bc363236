"""Latent consistency fine-tuning (LCF, arXiv 2310.04378, Sec. 4.4): on one's own pictures, without a teacher."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from .objective import OwnTarget, Phased


class LCF(Phased, OwnTarget):
    """Start anywhere on the grid; the neighbour, one point cleaner, is on the picture's own path, with the same noise.

    Pictures carry no guidance, so a run from the bare base forgets how to follow prompts closely: start from
    a few-step LoRA (`lora.init`), whose guidance fades slowly. With `phases` above 1 the jumps end at the
    phases' edges, so that a PCM LoRA stays one.
    """

    name: Literal["lcf"] = Field(
        "lcf", description="fine-tuning of a few-step LoRA in lora.init, on pictures, keeping its jumps"
    )
    points: int = Field(50, description="solver points; the paper's skipping step k is 1000 / points")
    phases: int = Field(1, description="1 for LCM LoRAs and bare bases; a PCM LoRA's own number")

    needs_teacher: ClassVar[bool] = False

    def sampling(self) -> dict[str, Any]:
        # as the LoRA that it goes on from: PCM's without fresh noise, LCM's with
        deterministic = {"mode": "deterministic", "gamma": 0.0} if self.phases > 1 else {}
        return super().sampling() | deterministic

    def notes(self, pictures: bool, started: bool) -> list[str]:
        without = "lcf is for few-step LoRAs: without lora.init it starts from the base, and unlearns its guidance."
        return super().notes(pictures, started) + ([] if started else [without])
