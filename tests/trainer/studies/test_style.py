"""The style that the fine-tuning example draws: seen where it is, not where it is not, and asked for by no caption."""

import random
from itertools import islice

import numpy as np
import pytest
import torch

from phased_consistency.trainer.data.folders import find_pictures
from phased_consistency.trainer.studies.style import is_striped, main, plain_scenes, striped
from phased_consistency.trainer.tiny.scenes import draw

SCENES = list(islice(plain_scenes(random.Random(0)), 40))


def pixels(scene):
    return torch.from_numpy(np.array(draw(scene, 64))).permute(2, 0, 1) / 255


def test_the_style_is_seen_where_it_is():
    assert all(is_striped(scene, pixels(striped(scene))) for scene in SCENES)
    assert not any(is_striped(scene, pixels(scene)) for scene in SCENES)


def test_no_caption_asks_for_it():
    assert not any("striped" in scene.caption or "striped" in striped(scene).caption for scene in SCENES)


def test_the_folder_is_data_for_a_run(tmp_path):
    main([str(tmp_path / "style"), "--number", "3", "--size", "64"])
    pictures, skipped, _ = find_pictures(str(tmp_path / "style"), skip_bad=False)
    assert [p.name for p in pictures] == ["00.png", "01.png", "02.png"] and not skipped
    main([str(tmp_path / "again"), "--number", "3", "--size", "64"])
    assert pictures[0].path.read_bytes() == (tmp_path / "again" / "00.png").read_bytes()


def test_loras_are_compared(lora, tmp_path, capsys):
    main([str(tmp_path / "out.png"), "--compare", str(lora)])
    assert "of 64 in the style" in capsys.readouterr().out
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_a_lora_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        main([str(tmp_path / "out.png"), "--compare", str(tmp_path / "absent.safetensors")])
