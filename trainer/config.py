"""The run's configuration: TOML + overrides -> one validated, frozen model. Unknown keys are errors.

`guidance` is always the ordinary CFG scale, uncond + g * (cond - uncond); the papers' w is g - 1.
"""

from __future__ import annotations

import difflib
import os
import sys
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from ..samplers import PhaseGrid
from .data.digits import NAME as DIGITS
from .objectives import OBJECTIVES, PCM, AnyObjective, Section, known_to
from .presets import PRESETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class BaseConfig(Section):
    """The frozen base model."""

    path: str = Field(
        description="diffusers folder, single .safetensors file, hub id, a bundled tiny-sd15, tiny-sdxl, tiny-sd3, or "
        "digits: a small network with random weights, which is trained whole"
    )
    family: Literal["sd15", "sdxl", "sd3"] | None = Field(None, description="default: found from the base")
    prediction: Literal["epsilon", "v_prediction", "flow"] | None = Field(
        None, description="default: what the base says"
    )
    zero_terminal_snr: bool | None = Field(None, description="default: what the base says; SD1.5 and SDXL only")
    null: Literal["zeros", "empty"] | None = Field(
        None, description="what guidance subtracts: zeros or the empty prompt; default: the family's, as published"
    )
    tokenizer: str | None = Field(None, description="folder with vocab.json and merges.txt, for single files")
    config: str | None = Field(None, description="folder of component configs, for an unusual single file")
    parts: str | None = Field(
        None, description="diffusers folder that supplies what a single file lacks: VAE, text encoders, tokenizers"
    )
    shift: float | None = Field(None, gt=0, description="SD3 only: time shift; default: what the base says")
    t5: bool | None = Field(None, description="SD3 only: false leaves out the T5 encoder, which saves its memory")
    t5_length: int | None = Field(None, ge=1, le=512, description="SD3 only: T5 tokens of a prompt; default 77")
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16", description="precision of the frozen weights and the forward pass"
    )
    quantize: Literal["int8", "fp8"] | None = Field(
        None, description="weights of the blocks' linear layers in 8 bits, by torchao; the run says what that changes"
    )


class DataConfig(Section):
    """What the student learns on: pictures in a folder or in shards, or only prompts (the teacher then makes the
    latents)."""

    images: str | None = Field(
        None,
        description="folder of pictures with .txt captions beside them or a metadata.jsonl, or digits: drawn ones; "
        "none, and no shards: prompts only",
    )
    shards: tuple[str, ...] = Field(
        (),
        description="webdataset tar files or addresses of pictures with captions, such as set-{0000..0012}.tar, "
        "instead of images",
    )
    prompts: str | None = Field(
        None, description="text file, one prompt a line; default: the list that ships with the pack"
    )
    count: int = Field(1000, ge=1, description="how many latents the teacher makes of prompts, or digits are drawn")
    teacher_steps: int = Field(25, ge=1, le=1000, description="prompts only: DDIM steps for each")
    teacher_guidance: float = Field(7.5, ge=1, description="prompts only: CFG scale for each")
    resolution: int = Field(512, ge=8, description="side of the square pictures in pixels")
    buckets: bool | tuple[Annotated[str, Field(pattern=r"^[1-9]\d*x[1-9]\d*$")], ...] = Field(
        False,
        description="keep the pictures' shapes: true for sizes of about resolution^2 from 1:2 to 2:1, or a list such "
        'as ["768x512", "512x768"], width by height',
    )
    batch_size: int = Field(8, ge=1, description="batch of the encoders and of the teacher while caching")
    workers: int = Field(
        min(8, os.cpu_count() or 1), ge=0, description="threads that read pictures while caching; 0: none beside it"
    )
    cache: str | None = Field(
        None, description="folder of cached latents and embeddings; default: cache/ in the run folder"
    )
    skip_bad: bool = Field(
        False, description="leave out unreadable pictures and shards and missing captions instead of stopping"
    )

    @field_validator("shards", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self):
        if self.images is not None and self.shards:
            raise ValueError("data.images and data.shards are both set: set the one that holds the pictures")
        if self.buckets and (self.images in (None, DIGITS) and not self.shards):
            raise ValueError(
                "data.buckets is for pictures in data.images or data.shards: what the teacher makes of prompts, and "
                "drawn digits, are square. Leave it out"
            )
        if self.buckets == ():
            raise ValueError('data.buckets is an empty list: name sizes such as ["768x512", "512x768"], or say true')
        return self

    @property
    def has_pictures(self) -> bool:
        """Whether the samples are pictures, and not the teacher's own."""
        return self.images is not None or bool(self.shards)


class LoraConfig(Section):
    """The adapter; its strength is alpha / rank, and both are stored in the file."""

    rank: int = Field(64, ge=1)
    alpha: float = Field(8.0, gt=0)
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="precision of the saved file")
    init: str | None = Field(
        None, description="few-step LoRA of the same rank or less to go on from; default: one that changes nothing"
    )


class AdversarialConfig(Section):
    """The adversarial consistency loss (arXiv 2405.18407, Sec. 3.3)."""

    weight: float = Field(0.0, ge=0, description="of the generator's loss beside the distance; 0: no discriminator")
    lr: float = Field(1e-4, gt=0, description="of the discriminator's heads")
    width: int = Field(
        256, ge=8, multiple_of=8, description="channels of the heads; 256 is 2 M parameters on SD1.5 and SDXL"
    )


class TrainConfig(Section):
    """The run."""

    steps: int = Field(5000, ge=1, description="optimizer updates")
    batch_size: int = Field(20, ge=1, description="samples per process and forward pass")
    accumulation: int = Field(1, ge=1, description="forward passes per update")
    lr: float = Field(5e-6, gt=0)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = Field(0, ge=0, description="updates of linear warm-up")
    weight_decay: float = Field(1e-3, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of an averaged adapter, which is then what is saved; 0: none"
    )
    gradient_checkpointing: Literal[False, True, "auto"] = Field(
        False, description="compute blocks again instead of keeping them; auto: as few as fit the device's free memory"
    )
    memory_limit_gib: float | None = Field(
        None, gt=0, description="what gradient_checkpointing=auto may fill; default: what is free on the GPU"
    )
    offload: bool = Field(
        False, description="frozen blocks in main memory, each on the GPU for its pass only; computes them again"
    )
    shard: bool = Field(
        False, description="each process keeps a share of the frozen weights only, and fetches a block for its pass"
    )
    compile: bool = Field(False, description="torch.compile each block; needs Triton, or on a CPU a C++ compiler")
    seed: int = Field(0, ge=0)
    save_every: int = Field(500, ge=1, description="updates between checkpoints")
    keep_checkpoints: int = Field(2, ge=1)
    tensorboard: bool = True


class PreviewConfig(Section):
    """Fixed-seed grids during the run."""

    every: int = Field(500, ge=0, description="updates between grids; 0: none")
    steps: tuple[int, ...] = (1, 2, 4, 8)
    prompts: tuple[str, ...] = Field((), description="default: the first four of the training prompts")
    guidance: float | None = Field(None, ge=1, description="default: what the LoRA recommends")
    seed: int = Field(0, ge=0)


# How a run is worked through, which may change between two starts: what an update learns is the same up to rounding.
MAY_CHANGE = tuple(
    f"train.{key}"
    for key in (
        *("batch_size", "accumulation", "gradient_checkpointing", "memory_limit_gib"),
        *("offload", "shard", "compile"),
    )
)
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

    def grid(self) -> PhaseGrid:
        """The grid that is sampled."""
        return self.objective.grid()

    def notes(self) -> list[str]:
        """Sentences on where this run may disappoint."""
        return self.objective.notes(pictures=self.data.has_pictures, started=self.lora.init is not None)

    def what_decides_the_weights(self) -> dict[str, Any]:
        """The settings for the LoRA's header and for `resume`'s check: places on this machine by their last name, and
        without what a run only shows or keeps, which may change between two starts."""
        shown = {"train": {"tensorboard", "save_every", "keep_checkpoints"}, "preview": True}
        values = self.model_dump(mode="json", exclude={"output": True, "data": {"cache", "workers"}, **shown})
        for section, key in PLACES:
            place = values[section][key]
            if isinstance(place, list):
                values[section][key] = [Path(urlsplit(p).path).name for p in place]  # a query may hold a secret
            elif place is not None:
                values[section][key] = Path(place).name
        return values


def load_config(file: str | None = None, overrides: list[str] = (), preset: str | None = None) -> Config:
    """Preset, then TOML file, then `key=value` overrides, each over the one before.

    Where one of them changes the objective, it keeps of the settings before those that it has too.
    Raises ValueError that lists every problem at once, with the nearest known key for each unknown one.
    """
    values: dict[str, Any] = {}
    document = _read_toml(file) if file else {}
    preset = preset or document.pop("preset", None)
    document.pop("preset", None)
    if preset is not None:
        if str(preset) not in PRESETS:
            near = _nearest(str(preset), PRESETS)
            raise ValueError(f"Unknown preset {preset!r}; available: {', '.join(PRESETS)}.{near}")
        _lay(values, PRESETS[preset].values)
    _lay(values, document)
    given: dict[str, Any] = {}
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep:
            raise ValueError(f"Cannot read the override {item!r}: write key=value, for example train.steps=2000.")
        _set(given, key.strip(), _parse_value(text.strip()))
    _lay(values, given)
    values.setdefault("base", {})
    if isinstance(values.get("objective"), dict):
        values["objective"].setdefault("name", PCM.model_fields["name"].default)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def _read_toml(file: str) -> dict[str, Any]:
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"No config file at {file}. Write one, or use --preset ({', '.join(PRESETS)}).")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid TOML: {error}.") from None


def _parse_value(text: str) -> Any:
    """A TOML value where it is one, else the text itself, so that paths need no quotes."""
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str | list | dict) else text  # a date is a name here


def _lay(over: dict[str, Any], new: dict[str, Any]) -> None:
    """Merge one source's settings over those before; a change of the objective keeps the keys that both have."""
    objective, before = new.get("objective"), over.get("objective")
    if isinstance(objective, dict) and isinstance(before, dict) and objective.get("name") in OBJECTIVES:
        over["objective"] = known_to(objective["name"], before)
    _merge(over, new)


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = deepcopy(value)


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"Cannot set {dotted}: {section} is a value, not a section.")
    values[key] = value


def _explain(error: ValidationError) -> str:
    lines = [f"  {_sentence(problem)}" for problem in error.errors()]
    count = f"{len(lines)} problems" if len(lines) > 1 else "1 problem"
    return f"The configuration has {count}:\n" + "\n".join(lines)


def _sentence(problem: dict[str, Any]) -> str:
    """One problem in words; between "objective" and the key its place has the objective's name."""
    loc = problem["loc"]
    of_objective = loc[:1] == ("objective",)
    where = ".".join(str(p) for p in (loc[:1] + loc[2:] if of_objective else loc))
    if problem["type"] == "extra_forbidden":
        known = list(_section(loc[:-1]).model_fields)
        near, others = _nearest(str(loc[-1]), known), ""
        having = [name for name, row in OBJECTIVES.items() if of_objective and loc[-1] in row.model_fields]
        if having:
            near, others = "", f" The objective {loc[1]} takes no such setting ({', '.join(having)} do{_s(having)})."
        return f"{where}: unknown key.{near}{others} Known here: {', '.join(known)}."
    if problem["type"] == "union_tag_invalid":
        name = problem["ctx"]["tag"]
        return f"objective.name = {name!r}: available: {', '.join(OBJECTIVES)}.{_nearest(name, OBJECTIVES)}"
    if problem["type"] == "missing":
        return f"{where}: is required; {_field_help(loc)}."
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{where} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}."


def _s(names: list[str]) -> str:
    return "es" if len(names) == 1 else ""


def _section(loc: tuple) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for part in loc:
        model = OBJECTIVES.get(part) or model.model_fields[part].annotation
    return model


def _field_help(loc: tuple) -> str:
    if isinstance(loc[-1], int):
        return f"{'.'.join(map(str, loc[:1] + loc[2:-1] if loc[0] == 'objective' else loc[:-1]))} has more entries"
    field = _section(loc[:-1]).model_fields[loc[-1]]
    if field.description:
        return field.description
    return f"a section with {', '.join(_section(loc).model_fields)}"


def _nearest(given: str, known) -> str:
    close = difflib.get_close_matches(given, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
