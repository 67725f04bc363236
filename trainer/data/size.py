"""What a run's cache takes on the disk, before any of it is made."""

from __future__ import annotations

import json
import math

import torch

from ..config.config import Config
from ..families import Base, BaseFacts
from .captions import chosen
from .folders import Folder
from .prompts import prompts_of
from .tags import Tags

COUNTED = 10_000  # pictures of which every caption is made to be counted; of more, as many of them, evenly spaced


def count_captions(folder: Folder | None, config: Config) -> int:
    """How many different captions a run encodes: each variant of each of these pictures' that it may draw, or without
    pictures its prompts."""
    if folder is None:
        return len(set(prompts_of(config)))
    data, pictures = config.data, folder.pictures
    step = max(1, -(-len(pictures) // COUNTED))
    seen = pictures[::step]
    captions = {caption for picture in seen for caption in chosen(picture.caption, data.captions, Tags.of(data))}
    return round(len(captions) * len(pictures) / len(seen)) if step > 1 else len(captions)


def cache_bytes(config: Config, base: BaseFacts, samples: int, captions: int) -> dict[str, int]:
    """Bytes of a cache's "latents" and of its "encodings", both in fp16, without the headers of their files.

    captions: how many different ones, or prompts, are encoded; the empty one comes to them.
    """
    network = base.family.network_config(config.base.path, config.base.config)
    latent = 2 * math.prod(base.family.latent_shape_of(network, config.data.resolution))
    if config.objective.matching:
        latent = 0
    elif config.data.has_pictures and _has_spread(config, base.family):
        latent *= 2  # of a picture the mean and its spread

    condition = base.family.dummy_condition(network, lambda *shape: torch.empty(shape, device="meta"), base.tokens)
    condition.pop("time_ids", None)  # which are the picture's
    encoding = 2 * sum(row.numel() for row in condition.values())
    return {"latents": samples * latent, "encodings": (captions + 1) * encoding}


def _has_spread(config: Config, family: type[Base]) -> bool:
    """Whether the base's VAE tells a latent's spread: the small one that tiny bases have does not."""
    folders = (family.config_folder(config.base.path, config.base.config), family.configs)
    files = (folder / "vae" / "config.json" for folder in folders)
    settings = next((json.loads(file.read_text()) for file in files if file.is_file()), None)
    return settings is not None and settings["_class_name"] != "AutoencoderTiny"
