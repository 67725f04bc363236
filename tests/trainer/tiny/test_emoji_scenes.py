"""The emoji base's drawings show what their captions say, where the font is installed."""

import random
from dataclasses import replace

import pytest
import torch

from phased_consistency.samplers.emoji_words import GROUNDS, PATTERNS, THINGS
from phased_consistency.trainer.tiny import make_emoji
from phased_consistency.trainer.tiny.emoji_scenes import (
    FONT,
    PACKAGE,
    EmojiScene,
    Spot,
    draw_ground,
    find_font,
    pixels_of,
    random_scenes,
    sprite,
)

SIDE = 128
drawn = pytest.mark.skipif(not FONT.is_file(), reason=f"the font of Debian's {PACKAGE} is not installed")


def alone(thing, ground="blue", pattern="", x=0.5, y=0.5, extent=0.5):
    return EmojiScene((Spot(thing, x, y, extent, 0.0),), ground, pattern, "")


def different(scene, *others):
    """Where a scene's picture is another than its bare ground's, and than other scenes'; bool (side, side)."""
    bare = pixels_of(replace(scene, spots=()), SIDE)
    return torch.stack([(pixels_of(scene, SIDE) != other).any(0) for other in (bare, *others)]).all(0)


@drawn
def test_a_thing_stands_where_the_scene_has_it():
    for thing in random.Random(0).sample(list(THINGS), 12):
        rows, columns = different(alone(thing, x=0.6, y=0.4)).nonzero().unbind(1)
        height, width = (int(axis.max() - axis.min()) + 1 for axis in (rows, columns))
        assert abs(max(height, width) - 0.5 * SIDE) <= 2, thing
        assert abs((rows.max() + rows.min() + 1) / 2 - 0.4 * SIDE) <= 2, thing
        assert abs((columns.max() + columns.min() + 1) / 2 - 0.6 * SIDE) <= 2, thing


@drawn
def test_no_two_things_look_alike():
    views = torch.stack([pixels_of(alone(thing, extent=0.9), 32).float().flatten() for thing in THINGS])
    distances = torch.cdist(views, views) / 255 + 1e3 * torch.eye(len(THINGS))
    assert distances.min() > 2


@drawn
def test_both_things_of_a_pair_are_in_their_halves():
    for scene in random_scenes(20, seed=4, pairs=1.0):
        columns = different(scene).nonzero()[:, 1]
        assert (columns < SIDE / 2).float().mean() > 0.2 < (columns >= SIDE / 2).float().mean()


@drawn
def test_things_keep_within_the_picture():
    """But for the tip of one that is large and tilted."""
    for scene in random_scenes(60, seed=5):
        edges = different(scene)
        assert edges[[0, -1]].float().mean() < 0.2 and edges[:, [0, -1]].float().mean() < 0.2, scene.caption


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("ground", ["white", "black"])
def test_grounds_have_their_colour_and_pattern(ground, pattern):
    image = draw_ground(ground, pattern, SIDE)
    colours = dict((colour, count) for count, colour in image.getcolors())
    assert colours[GROUNDS[ground]] >= SIDE * SIDE / 2
    assert len(colours) == (2 if pattern else 1)


@drawn
def test_every_thing_has_a_drawing():
    for thing in THINGS:
        assert min(sprite(thing).size) > 40, thing


@drawn
def test_any_side_is_drawn():
    scene = random_scenes(1, seed=6)[0]
    assert [pixels_of(scene, side).shape[-1] for side in (64, 256)] == [64, 256]


def test_a_missing_font_is_named_with_its_package(tmp_path, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match="apt install fonts-noto-color-emoji"):
        find_font(tmp_path / "none.ttf")
    monkeypatch.setattr(make_emoji, "find_font", lambda: find_font(tmp_path / "none.ttf"))
    assert make_emoji.main([str(tmp_path / "base")]) == 1
    assert "apt install fonts-noto-color-emoji" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()
