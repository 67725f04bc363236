"""The bundled emoji base is what it says: small, with its licence, loaded by its name; it draws what it is asked."""

import json

import pytest

from phased_consistency.samplers.emoji_words import GROUNDS, THINGS, parse
from phased_consistency.trainer.families import look_at_base
from phased_consistency.trainer.tiny.bundled import EMOJI, bundled_folder, own_prompts
from phased_consistency.trainer.tiny.comfy import LORA
from phased_consistency.trainer.tiny.emoji_base import ATTRIBUTION, LICENCE, EmojiBase
from phased_consistency.trainer.tiny.emoji_classifier import agreement, load_classifier

FOLDER = bundled_folder(EMOJI)


@pytest.fixture(scope="module")
def base():
    return EmojiBase.load(FOLDER)


def test_it_is_small_and_holds_no_pickles():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors"}
    assert sum(path.stat().st_size for path in files if path.name != LORA.name) <= 14e6
    assert (FOLDER / "classifier.safetensors").stat().st_size < 0.6e6


def test_it_comes_with_its_licence():
    licence = (FOLDER / LICENCE).read_text(encoding="utf-8")
    assert "SIL OPEN FONT LICENSE Version 1.1" in licence and "Copyright 2013-2017 Google" in licence
    assert LICENCE in (FOLDER / ATTRIBUTION).read_text(encoding="utf-8")


def test_its_prompts_are_of_its_language():
    with open(own_prompts(EMOJI), encoding="utf-8") as file:
        prompts = [line.strip() for line in file if not line.startswith("#")]
    assert len(prompts) == len(set(prompts)) == 512
    assert {thing for prompt in prompts for thing in parse(prompt).things} == set(THINGS)


def test_its_classifier_says_how_good_it_is():
    facts = json.loads((FOLDER / "classifier.json").read_text(encoding="utf-8"))
    assert min(facts["accuracy on fresh drawings"].values()) >= 0.98
    assert facts["things"] == list(THINGS) and facts["grounds"] == list(GROUNDS)


def test_it_is_loaded_by_its_name():
    facts = look_at_base(EMOJI)
    assert facts.family.name == "sd3" and facts.prediction == "flow" and facts.shift == 3.0


def test_it_draws_what_it_is_asked(base):
    """Six of things that it draws well, with guidance and few steps; the classifier tells them from 84 things."""
    names = ("panda", "pizza", "soccer ball", "fox", "sunflower", "watermelon")
    prompts = [f"a large {name} on a blue background" for name in names]
    met = agreement(load_classifier(FOLDER), base.draw(prompts, steps=8, seed=1), [parse(p) for p in prompts])
    assert met.sum() >= 4


def test_the_trainer_refuses_words_that_it_does_not_know():
    family = look_at_base(EMOJI).family
    family.check_prompts(EMOJI, ["a fox", ""])
    family.check_prompts("a/folder", ["a wolf"])
    with pytest.raises(ValueError, match="does not draw 'wolf'. Nearest are: "):
        family.check_prompts(EMOJI, ["a fox", "a wolf on a blue background"])
