"""The run's configuration: one validated, frozen model of sections.

`guidance` is always the ordinary CFG scale, uncond + g * (cond - uncond); the papers' w is g - 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr, model_validator

from ...samplers import PhaseGrid
from ..objectives import OBJECTIVES, PCM, AnyObjective, Section
from .sections import (
    AdversarialConfig,
    BaseConfig,
    DataConfig,
    LoraConfig,
    PreviewConfig,
    TrainConfig,
    ValidationConfig,
)

# How a run is worked through, which may change between two starts: what an update learns is the same up to rounding.
MAY_CHANGE = tuple(
    f"train.{key}"
    for key in (
        *("batch_size", "accumulation", "gradient_checkpointing", "memory_limit_gib"),
        *("offload", "shard", "compile"),
    )
)
# What is watched of a run's held-out samples, and changes nothing but how many they are.
WATCHED = ("every", "steps", "teacher_steps", "best")
PLACES = (
    *(("base", key) for key in ("path", "tokenizer", "config", "parts")),
    *(("data", key) for key in ("images", "shards", "prompts")),
    ("lora", "init"),
)


class Config(Section):
    """Everything a run needs, and nothing else."""

    name: str = Field("pcm-lora", pattern=r"^[\w.-]+$", description="file name of the LoRA, without .safetensors")
    output: str | None = Field(None, description="run folder; default: runs/<name>")
    base: BaseConfig
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    objective: AnyObjective = PCM()
    adversarial: AdversarialConfig = AdversarialConfig()
    train: TrainConfig = TrainConfig()
    preview: PreviewConfig = PreviewConfig()
    validation: ValidationConfig = ValidationConfig()
    _preset: str | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _check(self):
        points, most = self.objective.points, max(self.preview.steps, default=1)
        if self.preview.every and most > points:
            raise ValueError(
                f"preview.steps asks for {most} steps, and there are objective.points = {points} levels to take them "
                f"at. Set preview.steps to at most {points}"
            )
        return self

    @model_validator(mode="after")
    def _check_adversary(self):
        objective, weight = self.objective, self.adversarial.weight
        if weight and objective.adversarial == "none":
            able = ", ".join(name for name, row in OBJECTIVES.items() if row.adversarial != "none")
            raise ValueError(
                f"adversarial.weight = {weight:g}: the objective {objective.name} has no adversarial loss; those with "
                f"one: {able}. Set adversarial.weight=0"
            )
        if not weight and objective.adversarial == "required":
            raise ValueError(
                f"adversarial.weight is 0, and the objective {objective.name} is only a diffusion loss without it. "
                "Set adversarial.weight=0.1"
            )
        return self

    @property
    def run_folder(self) -> Path:
        return Path(self.output or f"runs/{self.name}")

    @property
    def cache_folder(self) -> Path:
        return Path(self.data.cache) if self.data.cache else self.run_folder / "cache"

    @property
    def preset(self) -> str | None:
        """The preset that it was made from."""
        return self._preset

    def grid(self) -> PhaseGrid:
        """The grid that is sampled."""
        return self.objective.grid()

    def notes(self) -> list[str]:
        """Sentences on where this run may disappoint."""
        return self.objective.notes(pictures=self.data.has_pictures, started=self.lora.init is not None)

    def what_decides_the_weights(self) -> dict[str, Any]:
        """The settings for the LoRA's header and for `resume`'s check: places on this machine by their last name, and
        without what a run only shows or keeps, which may change between two starts."""
        kept = {"trackers", "report", "save_every", "keep_checkpoints"}
        return self._without_places({"train": kept, "preview": True, "validation": set(WATCHED)})

    def for_others(self) -> dict[str, Any]:
        """All settings, with places on this machine by their last name."""
        return self._without_places({})

    def _without_places(self, exclude: dict[str, Any]) -> dict[str, Any]:
        values = self.model_dump(mode="json", exclude={"output": True, "data": {"cache", "workers"}, **exclude})
        for section, key in PLACES:
            place = values[section][key]
            if isinstance(place, list):
                values[section][key] = [Path(urlsplit(p).path).name for p in place]  # a query may hold a secret
            elif place is not None:
                values[section][key] = Path(place).name
        return values
