"""The maker of the emoji base, with tiny numbers: it goes on after every kill, and what it makes loads everywhere."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load

from phased_consistency.samplers.emoji_words import Meaning, parse
from phased_consistency.trainer.evaluation.setting import TEACHER, Setting
from phased_consistency.trainer.evaluation.trial import Trial
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.tiny import (
    emoji_base,
    emoji_classifier,
    emoji_flow,
    emoji_vae,
    make_emoji,
    making,
)
from phased_consistency.trainer.tiny.comfy import checkpoint
from phased_consistency.trainer.tiny.emoji_classifier import Classifier, agreement, load_classifier, scaled
from phased_consistency.trainer.tiny.emoji_scenes import FONT, PACKAGE, EmojiScene, Spot, draw_pictures
from phased_consistency.trainer.tiny.resuming import Stage, rate

pytestmark = [
    pytest.mark.skipif(not FONT.is_file(), reason=f"the font of Debian's {PACKAGE} is not installed"),
    pytest.mark.skipif(
        not emoji_base.COPYRIGHT.is_file(), reason=f"the licence's text of Debian's {PACKAGE} is not installed"
    ),
]
NUMBERS = ["--pictures", "12", "--vae-steps", "2", "--classifier-steps", "2", "--steps", "4", "--no-compile"]
SMALLER = ((emoji_vae, "BATCH"), (emoji_flow, "BATCH"), (make_emoji, "HELD_OUT"), (emoji_classifier, "BATCH"))


class Killed(BaseException):
    """Stands for the end of a process at any place."""


@pytest.fixture(scope="module")
def small():
    """Batches of four, and the state written at every second step."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in SMALLER:
            patch.setattr(module, name, 4)
        patch.setattr(make_emoji, "accuracy", lambda classifier: {"singles": 0.5, "pairs": 0.25})
        patch.setattr(emoji_base, "PROMPTS", 8)
        patch.setattr(Stage, "is_due", lambda stage: stage.step % 2 == 0)
        yield patch


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    """A base that was made without a pause."""
    folder = tmp_path_factory.mktemp("made")
    assert make_emoji.main([str(folder), *NUMBERS]) == 0
    return folder


def weights(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*.safetensors")
        if "making" not in path.parts
    }


def test_it_goes_on_after_a_kill_to_the_same_bits(made, small, tmp_path):
    """Killed before each third step is counted, in every stage; both have the tokenizer that one of them made."""
    shutil.copytree(made / "making" / "tokenizer", tmp_path / "making" / "tokenizer")
    advance, calls = Stage.advance, []

    def killed(stage, loss):
        calls.append(stage.name)
        if len(calls) % 3 == 0:
            raise Killed
        advance(stage, loss)

    starts = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "advance", killed)
        done = False
        while not done and starts < 9:
            starts += 1
            try:
                done = make_emoji.main([str(tmp_path), *NUMBERS]) == 0
            except Killed:
                continue
    assert done and starts == 4 and len(calls) == 2 + 2 + 4 + 3
    assert {len(content) > 1000 for content in weights(made).values()} == {True}
    assert weights(tmp_path) == weights(made)


def test_it_holds_what_a_base_must(made):
    files = [path for path in made.rglob("*") if path.is_file() and "making" not in path.parts]
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 14e6
    assert (made / "classifier.safetensors").stat().st_size < 0.6e6
    licence = (made / "OFL-1.1.txt").read_text(encoding="utf-8")
    assert "SIL OPEN FONT LICENSE Version 1.1" in licence and "OTHER DEALINGS IN THE FONT SOFTWARE." in licence
    assert "Copyright 2013-2017 Google" in licence and "\n." not in licence
    assert "OFL-1.1.txt" in (made / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    assert json.loads((made / "classifier.json").read_text())["accuracy on fresh drawings"]["singles"] == 0.5
    prompts = [line for line in (made / "prompts.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(prompts) == 8 and all(parse(prompt).things for prompt in prompts)


@torch.no_grad()
def test_the_trainer_loads_it(made):
    """And its network does, of prompts that are padded to 77 tokens, what the training's narrow one does of few."""
    base = load_base(str(made))
    assert base.name == "sd3"
    prompts, noisy = ["a large fox on a blue background"], torch.randn(2, 16, 8, 8)
    condition = base.encode_prompts([*prompts, ""])
    ids = making.token_ids(base.tokenizers[0], prompts)
    expected = emoji_flow.flow_of(narrowed(base), noisy, torch.tensor([0.5, 0.5]), ids)
    whole = base.network(noisy, condition["hidden"], condition["pooled"], torch.tensor([500.0, 500.0])).sample
    torch.testing.assert_close(whole, expected)
    assert base.denoise(noisy, torch.tensor([500, 500]), condition).shape == expected.shape


def narrowed(base):
    """The parts of a base with the embedder that the training has."""
    narrow = emoji_flow.new_parts(base.tokenizers[0])
    for module, source in zip(narrow, [base.network, *base.text_encoders[:2]], strict=True):
        state = source.state_dict()
        if "context_embedder.weight" in state:
            state["context_embedder.weight"] = state["context_embedder.weight"][:, : 2 * emoji_flow.WIDTH]
        module.load_state_dict(state)
    return narrow.eval().requires_grad_(False)


def test_comfyui_finds_its_parts_in_one_file(made):
    """TAESD's blocks in each stage, and the transformer's keys and shapes as those of the demo's checkpoint."""
    mine, demo = load(checkpoint(made)), load(checkpoint())
    assert mine.keys() == demo.keys()
    assert {name: tensor.shape for name, tensor in mine.items()} == {name: t.shape for name, t in demo.items()}
    config = json.loads((made / "vae" / "config.json").read_text())
    scale = 1.5305 / config["scaling_factor"]
    assert mine["first_stage_model.vae_scale"].item() == pytest.approx(scale)
    assert mine["first_stage_model.vae_shift"].item() == pytest.approx(0.0609 - config["shift_factor"] / scale)


@pytest.mark.parametrize(("side", "guidance"), [(64, 1.0), (128, 4.0), (256, 1.0)])
def test_it_draws_any_size_up_to_256(made, side, guidance):
    base = load_base(str(made))
    trial = Trial.of(base, ["a fox", ""], seed=0, resolution=side)
    pictures = base.decode(trial.latents(Setting(TEACHER, 1, guidance), base))
    assert pictures.shape == (2, 3, side, side) and pictures.isfinite().all()
    assert pictures.min() >= 0 and pictures.max() <= 1


def test_most_captions_are_the_pictures_own():
    ids = torch.arange(1001)[:, None].expand(-1, 77)
    index = torch.arange(1000)
    drawn = emoji_flow.random_prompts(index, ids, 0.4, torch.Generator().manual_seed(0))[:, 0]
    assert 0.06 < (drawn == 1000).float().mean() < 0.14
    assert 0.50 < (drawn == index).float().mean() < 0.58
    assert (emoji_flow.random_prompts(index, ids, 0.0, torch.Generator().manual_seed(0))[:, 0] == index).sum() > 860


def test_times_cover_all_noise():
    times = emoji_flow.random_times(4000, torch.Generator().manual_seed(0))
    assert 0 < times.min() < 0.1 and 0.97 < times.max() < 1
    assert 0.55 < times.median() < 0.72


def test_rates_rise_and_fall():
    assert rate(0.0, 0) == 0.01 and rate(0.3, 500) == 1.0 and rate(1.0, 500) == pytest.approx(0, abs=1e-9)


def test_a_stage_by_the_clock_survives_a_restart(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("phased_consistency.trainer.tiny.resuming.time.monotonic", lambda: now[0])
    stage = Stage("stage", 10, minutes=2.0)
    now[0] += 30
    assert stage.share == 0.25
    again = Stage("stage", 10, minutes=2.0)
    again.go_on(stage.facts)
    now[0] += 60
    assert again.share == 0.75


def some(things, ground="white"):
    """A drawing of one thing, or of two side by side."""
    places = [(0.5, 0.8)] if len(things) == 1 else [(0.255, 0.48), (0.745, 0.48)]
    return EmojiScene(
        tuple(Spot(thing, x, 0.5, extent, 0.0) for thing, (x, extent) in zip(things, places, strict=True)),
        ground,
        "",
        "",
    )


def test_a_little_training_tells_drawings_apart(tmp_path, monkeypatch):
    """Singles and pairs of six things on two grounds, after sixty batches of 24; by chance a sixth, of pairs a 36th."""
    monkeypatch.setattr(emoji_classifier, "BATCH", 24)
    few = ("apple", "moon", "frog", "robot", "gem", "pumpkin")
    groups = [(thing,) for thing in few] + [(one, other) for one in few for other in few if one != other]
    scenes = [some(group, ground) for group in groups for ground in ("white", "blue")]
    pictures = draw_pictures(scenes)
    views = torch.nn.functional.avg_pool2d(pictures.float(), 2).to(torch.uint8)
    stage = Stage("classifier", 60)
    classifier = emoji_classifier.train_classifier(views, scenes, stage, tmp_path / "state.safetensors")
    meanings = [Meaning(tuple(spot.thing for spot in scene.spots)) for scene in scenes]
    met = agreement(classifier, scaled(pictures), meanings)
    pair = torch.tensor([len(meaning.things) == 2 for meaning in meanings])
    assert met[~pair].float().mean() > 0.5 and met[pair].float().mean() > 0.2
    others = [Meaning(("koala",) * len(meaning.things)) for meaning in meanings]
    assert not agreement(classifier, scaled(pictures), others).any()

    emoji_classifier.save_classifier(classifier, tmp_path, {"singles": 1.0})
    again = agreement(load_classifier(tmp_path), scaled(pictures), meanings)
    assert (again == met).float().mean() > 0.95


def test_a_prompt_that_names_nothing_is_always_met():
    assert agreement(Classifier().eval(), torch.zeros(2, 3, 64, 64), [Meaning(())] * 2).all()


def test_a_classifier_of_other_things_is_refused(made, tmp_path):
    facts = json.loads((made / "classifier.json").read_text())
    (tmp_path / "classifier.json").write_text(json.dumps(facts | {"things": ["wolf"]}))
    with pytest.raises(ValueError, match="trained on other things"):
        load_classifier(tmp_path)
