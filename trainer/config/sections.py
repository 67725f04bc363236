"""The sections of a run's configuration, beside the objective's own."""

from __future__ import annotations

import math
import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from ..objectives import Section
from ..tiny.digits import NAME as DIGITS
from . import LARGEST_SEED


def place(text: str) -> str:
    """A path, or the address of something, with `~` as the home folder; the shell leaves that in key=~/value.

    Raises ValueError for an empty one, as a shell makes of an unset variable, and for one with a line break or the like
    in it, as TOML makes of backslashes.
    """
    if not text.strip():
        raise ValueError("is empty: name a place, or leave the setting out; a shell's variable may not be set")
    if not text.isprintable():
        raise ValueError(
            'holds a line break, a tab or the like; in TOML a backslash between double quotes begins one ("\\n"). '
            "Write forward slashes, or single quotes: 'C:\\new\\base.safetensors'"
        )
    return os.path.expanduser(text)


AUTO = "auto"
Place = Annotated[str, AfterValidator(place)]


def lora_and_strength(text: str) -> tuple[str, float]:
    """The file and the strength of "style.safetensors:0.8"; without a number after the last colon the strength is 1.

    Raises ValueError for a strength of 0, or one that is not finite.
    """
    file, colon, number = text.rpartition(":")
    try:
        strength = float(number)
    except ValueError:  # a path alone, which may have a colon of a drive's
        return text, 1.0
    if not colon:
        return text, 1.0
    if not strength or not math.isfinite(strength):
        raise ValueError(f"has strength {number}; expected a number other than 0, such as {file}:0.8")
    return file, strength


def lora_place(text: str) -> str:
    """A `place` with a strength or without; ValueError as `lora_and_strength`."""
    place(lora_and_strength(text)[0])
    return place(text)


LoraPlace = Annotated[str, AfterValidator(lora_place)]


class BaseConfig(Section):
    """The frozen base model."""

    path: Place = Field(
        description="diffusers folder, single .safetensors file, hub id, a bundled tiny-sd15, tiny-sdxl, tiny-emoji, "
        "or digits: a small network with random weights, which is trained whole"
    )
    loras: tuple[LoraPlace, ...] = Field(
        (),
        description="style LoRAs that are merged into the frozen weights, with their strengths, such as "
        '["style.safetensors:0.8"]: the teacher is the base with them',
    )
    family: Literal["sd15", "sdxl", "sd3"] | None = Field(
        None, description="model family; default: found from the base"
    )
    prediction: Literal["epsilon", "v_prediction", "flow"] | None = Field(
        None, description="what the network predicts; default: what the base says"
    )
    zero_terminal_snr: bool | None = Field(
        None, description="SD1.5 and SDXL only: whether the noisiest level is noise alone; default: what the base says"
    )
    null: Literal["zeros", "empty"] | None = Field(
        None, description="what guidance subtracts: zeros or the empty prompt; default: the family's, as published"
    )
    tokenizer: Place | None = Field(None, description="folder with vocab.json and merges.txt, for single files")
    config: Place | None = Field(None, description="folder of component configs, for an unusual single file")
    parts: Place | None = Field(
        None, description="diffusers folder that supplies what a single file lacks: VAE, text encoders, tokenizers"
    )
    shift: float | None = Field(None, gt=0, description="SD3 only: time shift; default: what the base says")
    t5: bool | None = Field(None, description="SD3 only: false leaves out the T5 encoder, which saves its memory")
    t5_length: int | None = Field(None, ge=1, le=512, description="SD3 only: T5 tokens of a prompt; default 77")
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16", description="precision of the frozen weights and the forward pass"
    )
    quantize: Literal["int8", "fp8", "int8-compute", "fp8-compute"] | None = Field(
        None,
        description="weights of the blocks' linear layers in 8 bits, by torchao; with -compute their products too; the "
        "run says what that changes",
    )

    @field_validator("loras", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def reading(self) -> dict[str, Any]:
        """The options of a family's `load` and `look` that are set."""
        return self.model_dump(exclude={"path", "loras", "dtype", "quantize"}, exclude_none=True)


class DataConfig(Section):
    """What the student learns on: pictures in a folder or in shards, or only prompts (the teacher then makes the
    latents)."""

    images: Place | None = Field(
        None,
        description="folder of pictures with .txt captions beside them, a metadata.jsonl or metadata.csv, or digits: "
        "drawn ones; none, and no shards: prompts only",
    )
    shards: tuple[Place, ...] = Field(
        (),
        description="webdataset tar files or addresses of pictures with captions, such as set-{0000..0012}.tar, "
        "instead of images",
    )
    prompts: Place | None = Field(
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
    captions: Literal["first", "drawn", "joined"] = Field(
        "first",
        description="of a picture's several captions (lines of its text, or a list): the first, one drawn at each "
        "visit, or all joined to one",
    )
    tag_variants: int = Field(
        0,
        ge=0,
        le=64,
        description="variants of each caption of tags, shuffled, of which one is drawn at each visit; 0: as it is",
    )
    keep_tags: int = Field(1, ge=0, description="first tags of a caption that every variant keeps in their places")
    drop_tags: float = Field(0.0, ge=0, lt=1, description="share of the other tags that a variant goes without")
    batch_size: int = Field(8, ge=1, description="batch of the encoders and of the teacher while caching")
    workers: int = Field(
        min(8, os.cpu_count() or 1), ge=0, description="threads that read pictures while caching; 0: none beside it"
    )
    cache: Place | None = Field(
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
        fields = type(self).model_fields
        of_tags = [key for key in ("drop_tags", "keep_tags") if getattr(self, key) != fields[key].default]
        if of_tags and not self.tag_variants:
            raise ValueError(f"data.{of_tags[0]} is for captions of tags in variants: set data.tag_variants, such as 4")
        if self.tag_variants and not self.has_pictures:
            raise ValueError("data.tag_variants is for captions of pictures; prompts have wildcards. Leave it out")
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

    rank: int = Field(64, ge=1, description="rank of every module; more can learn more, and makes a larger file")
    ranks: dict[str, Annotated[int, Field(ge=0, strict=True)]] | None = Field(
        None,
        description="ranks of modules whose path a pattern (a regular expression) finds, such as {attn2 = 128, "
        "conv = 0}: the first that does counts, 0 leaves the module as it is, and all are applied at alpha / rank",
    )
    dora: bool | None = Field(
        None,
        description="DoRA: lengths of each weight's rows are trained beside the LoRA; default: false",
    )
    alpha: float = Field(8.0, gt=0, description="the LoRA is applied at alpha / rank")
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="precision of the saved file")
    init: Place | None = Field(
        None, description="few-step LoRA of the same rank or less to go on from; default: one that changes nothing"
    )

    @field_validator("dora")
    @classmethod
    def _none_or_true(cls, dora: bool | None) -> bool | None:
        return dora or None  # as in checkpoints from before there was a choice

    @field_validator("ranks")
    @classmethod
    def _patterns(cls, ranks: dict[str, int] | None) -> dict[str, int] | None:
        for pattern in ranks or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return ranks


class AdversarialConfig(Section):
    """The adversarial consistency loss (arXiv 2405.18407, Sec. 3.3)."""

    weight: float = Field(
        0.0, ge=0, description="weight of the generator's loss beside the distance; 0: no discriminator"
    )
    lr: float = Field(1e-4, gt=0, description="learning rate of the discriminator's heads")
    width: int = Field(
        256, ge=8, multiple_of=8, description="channels of the heads; 256 is 2 M parameters on SD1.5 and SDXL"
    )


class TrainConfig(Section):
    """The run."""

    steps: int = Field(5000, ge=1, description="optimizer updates")
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        20, description="samples per process and forward pass; auto: as many of an update's as fit the GPU"
    )
    accumulation: int = Field(
        1, ge=1, description="forward passes per update; with batch_size=auto samples per update, which it keeps"
    )
    lr: float = Field(5e-6, gt=0, description="learning rate of the LoRA")
    lr_schedule: Literal["constant", "linear", "cosine", "restarts", "stages"] = Field(
        "constant",
        description="how the learning rate goes on after the warm-up; linear, cosine: down to 0 at the last update; "
        "restarts: as cosine, several times; stages: so in each stage of progressive distillation",
    )
    lr_restarts: int = Field(3, ge=1, description="how often lr_schedule=restarts begins anew")
    warmup: int = Field(0, ge=0, description="updates of linear warm-up")
    weight_decay: float = Field(1e-3, ge=0, description="the optimizer's weight decay of the LoRA, where it has one")
    max_grad_norm: float = Field(1.0, gt=0, description="norm to which a larger gradient is clipped")
    optimizer: str = Field(
        "adamw",
        description="adamw; adamw8bit, whose averages are in 8 bits (extra quantize); adafactor; lion, prodigy (with "
        "lr=1) or schedulefree (extra optimizers); or any class of torch.optim by its name, such as RMSprop",
    )
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of an averaged adapter, which is then what is saved; 0: none"
    )
    gradient_checkpointing: Literal[False, True, "auto"] = Field(
        False, description="compute blocks again instead of keeping them; auto: as few as fit the device's free memory"
    )
    memory_limit_gib: float | None = Field(
        None,
        gt=0,
        description="what gradient_checkpointing=auto and batch_size=auto may fill; default: what is free on the GPU",
    )
    offload: bool = Field(
        False, description="frozen blocks in main memory, each on the GPU for its pass only; computes them again"
    )
    offload_activations: bool = Field(
        False, description="the inputs of blocks that are computed again wait in main memory for the backward pass"
    )
    shard: bool = Field(
        False, description="each process keeps a share of the frozen weights only, and fetches a block for its pass"
    )
    compile: Literal[False, True, "auto"] = Field(
        False,
        description="torch.compile each block; needs Triton, or on a CPU a C++ compiler. auto: where Triton takes the "
        "GPU, in a run of 500 updates and more",
    )
    attention: Literal["flash", "cudnn", "efficient", "auto"] | None = Field(
        None,
        description="the kernel of torch's that attention takes on a CUDA GPU where it can; auto: the fastest there, "
        "timed when the run begins; default: torch's own choice",
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="seed of every random draw of the run")
    save_every: int = Field(500, ge=1, description="updates between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints that are kept, the newest")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        ("tensorboard",),
        description="where the figures go beside log.jsonl in the run folder; wandb sends them to its servers, unless "
        "WANDB_MODE=offline",
    )
    report: bool = Field(True, description="write report.html into the run folder at the end")

    @field_validator("trackers", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        if isinstance(values, dict) and "tensorboard" in values:
            raise ValueError(
                'train.tensorboard: is train.trackers now, a list: ["tensorboard"] is the default, [] is none, and '
                "there are wandb and trackio too"
            )
        return values


class PreviewConfig(Section):
    """Fixed-seed grids during the run."""

    every: int = Field(500, ge=0, description="updates between grids; 0: none")
    steps: tuple[int, ...] = Field((1, 2, 4, 8), description="numbers of steps, a row of the grid each")
    prompts: tuple[str, ...] = Field(
        (), description="prompts, a column of the grid each; default: the first four of the training prompts"
    )
    guidance: float | None = Field(None, ge=1, description="CFG scale; default: what the LoRA recommends")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="seed of the pictures' noise")


class ValidationConfig(Section):
    """Samples that training never sees, and what is measured on them during the run."""

    count: int = Field(
        32, ge=0, description="samples held out: at most a tenth of them, and of fewer than 20 none; 0: none"
    )
    every: int = Field(500, ge=0, description="updates between measurements, besides the first and the last; 0: never")
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 2, 4, 8),
        description="numbers of steps at which the LoRA's pictures are compared with the teacher's, beside its own",
    )
    teacher_steps: int = Field(25, ge=1, le=1000, description="DDIM steps of the teacher's pictures")
    best: bool = Field(True, description="keep the LoRA that was nearest to the teacher, as <name>-best")
