"""Pictures and masks for tests of `pcm edit`."""

from __future__ import annotations

from PIL import Image

from phased_consistency.trainer.tiny.scenes import held_out_scenes

SCENES = held_out_scenes(4, set())


def save(path, image):
    image.save(path)
    return path


def box(size, where, mode="L", white=255):
    image = Image.new(mode, size)
    image.paste(white, where)
    return image
