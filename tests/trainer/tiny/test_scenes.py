"""The tiny bases' language: captions say what is drawn, and the check of a picture against its caption can tell."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from phased_consistency.trainer.tiny.scenes import COLOURS, SHAPES, Shape, draw, follows_prompt, prompts, random_scene

SIDE = 128


def scenes(count=200):
    rng = random.Random(7)
    return [random_scene(rng) for _ in range(count)]


def pixels(scene):
    return torch.from_numpy(np.asarray(draw(scene, SIDE, oversample=2)).copy()).permute(2, 0, 1) / 255


def another_colour(scene, rng):
    used = {scene.background, *(s.colour for s in scene.shapes)}
    return rng.choice([c for c in COLOURS if c not in used])


def test_prompts_are_distinct_and_repeatable():
    captions = prompts(500, seed=3)
    assert len(captions) == len(set(captions)) == 500
    assert captions == prompts(500, seed=3) and captions[:100] == prompts(100, seed=3)
    assert captions != prompts(500, seed=4)


def test_captions_name_what_is_drawn():
    for scene in scenes():
        words = scene.caption.replace("background", "").split()
        assert scene.background in words
        for shape in scene.shapes:
            assert shape.colour in words and shape.shape in words and shape.colour != scene.background


def test_own_drawings_follow_their_prompt():
    assert sum(follows_prompt(s.caption, pixels(s)) for s in scenes()) >= 194


def test_another_ground_is_noticed():
    rng = random.Random(1)
    wrong = [follows_prompt(s.caption, pixels(replace(s, background=another_colour(s, rng)))) for s in scenes(100)]
    assert sum(wrong) <= 2


def test_another_colour_of_a_shape_is_noticed():
    rng = random.Random(1)

    def repainted(scene):
        first, *others = scene.shapes
        return replace(scene, shapes=(replace(first, colour=another_colour(scene, rng)), *others))

    assert sum(follows_prompt(s.caption, pixels(repainted(s))) for s in scenes(100)) <= 2


def test_a_missing_shape_is_noticed():
    assert not any(follows_prompt(s.caption, pixels(replace(s, shapes=s.shapes[1:]))) for s in scenes(50))


def test_a_picture_is_drawn_the_same_every_time():
    scene = scenes(1)[0]
    assert torch.equal(pixels(scene), pixels(scene))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_shows_its_colour(shape):
    scene = replace(scenes(1)[0], background="black", pattern="", shapes=(Shape("red", shape, 0.5, 0.5, 0.25),))
    red = (pixels(scene) - torch.tensor(COLOURS["red"]).view(3, 1, 1) / 255).abs().amax(0) < 0.05
    assert 0.02 < red.float().mean() < 0.3


def test_unknown_shapes_are_an_error():
    scene = replace(scenes(1)[0], shapes=(Shape("red", "blob", 0.5, 0.5, 0.25),))
    with pytest.raises(ValueError, match="unknown shape 'blob'; the language has circle"):
        draw(scene, 16)
