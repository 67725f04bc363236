"""The emoji base's language: every wording means what it was made of; what is not known is named with the nearest."""

import random

import pytest

from phased_consistency.samplers.emoji_words import (
    GROUNDS,
    NAMES,
    PATTERNS,
    THINGS,
    Meaning,
    caption,
    parse,
    wordings,
)
from phased_consistency.trainer.tiny.emoji_flow import TOKENS
from phased_consistency.trainer.tiny.emoji_scenes import random_scenes


def meanings():
    """Every thing alone and in a pair, on every kind of ground, with a size and without."""
    rng = random.Random(3)
    for thing in THINGS:
        other = rng.choice([name for name in THINGS if name != thing])
        for pattern in PATTERNS:
            ground = rng.choice(list(GROUNDS))
            yield Meaning((thing,), rng.choice(["", "large"]), ground, pattern)
            yield Meaning((thing, other), "", ground, pattern)
        yield Meaning((thing,), "large")
        yield Meaning((other, thing))


def test_there_are_things_enough_and_no_name_is_two_things():
    assert len(THINGS) >= 80
    assert len(NAMES) == sum(1 + len(others) for _, *others in THINGS.values())
    assert len({character for character, *_ in THINGS.values()}) == len(THINGS)


def test_every_wording_means_the_same():
    for meaning in meanings():
        texts = wordings(meaning)
        assert len(texts) == len(set(texts)) > 1
        assert {parse(text) for text in texts} == {meaning}


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("fox", Meaning(("fox",))),
        ("Fox face", Meaning(("fox",))),
        ("a fox on blue", Meaning(("fox",), "", "blue")),
        ("The big fox, on a grey background.", Meaning(("fox",), "large", "gray")),
        ("a moon right of a rocket on striped black", Meaning(("rocket", "moon"), "", "black", "striped")),
        ("", Meaning(())),
    ],
)
def test_prompts_are_read(text, meaning):
    assert parse(text) == meaning


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a foxx on a blue background", "does not draw 'foxx'. Nearest are: fox,"),
        ("a rocket left of a monkie", "does not draw 'monkie'. Nearest are: monkey,"),
        ("a fox left of a moon left of a star", "does not draw 'moon left of star'. Nearest are: "),
        ("a fox on a red background", "has no ground 'red'. It has white, black, blue"),
        ("a fox on a wavy blue background", "has no ground 'wavy blue'."),
        ("a fox on a striped background", "each may be striped, dotted, checkered"),
        ("background", "does not draw 'background'"),
        ("on blue", "does not draw 'on blue'"),
    ],
)
def test_unknown_words_name_the_nearest(text, sentence):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert sentence in str(error.value)


def test_captions_are_plain_and_short():
    """Lower case without commas; with a start, an end and one padding they fit what is trained on."""
    rng = random.Random(0)
    for meaning in meanings():
        text = caption(meaning, rng)
        assert text == text.lower() and "," not in text
        assert max(len(wording.split()) for wording in wordings(meaning)) + 2 < TOKENS


def test_captions_say_what_is_in_the_scene():
    """All of it, but for a size that only a single thing has and, now and then, a plain ground."""
    scenes = random_scenes(500, seed=11)
    silent = 0
    for scene in scenes:
        meaning = parse(scene.caption)
        assert meaning.things == tuple(spot.thing for spot in scene.spots)
        assert meaning.pattern == scene.pattern and meaning.ground in ("", scene.ground)
        assert (meaning.size == "large") == (scene.spots[0].extent > 0.8)
        silent += not meaning.ground
    assert 0.04 < silent / len(scenes) < 0.14
    assert 0.25 < sum(len(scene.spots) == 2 for scene in scenes) / len(scenes) < 0.35


def test_the_same_seed_gives_the_same_scenes():
    assert random_scenes(20, seed=1) == random_scenes(20, seed=1) != random_scenes(20, seed=2)
