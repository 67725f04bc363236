"""Reading bases: diffusers folders, hub ids, and single .safetensors checkpoints as shared on Civitai."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ...samplers.lora_file import LoraHeader, file_hash, read_header
from .base import bundled_folder

CONFIGS = Path(__file__).parent / "configs"
TOKENIZER_REPO = "openai/clip-vit-large-patch14"
NETWORK_PREFIX = "model.diffusion_model."
GET_IT = "Get the file again, or set base.config to a folder with this model's component configs."
VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


def is_hub_id(path: str) -> bool:
    """Whether a base path reads as owner/name on the hub and as nothing here."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).parent.is_dir()


def diffusers_folder(path: str, components: Iterable[str], title: str, optional: Iterable[str] = ()) -> Path:
    """The folder of a diffusers base that has these components, brought from the hub where the path is a hub id.

    optional: components to bring along that need not be there.

    Raises ValueError when a component is missing, FileNotFoundError when there is no such folder or hub id.
    """
    folder = Path(path)
    if folder.is_dir():
        missing = [c for c in components if not (folder / c).is_dir()]
        if missing:
            raise ValueError(f"{folder} is no diffusers folder of {title}: it lacks {', '.join(missing)}/.")
        return folder
    if not is_hub_id(path):
        raise FileNotFoundError(
            f"No base at {path}. Set base.path to a diffusers folder, a .safetensors checkpoint, a hub id, "
            "or a bundled tiny-sd15, tiny-sdxl, tiny-sd3."
        )
    patterns = ["model_index.json", "*/config.json"]
    patterns += [f"{c}/*.{kind}" for c in (*components, *optional) for kind in ("json", "txt", "model", "safetensors")]
    try:
        return Path(snapshot_download(path, allow_patterns=patterns, ignore_patterns=["*.fp16*", "*non_ema*"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"No base at {path}: no such folder or file here, and the hub did not give it ({type(error).__name__}). "
            "Set base.path to a diffusers folder, a .safetensors checkpoint, or a hub id that you can reach."
        ) from error


def parts_folder(path: Path, parts: str | None, lacking: dict[str, str], title: str) -> Path | None:
    """The folder that supplies what a single file has not, and its tokenizers if it has any; None where none is set.

    parts: diffusers folder, bundled base or hub id. lacking: component -> what it is, for people.
    Raises ValueError where something is lacking and `parts` has it not either.
    """
    if parts is None:
        if lacking:
            raise ValueError(
                f"{path.name} holds no {', no '.join(lacking.values())}. Give a full checkpoint, or set base.parts to "
                f"a diffusers folder of {title} that has {', '.join(f'{c}/' for c in lacking)}."
            )
        return None
    where = str(bundled_folder(parts) or parts)
    if not Path(where).is_dir() and not is_hub_id(where):
        raise FileNotFoundError(
            f"No folder at {parts}. Set base.parts to a diffusers folder of {title}, or leave it out."
        )
    return diffusers_folder(where, lacking, title, ("tokenizer", "tokenizer_2", "tokenizer_3"))


def load_part(root: Path, part: str, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    """One component of a diffusers folder. Raises ValueError when it cannot be read."""
    try:
        # transformers calls it dtype since 4.56, diffusers torch_dtype; after loading both agree
        model = kind.from_pretrained(root / part, use_safetensors=True, local_files_only=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{root} cannot be loaded: {error} Only .safetensors weights are read.") from error
    return model.to(dtype)


def load_vae(root: Path) -> AutoencoderKL | AutoencoderTiny:
    """The VAE of a diffusers folder, in fp32."""
    kind = json.loads((root / "vae" / "config.json").read_text())["_class_name"]
    if kind not in VAES:
        raise ValueError(f"{root / 'vae'} is a {kind}; available: {', '.join(VAES)}.")
    return load_part(root, "vae", VAES[kind], torch.float32)


def folder_hash(root: Path, parts: Iterable[str]) -> str:
    """SHA-256 of the weight files of these components together."""
    digest = hashlib.sha256()
    for part in parts:
        for file in sorted((root / part).glob("*.safetensors")):
            digest.update(file_hash(file).encode())
    return digest.hexdigest()


def checkpoint_header(path: Path) -> LoraHeader:
    """The header of a single-file checkpoint; ValueError when it holds no network."""
    header = read_header(path)
    if not any(n.startswith(NETWORK_PREFIX) for n in header.tensors):
        raise ValueError(
            f"{path.name} is no Stable Diffusion checkpoint: it has no {NETWORK_PREFIX}* weights "
            f"(its names are like {next(iter(header.tensors), 'nothing')}). "
            "Give a full checkpoint file or a diffusers folder."
        )
    return header


def read_tensors(path: Path, names: Iterable[str], prefix: str) -> dict[str, Tensor]:
    """The file's tensors under a prefix, which is taken off."""
    with safe_open(path, "pt") as file:
        return {n.removeprefix(prefix): file.get_tensor(n) for n in names if n.startswith(prefix)}


def convert_part(path: Path, config: Path, part: str, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    """Network or VAE of a single file, by diffusers' own conversion. Raises ValueError for one that is not whole."""
    try:
        model = kind.from_single_file(
            str(path), config=str(config), subfolder=part, torch_dtype=dtype, local_files_only=True
        )
    except SingleFileComponentError as error:
        raise ValueError(
            f"{path.name} lacks a part of a full checkpoint ({error}). "
            "Give one that holds the network, the VAE and the text encoders."
        ) from error
    except (NotImplementedError, KeyError) as error:  # torch's, for weights never filled in; the conversion's
        raise ValueError(f"{path.name} lacks some of the weights of its {part}. {GET_IT}") from error
    missing = [n for n, p in model.named_parameters() if p.is_meta]
    if missing:
        some = f"{len(missing)} {part} weights (such as {missing[0]})"
        raise ValueError(f"{path.name} lacks {some}. {GET_IT}")
    return model


def fill(model: nn.Module, weights: dict[str, Tensor], path: Path, what: str, assign: bool = False) -> nn.Module:
    """Load a text encoder's weights, whatever this version of transformers puts before their names.

    assign: make them the model's own, which may be on the meta device, instead of copying them.
    Raises ValueError when any is missing.
    """
    bare = lambda name: name.removeprefix("text_model.")  # noqa: E731
    own = {bare(k): k for k in model.state_dict()}
    found = {bare(k): v for k, v in weights.items()}
    missing = [k for k in own if k not in found and not k.endswith("position_ids")]
    if missing:
        some = f"{len(missing)} {what} weights (such as {missing[0]})"
        raise ValueError(f"{path.name} lacks {some}. Get the file again.")
    model.load_state_dict({own[k]: v for k, v in found.items() if k in own}, strict=False, assign=assign)
    return model


def load_clip_tokenizer(folder: str | Path, base: str) -> CLIPTokenizer:
    """From the folder, where it holds one, else from the hub's cache."""
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
