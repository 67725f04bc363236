"""The run's configuration: one validated, frozen model of sections.

`guidance` is always the ordinary CFG scale, uncond + g * (cond - uncond); the papers' w is g - 1.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr, field_validator, model_validator

from ...samplers import PhaseGrid
from ..objectives import OBJECTIVES, PCM, AnyObjective, Section
from .sections import (
    AdversarialConfig,
    BaseConfig,
    DataConfig,
    LoraConfig,
    Place,
    PreviewConfig,
    TrainConfig,
    ValidationConfig,
)

# Settings that may change between two starts of a run, as what an update learns stays the same up to
# rounding.
MAY_CHANGE = (
    "train.batch_size",
    "train.accumulation",
    "train.gradient_checkpointing",
    "train.memory_limit_gib",
    "train.offload",
    "train.offload_activations",
    "train.shard",
    "train.compile",
    "train.attention",
    # places of data, whose contents are compared: the same pictures may be in another folder
    "data.images",
    "data.shards",
    "data.prompts",
)
# Settings of `validation` that only say what is measured on the held-out samples; `count` also decides which
# these are.
WATCHED = ("every", "steps", "teacher_steps", "best")
# Settings (section, key) that are places on this machine or elsewhere.
PLACES = (
    ("base", "path"),
    ("base", "tokenizer"),
    ("base", "config"),
    ("base", "parts"),
    ("base", "loras"),
    ("data", "images"),
    ("data", "shards"),
    ("data", "prompts"),
    ("lora", "init"),
)


FILE_NAME = re.compile(r"\w([\w .-]*[\w-])?")


class Config(Section):
    """Everything a run needs, and nothing else."""

    name: str = Field(
        "pcm-lora",
        description="file name of the LoRA, without .safetensors: letters, digits, spaces, and . - _ within",
    )
    output: Place | None = Field(None, description="run folder; default: runs/<name>")
    base: BaseConfig
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    objective: AnyObjective = PCM()
    adversarial: AdversarialConfig = AdversarialConfig()
    train: TrainConfig = TrainConfig()
    preview: PreviewConfig = PreviewConfig()
    validation: ValidationConfig = ValidationConfig()
    _preset: str | None = PrivateAttr(None)

    @field_validator("name")
    @classmethod
    def _is_file_name(cls, name: str) -> str:
        if not FILE_NAME.fullmatch(name):
            raise ValueError(
                "is no file's name for every system: write letters, digits, spaces, '.', '-' and '_', with a letter, a "
                "digit or '_' first and no space or '.' last; a folder goes into output"
            )
        return name

    @model_validator(mode="after")
    def _check(self):
        points = self.objective.points
        most = max(self.preview.steps, default=1)
        if self.preview.every and most > points:
            raise ValueError(
                f"preview.steps asks for {most} steps, and there are objective.points = {points} levels to take them "
                f"at. Set preview.steps to at most {points}"
            )
        return self

    @model_validator(mode="after")
    def _check_adversary(self):
        objective = self.objective
        weight = self.adversarial.weight
        if weight and objective.adversarial == "none":
            able = ", ".join(name for name, kind in OBJECTIVES.items() if kind.adversarial != "none")
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

    @model_validator(mode="after")
    def _check_warmup(self):
        warmup, steps = getattr(self.objective, "critic_warmup", 0), self.train.steps
        if warmup >= steps:
            raise ValueError(
                f"objective.critic_warmup = {warmup} leaves the LoRA none of train.steps = {steps} updates to learn in."
                f" Set objective.critic_warmup to less than {steps}"
            )
        return self

    @model_validator(mode="after")
    def _check_pictures(self):
        name = "data.images" if self.data.images is not None else "data.shards"
        if self.objective.matching and self.data.has_pictures:
            raise ValueError(
                f"{name} is set, and the objective {self.objective.name} learns from prompts alone: no picture would "
                f"be looked at. Leave {name} out; for its captions, write them into a text file, one a line, and name "
                "that in data.prompts"
            )
        return self

    @model_validator(mode="after")
    def _check_stages(self):
        if self.train.lr_schedule == "stages" and self.objective.stage_count() == 1:
            raise ValueError(
                f"train.lr_schedule = stages: this run of the objective {self.objective.name} is one stage. Set "
                "train.lr_schedule=cosine, which falls over it all"
            )
        if self.objective.averaged_teacher() and not self.train.ema:
            raise ValueError(
                "objective.average_teaches is true, and there is no average: train.ema is 0. Set train.ema=0.98, or "
                "objective.average_teaches=false"
            )
        return self

    @property
    def run_folder(self) -> Path:
        """The folder that the run writes into."""
        return Path(self.output or f"runs/{self.name}")

    @property
    def cache_folder(self) -> Path:
        """The folder of the cached latents and prompts."""
        return Path(self.data.cache) if self.data.cache else self.run_folder / "cache"

    @property
    def previews(self) -> Path:
        """The folder of the pictures that the run draws on its way."""
        return self.run_folder / "previews"

    def picture_of(self, lora: str) -> Path:
        """The picture beside a LoRA of this name, where other programs look for it."""
        return self.run_folder / f"{lora}.preview.png"

    @property
    def places_of_results(self) -> tuple[Path, ...]:
        """The folders and pictures that the run writes: never its data, even where they lie in `data.images`."""
        beside = (self.picture_of(self.name), self.picture_of(f"{self.name}-best"))
        return self.run_folder, self.cache_folder, self.previews, *beside

    @property
    def preset(self) -> str | None:
        """The name of the preset that this configuration was made from, if any."""
        return self._preset

    def changed(self, **sections: dict[str, Any]) -> Config:
        """The same configuration with other values in these sections, which are not checked again."""
        update = {section: getattr(self, section).model_copy(update=values) for section, values in sections.items()}
        return self.model_copy(update=update)

    def grid(self) -> PhaseGrid:
        """The grid that the LoRA is sampled on."""
        return self.objective.grid()

    def notes(self) -> list[str]:
        """Sentences on where this run may disappoint."""
        return self.objective.notes(pictures=self.data.has_pictures, started=self.lora.init is not None)

    @property
    def may_change(self) -> tuple[str, ...]:
        """`MAY_CHANGE`, and the choice among captions where no picture has any: earlier versions' runs have none."""
        return MAY_CHANGE if self.data.has_pictures else (*MAY_CHANGE, "data.captions")

    def what_decides_the_weights(self) -> dict[str, Any]:
        """The settings that decide what is learnt, for the LoRA's header and to check a run that is resumed.

        Without those that only say what a run shows or keeps, which may change between two starts. Places are
        named by their last part, as in `for_others`.
        """
        housekeeping = {"trackers", "report", "save_every", "keep_checkpoints"}
        return self._without_places({"train": housekeeping, "preview": True, "validation": set(WATCHED)})

    def for_others(self) -> dict[str, Any]:
        """All settings, for files that are shared: places on this machine are named by their last part alone."""
        return self._without_places({})

    def _without_places(self, exclude: dict[str, Any]) -> dict[str, Any]:
        """The settings but these, as JSON-ready values, and of each of `PLACES` the last part of its path."""
        values = self.model_dump(mode="json", exclude={"output": True, "data": {"cache", "workers"}, **exclude})
        for section, key in PLACES:
            place = values[section][key]
            if isinstance(place, list):
                values[section][key] = [Path(urlsplit(p).path).name for p in place]  # a query may hold a secret
            elif place is not None:
                values[section][key] = Path(place).name
        return values
