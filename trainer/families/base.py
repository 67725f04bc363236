"""What every model family gives the trainer: one frozen network, its encoders, its schedule."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ...samplers import PhaseGrid, Schedule
from ..system.machine import same_device
from ..tiny.bundled import bundled_folder

TOKENS = 77  # that a CLIP text encoder reads, with the marks of start and end
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# A prompt's encoding by name, each (B, ...): what `Base.encode_prompts` returns and `Base.denoise` takes.
Condition = dict[str, Tensor]
NULLS = ("zeros", "empty")


class Alone(NamedTuple):
    """How a base is sampled without a LoRA, by the words of a recipe."""

    guidance: float = 7.5
    gamma: float = 0.0
    min_alpha: float = 0.0

    def grid(self) -> PhaseGrid:
        """Any number of steps, at levels as far from each other."""
        return PhaseGrid(points=1000, phases=1, from_noise=True, distilled=False)


@dataclass(frozen=True)
class BaseFacts:
    """What is known of a base without its weights: what a recipe asks, and the checks before a run.

    prediction, zero_terminal_snr: what the network predicts, and on which schedule. shift: a flow's time shift, None on
    the VP schedule. base_hash: SHA-256 of the weights, "" before they are read. assumed: the base is not on this
    machine yet (a hub id), and these facts are what its family usually has. tokens: of a prompt's encoding, None where
    the network is told no words.
    """

    family: type[Base]
    path: str
    prediction: str
    zero_terminal_snr: bool
    shift: float | None = None
    base_hash: str = ""
    assumed: bool = False
    tokens: int | None = TOKENS


@dataclass
class Base(ABC):
    """One loaded base. The network is frozen; encoders can be dropped with `drop_encoders` once inputs are cached.

    network: the UNet or transformer, a diffusers model. schedule, prediction: what it was trained on.
    null: what stands for "no prompt" in guidance: "zeros" or the encoding of the "empty" prompt.
    path, base_hash: where it came from; SHA-256 of the file, or of the folder's weight files together.
    supplied: SHA-256 of the weights that `base.parts` supplied to a single file, or nothing.
    merged: hashes and strengths of what was merged into the weights (`base.loras`), or nothing.
    turns: where network and text encoders work in turn, each on the CPU while the other does; None: all stay in place.
    """

    network: ModelMixin
    vae: AutoencoderKL | AutoencoderTiny | None
    text_encoders: list[nn.Module]
    tokenizers: list
    schedule: Schedule
    prediction: str
    zero_terminal_snr: bool
    null: str
    path: str
    base_hash: str
    supplied: str = ""
    merged: str = ""
    turns: torch.device | None = None

    name: ClassVar[str]
    # Its name for people.
    title: ClassVar[str]
    # The network's class, and its name in a diffusers folder; folder of the family's component configs.
    network_class: ClassVar[type[ModelMixin]]
    component: ClassVar[str]
    configs: ClassVar[Path]
    architecture: ClassVar[str]
    base_version: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]
    # PEFT's names of the two factors -> the file's.
    lora_parts: ClassVar[dict[str, str]]
    # Whether every loader reads an `.alpha` tensor beside them.
    stores_alpha: ClassVar[bool] = True
    # Whether the network is told each picture's true size and crop ("time_ids" in a condition).
    knows_sizes: ClassVar[bool] = False
    # Whether the network's convolutions are given their memory format that a GPU likes.
    channels_last: ClassVar[bool] = True
    # Whether all its weights are trained, by an objective without a teacher; else it is the teacher of a LoRA.
    whole: ClassVar[bool] = False
    alone: ClassVar[Alone] = Alone()
    # How kohya's files begin the names of each text encoder's modules.
    text_prefixes: ClassVar[dict[str, str]] = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    # Whether the original layout of the network's weights has q, k and v in one tensor.
    fuses_qkv: ClassVar[bool] = False
    # Options of `load` under which `pcm check` compares: without what parity needs nothing of.
    parity_options: ClassVar[dict[str, Any]] = {}
    # Whether PCM's published training script for this family keeps the trained network itself in the low precision.
    published_in_low_precision: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def look(cls, path: str) -> BaseFacts:
        """The facts of a base before any of its weights is read; takes the options of the family's `load`.

        Raises whatever `load` raises that can be known so early: what is not there, what is of another kind, settings
        that contradict the base. A hub id is taken at its word.
        """

    @property
    def facts(self) -> BaseFacts:
        shift = getattr(self.schedule, "shift", None)
        # the CLIPs' states lie side by side, those of a third encoder come after them
        tokens = sum([*self.token_limits[:1], *self.token_limits[2:]]) or None
        return BaseFacts(
            type(self), self.path, self.prediction, self.zero_terminal_snr, shift, self.base_hash, tokens=tokens
        )

    @classmethod
    def check_prompts(cls, path: str, prompts: Iterable[str]) -> None:
        """Raise ValueError for a prompt that the base at this path cannot take; most take any."""
        return

    @classmethod
    def check_side(cls, path: str, side: int) -> None:
        """Raise ValueError for pictures that the base at this path draws badly for their size; most draw any."""
        return

    @property
    def token_limits(self) -> list[int]:
        """The most tokens that each text encoder reads of a prompt, with the marks of start and end."""
        return [TOKENS] * len(self.tokenizers)

    def count_cut(self, prompts: list[str]) -> int:
        """How many of these prompts are longer than every text encoder reads, so that their ends count for nothing."""
        lengths = [
            [len(ids) for ids in tokenizer(prompts, verbose=False).input_ids] if prompts else []
            for tokenizer in self.tokenizers
        ]
        within = [[n <= limit for n in some] for some, limit in zip(lengths, self.token_limits, strict=True)]
        return sum(not any(fits) for fits in zip(*within, strict=True))

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.turns or self._first_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return self._first_weight.dtype

    @property
    def _first_weight(self) -> nn.Parameter:
        """It tells of all: diffusers' own `device` and `dtype` go through every module of the network each time."""
        return next(self.network.parameters())

    @property
    def untrained(self) -> bool:
        """Whether its weights are random."""
        return False

    @property
    def default_resolution(self) -> int:
        """Side in pixels that the network was made for."""
        return self.network.config.sample_size * 8

    def drop_encoders(self) -> None:
        """Free the text encoders, which no step needs once prompts are cached, and keep the VAE on the CPU.

        The network comes to the device after they have left it: there may be no room for both.
        """
        for encoder in self.text_encoders:
            if encoder.device.type != "cpu":
                encoder.to("meta")  # their memory there is free, whoever still holds them
        self.text_encoders = []
        self.vae.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._bring(self.network)
        self.turns = None

    @property
    def encoder_settings(self) -> str:
        """What, besides the weights, decides the encodings: a cache is good for one such setting."""
        return f"parts {self.supplied}" if self.supplied else ""

    @property
    def weights_hash(self) -> str:
        """A hash of the weights as they are used: the base's, or with what was merged into it one of both."""
        return hashlib.sha256(f"{self.base_hash} {self.merged}".encode()).hexdigest() if self.merged else self.base_hash

    @property
    def schedule_settings(self) -> list:
        """What decides the noise levels: zero terminal SNR for VP, the shift for flow."""
        return [self.zero_terminal_snr, getattr(self.schedule, "shift", None)]

    def misread(self) -> Base | None:
        """The same base read as predicting the other thing that it might; None where there is only one reading."""
        return None

    def check_prediction(self, x0: Tensor, condition: Condition) -> None:
        """Raise ValueError where the output for noised latents x0 (B, C, h, w) is no `prediction` of theirs."""
        return

    def _bring(self, *parts: nn.Module, idle: list[nn.Module] = ()) -> None:
        """Where parts take turns, these are to work, and idle ones make room."""
        if self.turns is None:
            return
        for part, device in [*((p, torch.device("cpu")) for p in idle), *((p, self.turns) for p in parts)]:
            if not same_device(part.device, device):
                part.to(device)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Prompts -> their encodings in fp32, every tensor (B, ...): see each family's `_encode_prompts`."""
        self._bring(*self.text_encoders, idle=[self.network])
        return self._encode_prompts(prompts)

    @abstractmethod
    def _encode_prompts(self, prompts: list[str]) -> Condition: ...

    def null_condition(self, empty: Condition) -> Condition:
        """What guidance subtracts, from the encoding of the empty prompt."""
        return {k: torch.zeros_like(v) for k, v in empty.items()} if self.null == "zeros" else empty

    @staticmethod
    def with_null(condition: Condition, null: Condition) -> Condition:
        """Both halves of guidance as one batch (2B, ...); what no prompt decides (sizes) is the same in both."""
        return {k: torch.cat([v, null[k].expand_as(v) if k in null else v]) for k, v in condition.items()}

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pixels (B, 3, H, W) in [-1, 1] -> scaled latent mean and standard deviation (None for a VAE without one).

        A latent is (encoded - shift_factor) * scaling_factor of the VAE's config. Raises ValueError for a VAE whose
        latents are not finite.
        """
        self._bring(self.vae)
        encoded = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype))
        scale, shift = _scale_shift(self.vae)
        tiny = isinstance(self.vae, AutoencoderTiny)
        latents = encoded.latents if tiny else encoded.latent_dist.mean
        if not latents.isfinite().all():
            raise ValueError(
                f"The VAE of {self.path} turns pictures into numbers that are not finite, in fp32: its weights are "
                "broken. Use another copy of the base."
            )
        return (latents.float() - shift) * scale, None if tiny else encoded.latent_dist.std.float() * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pixels (B, 3, 8h, 8w) in [0, 1], on the CPU.

        The VAE runs in fp32, where SDXL's cannot overflow as it does in fp16.
        """
        home = self.vae.device
        self.vae.to(self.device)
        scale, shift = _scale_shift(self.vae)
        x = (latents / scale + shift).to(self.device, self.vae.dtype)
        with torch.autocast(self.device.type, enabled=False):
            pixels = torch.cat([self.vae.decode(row).sample.float().cpu() for row in x.split(1)])
        self.vae.to(home)
        return pixels.add(1).div(2).clamp(0, 1)

    def denoise(self, x: Tensor, tick: Tensor, condition: Condition) -> Tensor:
        """The network's raw output in fp32 for points x (B, C, h, w) at ticks (B,)."""
        self._bring(self.network, idle=self.text_encoders)
        return self._denoise(x, tick, condition)

    @abstractmethod
    def _denoise(self, x: Tensor, tick: Tensor, condition: Condition) -> Tensor: ...

    def target_time(self, tick: Tensor) -> Condition:
        """What tells the network at which ticks (B,) a jump is to end; nothing for one without an input for it."""
        return {}

    @staticmethod
    @abstractmethod
    def feature_blocks(network: ModelMixin) -> list[nn.Module]:
        """The blocks of this family's network whose outputs a discriminator judges, in the order in which they run."""

    @staticmethod
    @abstractmethod
    def feature_map(network: ModelMixin, output, x: Tensor) -> Tensor:
        """What one of `feature_blocks` returned for points x -> a feature map (B, C, h, w)."""

    def features(self, x: Tensor, tick: Tensor, condition: Condition) -> list[Tensor]:
        """Feature maps (B, C, h, w) of points x at ticks (B,), differentiable in x; later blocks are not run."""
        outputs = outputs_of(self.feature_blocks(self.network), lambda: self.denoise(x, tick, condition))
        return [self.feature_map(self.network, output, x).float() for output in outputs]

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of one latent of a square picture; ValueError for a side that the network cannot take."""
        self.check_side(self.path, resolution)
        return self.latent_shape_of(self.network.config, resolution)

    @staticmethod
    @abstractmethod
    def latent_shape_of(network_config, resolution: int) -> tuple[int, int, int]:
        """`latent_shape` from the network's config alone."""

    @staticmethod
    @abstractmethod
    def dummy_condition(network_config, make: Callable[..., Tensor], tokens: int | None = None) -> Condition:
        """The condition of one sample, every tensor (1, ...) by `make(*shape)`. tokens: of a prompt's encoding (see
        `BaseFacts`), by default the most that the family's usual encoders give."""

    @classmethod
    @abstractmethod
    def dummy_inputs(
        cls, network_config, resolution: int, make: Callable[..., Tensor], tokens: int | None = None
    ) -> dict[str, Any]:
        """Arguments of the network's forward for one sample of a square picture, every tensor by `make(*shape)`.

        tokens: as in `dummy_condition`.
        """

    @classmethod
    def network_config(cls, path: str, config: str | None) -> Any:
        """The config of the network of a base that is not loaded, with every default filled in."""
        settings = cls.network_class.load_config(cls.config_folder(path, config) / cls.component)
        # read off the signature: the network itself, even without weights, takes a tenth of a second to be built
        arguments = inspect.signature(cls.network_class.__init__).parameters.values()
        usual = {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}
        return FrozenDict(usual | settings)

    @classmethod
    def config_folder(cls, path: str, config: str | None) -> Path:
        """Folder of the network's config for a base that is not loaded: its own if it is here, else the family's."""
        folder = Path(config or bundled_folder(path) or path)
        return folder if (folder / cls.component / "config.json").is_file() else cls.configs

    @staticmethod
    @abstractmethod
    def lora_key(module: str) -> str:
        """Network module path -> what the LoRA file calls the module."""

    @classmethod
    def dora_names(cls, module: str) -> dict[str, str]:
        """Network module path -> the names of a DoRA's tensors, by part: PEFT's of the two halves and of the
        magnitudes, which diffusers reads, and ComfyUI's "dora_scale" of its own."""
        path = f"{cls.component}.{module}"
        return {
            "lora_A": f"{path}.lora_A.weight",
            "lora_B": f"{path}.lora_B.weight",
            "magnitude": f"{path}.lora_magnitude_vector",
            "dora_scale": f"{path}.dora_scale",
        }

    def host_rows(self, module: str, rows: Tensor) -> Tensor:
        """(out,) a number for each row of a module's weight, in the order in which ComfyUI has the rows."""
        return rows

    @abstractmethod
    def load_lora(self, state: dict[str, Tensor], metadata: dict[str, Any] | None, name: str) -> None:
        """Install the tensors of a LoRA file for the network as adapter `name`, by diffusers' own loader.

        metadata: PEFT's entries of the file's header, such as `unet.lora_alpha`.
        """


class _AllSeen(Exception):
    """Ends a forward pass whose remaining blocks nobody needs."""


def outputs_of(blocks: list[nn.Module], run: Callable[[], object]) -> list:
    """What each block returns during `run`, which ends with the last of them."""
    outputs: list = []

    def take(_, __, output) -> None:
        outputs.append(output)
        if len(outputs) == len(blocks):
            raise _AllSeen

    handles = [block.register_forward_hook(take) for block in blocks]
    try:
        with suppress(_AllSeen):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _scale_shift(vae: AutoencoderKL | AutoencoderTiny) -> tuple[float, float]:
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


def side_multiple(resolution: int, multiple: int) -> None:
    """Raise ValueError for a side that is not a multiple of what the network's depth or patches ask for."""
    if resolution % multiple:
        near = max(1, resolution // multiple) * multiple
        raise ValueError(f"resolution {resolution} is not a multiple of {multiple}: use {near} or {near + multiple}.")
