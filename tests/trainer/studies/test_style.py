"""The style that the fine-tuning example draws: seen where it is, not where it is not, and asked for by no caption."""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from phased_consistency.samplers.emoji_words import GROUNDS, Meaning
from phased_consistency.trainer.data.folders import find_pictures
from phased_consistency.trainer.studies.style import compare, is_striped, main, plain_prompts, striped, wording
from phased_consistency.trainer.tiny.bundled import bundled_folder
from phased_consistency.trainer.tiny.emoji_scenes import draw_ground

PROMPTS = list(islice(plain_prompts(random.Random(0)), 40))
LORA = bundled_folder("tiny-emoji") / "pcm_demo_emoji_4step.safetensors"


def pixels(ground, pattern):
    """A ground with a thing of another colour on it."""
    image = draw_ground(ground, pattern, 64)
    ImageDraw.Draw(image).ellipse((20, 20, 44, 44), fill=(250, 120, 60))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.mark.parametrize("ground", GROUNDS)
def test_the_style_is_seen_where_it_is(ground):
    meaning = Meaning(("fox",), "", ground)
    seen = {pattern: is_striped(meaning, pixels(ground, pattern)) for pattern in ("", "striped", "dotted", "checkered")}
    assert seen == {"": False, "striped": True, "dotted": False, "checkered": False}


def test_a_picture_of_another_ground_is_not_striped():
    assert not is_striped(Meaning(("fox",), "", "blue"), pixels("yellow", "striped"))


def test_no_caption_asks_for_it():
    assert not any("striped" in wording(prompt) for prompt in PROMPTS)
    assert all("striped" in wording(striped(prompt)) for prompt in PROMPTS)


def test_the_folder_is_data_for_a_run_in_the_style(tmp_path):
    main([str(tmp_path / "style"), "--number", "2"])
    pictures, skipped, _ = find_pictures(str(tmp_path / "style"), skip_bad=False)
    assert [p.name for p in pictures] == ["00.png", "01.png"] and not skipped
    prompts = islice(plain_prompts(random.Random("stripes")), 2)
    for picture, prompt in zip(pictures, prompts, strict=True):
        assert picture.caption == wording(prompt)
        drawn = torch.from_numpy(np.array(Image.open(picture.path))).permute(2, 0, 1) / 255
        assert is_striped(prompt, drawn)


def test_loras_are_compared(tmp_path):
    said = compare([LORA], tmp_path / "out.png", number=8)
    assert said.startswith(f"{LORA.stem}, 4 steps: 0 of 8 in the style, ")
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_a_lora_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        main([str(tmp_path / "out.png"), "--compare", str(tmp_path / "absent.safetensors")])
