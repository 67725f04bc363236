"""What the tests of `pcm edit` share: a picture, a mask, and the tiny base, read once for all of them."""

from __future__ import annotations

import pytest

from phased_consistency.trainer.lora import install as inspection
from phased_consistency.trainer.lora.install import load_for_sample
from phased_consistency.trainer.tiny.scenes import draw
from support.edit_files import SCENES, box, save
from support.runs import TINY


@pytest.fixture
def loaded_once(monkeypatch, tiny_base):
    """The tiny base is read once for all tests, but for those that put a LoRA into it."""

    def load(base, dtype, lora, **options):
        return (
            tiny_base if (base, dtype, lora) == (TINY, "fp32", None) else load_for_sample(base, dtype, lora, **options)
        )

    monkeypatch.setattr(inspection, "load_for_sample", load)


@pytest.fixture
def photo(tmp_path):
    """A drawn scene of 64 pixels."""
    draw(SCENES[0], 64).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def mask(tmp_path):
    """White in the middle."""
    return save(tmp_path / "mask.png", box((64, 64), (16, 16, 48, 48)))
