"""The style that the fine-tuning example draws: seen where it is, not where it is not, and asked for by no caption."""

import pytest
import torch

from phased_consistency.trainer.data.folders import find_pictures
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.pictures import read_pictures
from phased_consistency.trainer.studies.style import coarse, compare, is_coarse, main
from phased_consistency.trainer.tiny.bundled import EMOJI
from phased_consistency.trainer.tiny.comfy import LORA


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("style")
    main([str(path), "--number", "3"])
    return path


def test_the_style_is_seen_where_it_is(folder):
    pictures = torch.cat([read_pictures([path]).pixels for path in sorted(folder.glob("*.png"))])
    assert is_coarse(pictures).all()
    base = load_base(EMOJI)
    with torch.no_grad():
        rebuilt = base.decode(base.encode_images(2 * pictures - 1)[0])
    assert is_coarse(rebuilt).all(), "also after the autoencoder"


def test_it_is_not_seen_where_it_is_not():
    rng = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(6, 3, 9, 9, generator=rng), (128, 128), mode="bicubic")
    noise = torch.rand(6, 3, 128, 128, generator=rng)
    assert not is_coarse(smooth).any() and not is_coarse(noise).any()
    assert is_coarse(coarse(smooth)).all() and is_coarse(coarse(noise)).all()


def test_the_folder_is_data_for_a_run(folder):
    pictures, skipped, _ = find_pictures(str(folder), skip_bad=False)
    assert [p.name for p in pictures] == ["00.png", "01.png", "02.png"] and not skipped
    assert not any("square" in path.read_text() or "pixel" in path.read_text() for path in folder.glob("*.txt"))


def test_loras_are_compared(tmp_path):
    assert "4 steps: 0 of 8 in the style" in compare([LORA], tmp_path / "out.png", number=8)
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_a_lora_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        main([str(tmp_path / "out.png"), "--compare", str(tmp_path / "absent.safetensors")])
