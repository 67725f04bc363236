"""The bundled emoji base is what it says: small, with its licence, loaded by its name; it draws what it is asked."""

import json

import pytest

from phased_consistency.samplers.emoji_words import GROUNDS, THINGS, parse
from phased_consistency.trainer.evaluation.setting import TEACHER, Setting
from phased_consistency.trainer.evaluation.trial import Trial
from phased_consistency.trainer.families import load_base, look_at_base
from phased_consistency.trainer.tiny.bundled import EMOJI, bundled_folder, own_prompts
from phased_consistency.trainer.tiny.comfy import LORA
from phased_consistency.trainer.tiny.emoji_base import ATTRIBUTION, LICENCE
from phased_consistency.trainer.tiny.emoji_classifier import agreement, load_classifier
from phased_consistency.trainer.training.loop import train
from phased_consistency.trainer.training.plan import plan
from support.runs import small_config

FOLDER = bundled_folder(EMOJI)


@pytest.fixture(scope="module")
def base():
    return load_base(EMOJI)


def test_it_is_small_and_holds_no_pickles():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors", ".png"}
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
    pictures = base.decode(Trial.of(base, prompts, seed=1).latents(Setting(TEACHER, 8, 4.0), base))
    assert agreement(load_classifier(FOLDER), 2 * pictures - 1, [parse(p) for p in prompts]).sum() >= 4


@pytest.mark.parametrize("side", [64, 128, 256])
def test_it_draws_any_side_that_it_says(base, side):
    assert base.latent_shape(side) == (16, side // 8, side // 8)


@pytest.mark.parametrize(
    ("side", "sentence"),
    [
        (48, "tiny-emoji draws 64 to 256 pixels a side, and best at 128; 48 is not"),
        (100, "100 is not a multiple of 16: use 96 or 112"),
        (272, "272 is beyond this SD3's position embeddings: use at most 256"),
        (512, "512 is beyond this SD3's position embeddings: use at most 256"),
    ],
)
def test_sides_that_are_not_drawn_are_refused(base, side, sentence):
    with pytest.raises(ValueError, match=sentence):
        base.latent_shape(side)


def test_a_run_and_its_dry_run_refuse_the_same_side(tmp_path):
    config = small_config(tmp_path, base__path=EMOJI, data__resolution=48)
    for refuse in (plan, train):
        with pytest.raises(ValueError, match="tiny-emoji draws 64 to 256 pixels a side"):
            refuse(config)


def test_words_that_it_does_not_know_are_refused(base):
    with pytest.raises(ValueError, match="does not draw 'wolf'. Nearest are: "):
        base.encode_prompts(["a wolf on a blue background"])


def test_the_trainer_refuses_words_that_it_does_not_know():
    family = look_at_base(EMOJI).family
    family.check_prompts(EMOJI, ["a fox", ""])
    family.check_prompts("a/folder", ["a wolf"])
    with pytest.raises(ValueError, match="does not draw 'wolf'. Nearest are: "):
        family.check_prompts(EMOJI, ["a fox", "a wolf on a blue background"])
