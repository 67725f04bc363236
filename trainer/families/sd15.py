"""SD1.5 and its fine-tunes: load a base, encode prompts and pictures, call the denoiser, name LoRA targets and keys."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ...samplers import Schedule, VPSchedule
from ...samplers.lora_file import file_hash, read_header

CONFIGS = Path(__file__).parent / "configs" / "sd15"
TOKENIZER_REPO = "openai/clip-vit-large-patch14"
# PCM's published targets (the set of LCM-LoRA): 278 modules on SD1.5.
LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclass
class SD15:
    """One loaded base. The UNet is frozen; encoders can be dropped with `drop_encoders` once inputs are cached.

    schedule, prediction: what the base was trained on ("epsilon" or "v_prediction").
    path, base_hash: where it came from; SHA-256 of the file, or of the folder's weight files together.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny | None
    text_encoder: CLIPTextModel | None
    tokenizer: CLIPTokenizer
    schedule: Schedule
    prediction: str
    zero_terminal_snr: bool
    path: str
    base_hash: str
    name: str = "sd15"
    architecture: str = "stable-diffusion-v1/lora"
    base_version: str = "sd_1.5"
    lora_targets: tuple[str, ...] = LORA_TARGETS

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tokenizer: str | None = None,
        config: str | None = None,
        prediction: str | None = None,
    ) -> SD15:
        """Load from a diffusers folder, a single .safetensors file as shared on Civitai, or a hub id.

        dtype: of the frozen UNet; the encoders stay in fp32, where they cannot overflow.
        tokenizer: folder with vocab.json and merges.txt, where the base has none.
        config: folder of diffusers component configs for an unusual single file (default: SD1.5's own, shipped here).
        prediction: override what the base's scheduler config says.
        Raises FileNotFoundError or ValueError, naming what was looked for and what to do.
        """
        single = path.endswith(".safetensors")
        if single:
            root = Path(config) if config else CONFIGS
            unet, vae, text_encoder = _load_single_file(Path(path), root, dtype)
            base_hash = file_hash(path)
        else:
            root = diffusers_folder(path)
            unet, vae, text_encoder = _load_folder(root, dtype)
            base_hash = _folder_hash(root)
        schedule, told, zero_snr = _read_scheduler(root / "scheduler" / "scheduler_config.json")
        unet.to(memory_format=torch.channels_last)
        for module in (unet, vae, text_encoder):
            module.to(device).requires_grad_(False).eval()
        return cls(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=_load_tokenizer(tokenizer or root / "tokenizer", path),
            schedule=schedule,
            prediction=prediction or told,
            zero_terminal_snr=zero_snr,
            path=path,
            base_hash=base_hash,
        )

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def drop_encoders(self) -> None:
        """Free the text encoder, which no step needs once prompts are cached, and keep the VAE on the CPU."""
        self.text_encoder = None
        self.vae.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Prompts -> {"hidden": (B, 77, C)}, the last hidden states in fp32. Longer prompts are cut at 77 tokens."""
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        return {"hidden": self.text_encoder(ids.to(self.text_encoder.device))[0].float()}

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pixels (B, 3, H, W) in [-1, 1] -> scaled latent mean and standard deviation (None for a VAE without one)."""
        encoded = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype))
        scale = self.vae.config.scaling_factor
        if isinstance(self.vae, AutoencoderTiny):
            return encoded.latents.float() * scale, None
        posterior = encoded.latent_dist
        return posterior.mean.float() * scale, posterior.std.float() * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> pixels (B, 3, 8h, 8w) in [0, 1], on the CPU."""
        home = self.vae.device
        self.vae.to(self.device)
        x = (latents / self.vae.config.scaling_factor).to(self.device, self.vae.dtype)
        pixels = torch.cat([self.vae.decode(row).sample.float().cpu() for row in x.split(1)])
        self.vae.to(home)
        return pixels.add(1).div(2).clamp(0, 1)

    def denoise(self, x: Tensor, tick: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The network's raw output in fp32 for points x (B, 4, h, w) at ticks (B,)."""
        dtype = self.unet.dtype
        return self.unet(
            x.to(dtype), self.schedule.network_time(tick).to(x.device), condition["hidden"].to(dtype)
        ).sample.float()

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of one latent of a square picture; see `latent_shape`."""
        return latent_shape(self.unet.config, resolution)

    @staticmethod
    def lora_key(module: str) -> str:
        """UNet module path -> kohya's module name."""
        return "lora_unet_" + module.replace(".", "_")


def latent_shape(unet_config, resolution: int) -> tuple[int, int, int]:
    """(C, h, w) of one latent; raises ValueError for a side that is not a multiple of 8 at the UNet's depth."""
    multiple = 8 * 2 ** (len(unet_config.block_out_channels) - 1)
    if resolution % multiple:
        near = max(1, resolution // multiple) * multiple
        raise ValueError(f"resolution {resolution} is not a multiple of {multiple}: use {near} or {near + multiple}.")
    return unet_config.in_channels, resolution // 8, resolution // 8


def _load_single_file(path: Path, config: Path, dtype: torch.dtype):
    header = read_header(path)
    names = header.tensors
    if not any(n.startswith("model.diffusion_model.") for n in names):
        raise ValueError(
            f"{path.name} is no Stable Diffusion checkpoint: it has no model.diffusion_model.* weights "
            f"(its names are like {next(iter(names), 'nothing')}). Give a full checkpoint file or a diffusers folder."
        )
    _check_context_width(path, names, config)
    with safe_open(path, "pt") as file:
        text = {n: file.get_tensor(n) for n in names if n.startswith("cond_stage_model.transformer.")}
    try:
        unet, vae = (
            kind.from_single_file(
                str(path), config=str(config), subfolder=part, torch_dtype=precision, local_files_only=True
            )
            for kind, part, precision in ((UNet2DConditionModel, "unet", dtype), (AutoencoderKL, "vae", torch.float32))
        )
    except SingleFileComponentError as error:
        raise ValueError(
            f"{path.name} lacks a part of a full checkpoint ({error}). "
            "Give one that holds the UNet, the VAE and the text encoder."
        ) from error
    except NotImplementedError as error:  # torch's, for weights that were never filled in
        raise ValueError(f"{path.name} lacks some of the weights of its UNet or VAE. Get the file again.") from error
    text_encoder = _text_encoder_from(text, CLIPTextConfig.from_pretrained(config / "text_encoder"), path)
    for part, module in (("unet", unet), ("vae", vae)):
        missing = [n for n, p in module.named_parameters() if p.is_meta]
        if missing:
            some = f"{len(missing)} {part} weights (such as {missing[0]})"
            raise ValueError(f"{path.name} lacks {some}. Get the file again.")
    return unet, vae, text_encoder


def _check_context_width(path: Path, names: dict, config: Path) -> None:
    """Another family's UNet would fail deep inside the conversion; say it here in words."""
    wanted = json.loads((config / "unet" / "config.json").read_text())["cross_attention_dim"]
    width = next((i.shape[-1] for n, i in names.items() if n.endswith("attn2.to_k.weight")), None)
    if width != wanted:
        families = {768: "SD1.5", 1024: "SD2", 2048: "SDXL"}
        raise ValueError(
            f"{path.name} has text conditioning {width} wide, which is {families.get(width, 'an unknown family')}; "
            f"base.family sd15 needs {wanted}. Choose an SD1.5 checkpoint, or set base.config to a folder with this "
            "model's configs."
        )


def _text_encoder_from(weights: dict[str, Tensor], config: CLIPTextConfig, path: Path) -> CLIPTextModel:
    if not weights:
        raise ValueError(
            f"{path.name} holds no text encoder (cond_stage_model.*). Give a full checkpoint, or a diffusers folder."
        )
    model = CLIPTextModel(config)
    own = {k.removeprefix("text_model."): k for k in model.state_dict()}
    found = {k.removeprefix("cond_stage_model.transformer.").removeprefix("text_model."): v for k, v in weights.items()}
    state = {own[k]: v for k, v in found.items() if k in own}
    missing = [k for k in own if k not in found and not k.endswith("position_ids")]
    if missing:
        some = f"{len(missing)} text encoder weights (such as {missing[0]})"
        raise ValueError(f"{path.name} lacks {some}. Get the file again.")
    model.load_state_dict(state, strict=False)
    return model


def is_hub_id(path: str) -> bool:
    """Whether a base path reads as owner/name on the hub and as nothing here."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).parent.is_dir()


def diffusers_folder(path: str) -> Path:
    """The folder of a diffusers base, brought from the hub where the path is a hub id.

    Raises ValueError when a component is missing, FileNotFoundError when there is no such folder or hub id.
    """
    folder = Path(path)
    if folder.is_dir():
        missing = [c for c in COMPONENTS if not (folder / c).is_dir()]
        if missing:
            raise ValueError(f"{folder} is no diffusers folder of SD1.5: it lacks {', '.join(missing)}/.")
        return folder
    if not is_hub_id(path):
        raise FileNotFoundError(
            f"No base at {path}. Set base.path to a diffusers folder, a .safetensors checkpoint, a hub id, "
            "or tiny-sd15."
        )
    weights = [f"{c}/*.safetensors" for c in ("unet", "vae", "text_encoder")]
    patterns = [*(f"{c}/*.json" for c in COMPONENTS), "tokenizer/merges.txt", *weights]
    try:
        return Path(snapshot_download(path, allow_patterns=patterns, ignore_patterns=["*.fp16.*", "*non_ema*"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"No base at {path}: no such folder or file here, and the hub did not give it ({type(error).__name__}). "
            "Set base.path to a diffusers folder, a .safetensors checkpoint, or a hub id that you can reach."
        ) from error


def _load_folder(root: Path, dtype: torch.dtype):
    kind = json.loads((root / "vae" / "config.json").read_text())["_class_name"]
    vaes = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    if kind not in vaes:
        raise ValueError(f"{root / 'vae'} is a {kind}; available: {', '.join(vaes)}.")
    options = {"use_safetensors": True, "local_files_only": True}
    try:
        return (
            UNet2DConditionModel.from_pretrained(root, subfolder="unet", torch_dtype=dtype, **options),
            vaes[kind].from_pretrained(root, subfolder="vae", torch_dtype=torch.float32, **options),
            CLIPTextModel.from_pretrained(root, subfolder="text_encoder", **options).float(),
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{root} cannot be loaded: {error} Only .safetensors weights are read.") from error


def _folder_hash(root: Path) -> str:
    digest = hashlib.sha256()
    for part in ("unet", "vae", "text_encoder"):
        for file in sorted((root / part).glob("*.safetensors")):
            digest.update(file_hash(file).encode())
    return digest.hexdigest()


def _read_scheduler(path: Path) -> tuple[Schedule, str, bool]:
    config = json.loads(path.read_text())
    zero_snr = bool(config.get("rescale_betas_zero_snr", False))
    schedule = VPSchedule.from_betas(
        config["beta_start"], config["beta_end"], config["beta_schedule"], config["num_train_timesteps"], zero_snr
    )
    return schedule, config.get("prediction_type", "epsilon"), zero_snr


def _load_tokenizer(folder: str | Path, base: str) -> CLIPTokenizer:
    folder = Path(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file() or (folder / "tokenizer.json").is_file():
        return CLIPTokenizer.from_pretrained(folder)
    try:
        words = ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
        return CLIPTokenizer.from_pretrained(snapshot_download(TOKENIZER_REPO, allow_patterns=words))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"{Path(base).name} brings no CLIP tokenizer, and {TOKENIZER_REPO} is neither cached nor reachable. "
            "Put its vocab.json and merges.txt (from the tokenizer folder of any SD1.5 diffusers model) in a folder "
            "and set base.tokenizer to that folder."
        ) from error
