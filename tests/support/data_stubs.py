"""What the data's tests share: a base that encodes without a network, small files of a cache, and drawn pictures."""

from __future__ import annotations

import random
from io import BytesIO

import torch
from PIL import Image

from phased_consistency.trainer.data import cache, sources, store


def small_files(monkeypatch):
    """Two samples or prompts a file."""
    for module in (cache, sources, store):
        monkeypatch.setattr(module, "SHARD", 2)


class StubBase:
    """Encodes a picture as its mean colours and a prompt as its length; knows no network."""

    weights_hash, prediction, encoder_settings, null = "0" * 64, "epsilon", "", "empty"
    schedule_settings = [False, None]
    spread = None

    def latent_shape(self, side):
        if side % 8:
            raise ValueError(f"resolution {side} is not a multiple of 8: use {side // 8 * 8} or {side // 8 * 8 + 8}.")
        return 3, side // 8, side // 8

    token_limits = (77,)

    def count_cut(self, prompts):
        return sum(len(prompt.split()) > 75 for prompt in prompts)

    def encode_prompts(self, prompts):
        return {"hidden": torch.tensor([[[float(len(p))]] for p in prompts])}

    def encode_images(self, pixels):
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return mean, None if self.spread is None else torch.full_like(mean, self.spread)


def drawn(width, height, colour="red", kind="PNG", noise=None) -> bytes:
    """A picture file of one colour, or of noise with this seed."""
    file, picture = BytesIO(), Image.new("RGB", (width, height), colour)
    if noise is not None:
        picture.frombytes(random.Random(noise).randbytes(3 * width * height))
    picture.save(file, kind)
    return file.getvalue()
