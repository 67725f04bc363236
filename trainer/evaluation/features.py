"""Pluggable features: the spaces in which sets of pictures are compared. Nothing is downloaded or unpickled."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection, PreTrainedModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ...samplers.texts import brief
from ..families.loading import has_clip_words
from ..tiny.languages import Language
from .contestants import unique_names

THUMBNAIL = 32
CLASSIFIER = "classifier"  # the space of `own_spaces`
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


class Absent(Exception):
    """Raised for a metric that cannot be had here; the message is a sentence for the report."""


@dataclass(frozen=True)
class Features:
    """A named space in which pictures are compared.

    of: from latents (B, C, h, w) and their pixels (B, 3, H, W) in [0, 1] to features (B, D), in fp32 on the CPU.
    """

    name: str
    of: Callable[[Tensor, Tensor], Tensor]


def find_features(names: Iterable[str], device: torch.device) -> tuple[list[Features], list[str]]:
    """The spaces of these names, no two called the same, and a sentence for each that cannot be had.

    A name is a key of `SPACES`, or the folder of a CLIP with a vision tower. Raises ValueError for one that is neither.
    """
    spaces, left_out = [], []
    for name in dict.fromkeys(names):
        if name not in SPACES and not Path(name).is_dir() and Path(name).name == name:
            raise ValueError(f"--features is {name!r}; available: {', '.join(SPACES)}, or the folder of a CLIP model.")
        try:
            spaces.append(SPACES[name](device) if name in SPACES else clip_vision(Path(name), device))
        except Absent as missing:
            left_out.append(f"Features {name}: {missing}")
    names = unique_names(space.name for space in spaces)
    return [replace(space, name=name) for space, name in zip(spaces, names, strict=True)], left_out


def latents(_: torch.device) -> Features:
    """The space of the latents themselves, the network's own output: there offline and with every base."""
    return Features("latents", lambda latents, _: latents.flatten(1))


def pixels(_: torch.device) -> Features:
    """The space of thumbnails, averaged to 32 x 32."""
    return Features(
        "pixels", lambda _, pixels: functional.interpolate(pixels, (THUMBNAIL,) * 2, mode="area").flatten(1)
    )


def inception(device: torch.device) -> Features:
    """The space of FID's 2048 features (Heusel et al. 2017), by torchmetrics, from weights that torch's hub holds.

    Raises Absent where a package or the weights are missing.
    """
    if missing := [name for name in ("torchmetrics", "torch_fidelity") if find_spec(name) is None]:
        packages = " and ".join(name.replace("_", "-") for name in missing)
        raise Absent(f'{packages} not installed. pip install "phased-consistency[metrics]" brings them.')
    weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if not weights.is_file():
        raise Absent(f"no weights at {weights}. Put {INCEPTION} of torch-fidelity's release v0.2.0 there.")
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        with _weights_only():
            network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights)).to(device)
    except (RuntimeError, UnpicklingError) as error:
        raise Absent(f"{weights} is not torch-fidelity's file ({brief(error)}).") from error
    levels = lambda pixels: pixels.mul(255).round().to(device, torch.uint8)  # noqa: E731
    return Features("inception", lambda _, pixels: network(levels(pixels)).float().cpu())


def own_spaces(language: Language | None) -> list[Features]:
    """The space of the classifier that comes with a bundled base and knows what that draws; none for other bases."""
    if language is None or language.features is None:
        return []
    return [Features(CLASSIFIER, lambda _, pixels: language.features(pixels))]


SPACES = {"latents": latents, "pixels": pixels, "inception": inception}


@contextmanager
def _weights_only() -> Iterator[None]:
    """In this block torch.load, which torch-fidelity calls for everything a file may hold, reads tensors alone."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def clip_vision(folder: Path, device: torch.device) -> Features:
    """The space of a CLIP's projected picture features, unnormalised; from a whole CLIP or a vision tower alone."""
    model = _load(CLIPVisionModelWithProjection, folder).to(device)
    prepare = lambda pixels: clip_pixels(pixels, model.config.image_size).to(device)  # noqa: E731
    return Features(folder.name, lambda _, pixels: model(pixel_values=prepare(pixels)).image_embeds.float().cpu())


class ClipScore:
    """How well pictures fit their prompts: 100 * max(cos(picture, prompt), 0) by a CLIP of a local folder.

    It is Hessel et al. 2021, arXiv 2104.08718, Eq. 1, with 100 for its 2.5 as torchmetrics has it. Raises
    Absent for a folder without model or words.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.model = _load(CLIPModel, folder).to(device)
        if not has_clip_words(folder):
            raise Absent(f"no tokenizer in {folder}. Put its vocab.json and merges.txt beside the model.")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores of pixels (B, 3, H, W) in [0, 1], each against its prompt."""
        config, device = self.model.config, self.model.device
        length = config.text_config.max_position_embeddings
        words = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        pictures = clip_pixels(pixels, config.vision_config.image_size).to(device)
        output = self.model(pixel_values=pictures, **words.to(device))
        return 100 * torch.cosine_similarity(output.image_embeds, output.text_embeds).clamp(min=0).cpu()


def clip_pixels(pixels: Tensor, side: int) -> Tensor:
    """(B, 3, side, side) square pictures in [0, 1] as CLIP's image processor hands them on: bicubic, normalised."""
    resized = functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (resized - mean) / std


def _load(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """A model with all its weights, from safetensors in the folder. Raises Absent where it is not there whole."""
    if not folder.is_dir():
        raise Absent(f"no folder at {folder}. Give one with a CLIP model's config.json and model.safetensors.")
    try:
        model, loading = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise Absent(f"{folder} holds no CLIP that can be loaded ({brief(error)}).") from error
    if loading["missing_keys"]:
        raise Absent(f"{folder} lacks {len(loading['missing_keys'])} of the weights of a {kind.__name__}.")
    return model.eval().requires_grad_(False)
