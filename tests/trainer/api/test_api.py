"""The Python surface does what the command line does, and says what a caller can mend."""

import inspect as introspect
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import phased_consistency
from phased_consistency import configure, edit, evaluate, inspect, load_base, load_lora, plan, sample, train
from phased_consistency.trainer.api import files
from phased_consistency.trainer.api.drawing import EDITS
from phased_consistency.trainer.cli import edit as verbs
from phased_consistency.trainer.config.load import load_config
from support.runs import TINY, settings, speck

PROMPTS = ["a red circle", "a blue square"]


def pixels(image):
    return np.asarray(image)


# --- the names


def test_every_name_is_there_and_is_documented(root):
    page = (root / "docs" / "python.md").read_text(encoding="utf-8")
    for name in phased_consistency.NAMES:
        assert introspect.getdoc(getattr(phased_consistency, name))
        assert f"`{name}`" in page
        assert name in dir(phased_consistency)


def test_an_unknown_name_is_an_attribute_error_with_those_that_there_are():
    with pytest.raises(AttributeError, match="no attribute 'trian'; it has .*train"):
        _ = phased_consistency.trian
    assert not hasattr(phased_consistency, "NODE_CLASS_MAPPINGS")  # which the host asks for


def test_names_are_looked_up_when_they_are_used():
    code = (
        "import sys, phased_consistency as p; heavy = {'torch', 'diffusers', 'peft', 'transformers'}\n"
        "print(sorted(heavy & {*sys.modules})); p.Recipe; print(sorted(heavy & {*sys.modules}))\n"
        "p.PCMScheduler; print(sorted({'diffusers', 'peft', 'pydantic', 'transformers'} & {*sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines() == ["[]", "['torch']", "['diffusers']"], run.stderr


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.configuration_utils", None)
    for module in [name for name in sys.modules if name.startswith("phased_consistency.trainer.inference.scheduler")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(
        ModuleNotFoundError, match=r'PCMScheduler needs diffusers.*pip install "phased-.*\[diffusers\]"'
    ):
        _ = phased_consistency.PCMScheduler


# --- drawing


@pytest.fixture(scope="module")
def base():
    return load_base(TINY)


def test_pictures_are_those_of_pcm_sample(base, lora, pcm, tmp_path):
    words = [f"--prompt={prompt}" for prompt in PROMPTS]
    result = pcm("sample", "--base", TINY, "--lora", lora, *words, "--resolution", 96, "--seed", 3, "--out", "a.png")
    assert result.code == 0, result.err
    grid = pixels(Image.open(tmp_path / "a.png"))

    drawn = sample(base, PROMPTS, lora=lora, seed=3, resolution=96)
    for picture in drawn:
        height, width = pixels(picture).shape[:2]
        windows = np.lib.stride_tricks.sliding_window_view(grid, (height, width, 3))[:, :, 0]
        assert (windows == pixels(picture)).all(axis=(2, 3, 4)).any()


def test_a_loaded_base_is_left_as_it_was(base, lora):
    before = sample(base, "a red circle", steps=2, resolution=32)
    with_lora = sample(base, "a red circle", steps=2, resolution=32, lora=lora, guidance=7.5)
    after = sample(base, "a red circle", steps=2, resolution=32)
    assert (pixels(before[0]) == pixels(after[0])).all() and (pixels(before[0]) != pixels(with_lora[0])).any()


def test_a_wrong_setting_is_a_warning(base, lora):
    with pytest.warns(UserWarning, match="This LoRA was made for 4 steps, not 3: set steps to 4."):
        sample(base, "a red circle", lora=lora, steps=3, resolution=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(base, "a red circle", lora=lora, resolution=32)


@pytest.mark.parametrize(
    ("kind", "options", "size"),
    [
        ("inpaint", {"mask": Image.new("L", (32, 32), 255)}, (32, 32)),
        ("outpaint", {"left": 16}, (48, 32)),
        ("colorize", {}, (32, 32)),
        ("upscale", {"factor": 2}, (64, 64)),
        ("stroke", {}, (32, 32)),
        ("denoise", {"noise": 20}, (32, 32)),
    ],
)
@pytest.mark.filterwarnings("ignore:The mask covers all")
def test_every_edit_has_its_size(kind, options, size, base):
    picture = Image.new("RGB", (32, 32), "blue")
    assert edit(kind, base, picture, "a red circle", steps=2, **options).size == size


def test_an_edit_is_that_of_pcm_edit(base, lora, pcm, tmp_path):
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "in.png")
    words = ["--base", TINY, "--lora", lora, "--image", "in.png", "--prompt", "a red circle", "--seed", 2]
    result = pcm("edit", "outpaint", *words, "--left", 16, "--out", "out.png")
    assert result.code == 0, result.err
    ours = edit("outpaint", base, tmp_path / "in.png", "a red circle", lora=lora, seed=2, left=16)
    assert (pixels(ours) == pixels(Image.open(tmp_path / "out.png"))).all()


@pytest.mark.parametrize("kind", EDITS)
def test_defaults_are_those_of_the_verbs(kind):
    prepare, amount = EDITS[kind]
    verb = introspect.signature(getattr(verbs, kind)).parameters
    for name, parameter in list(introspect.signature(prepare).parameters.items())[1:]:
        assert parameter.default == verb[name].default, name
    assert amount == (verb["denoise"].default if "denoise" in verb else None)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda base: edit("colourise", base, Image.new("RGB", (8, 8))), "no edit 'colourise'; available: inpaint, "),
        (lambda base: edit("upscale", base, Image.new("RGB", (8, 8)), grow=3), "upscale takes no grow; .*: factor"),
        (lambda base: edit("denoise", base, Image.new("RGB", (8, 8)), denoise=0.5), "takes no denoise"),
        (lambda base: edit("denoise", base, Image.new("RGB", (8, 8)), noise=300), "noise is 300; "),
        (lambda base: sample(base, "a", strength=2.0), "strength is 2, and there is no lora"),
        (lambda base: sample(base, "a", steps=2000), "steps must be between 1 and 1000"),
        (lambda base: configure(preset="sd15-4stp"), "Unknown preset 'sd15-4stp'. Did you mean"),
        (lambda base: configure(preset="demo", settings={"train.step": 3}), "train.step: unknown key. Did you mean"),
    ],
)
def test_bad_input_is_a_sentence(call, words, base):
    with pytest.raises(ValueError, match=words):
        call(base)


def test_a_file_that_is_not_there_is_named(base):
    with pytest.raises(FileNotFoundError, match=r"no-such\.safetensors"):
        sample(base, "a", lora="no-such.safetensors")


# --- runs and files


def test_settings_are_laid_over_a_preset_as_on_the_command_line(tmp_path):
    ours = configure(preset="demo", settings={"output": tmp_path, "train.steps": 7, "objective.guidance": (3, 4)})
    theirs = load_config(None, [f"output={tmp_path}", "train.steps=7", "objective.guidance=[3, 4]"], "demo")
    assert ours == theirs


def test_a_run_tells_its_progress(tmp_path, capfd):
    config = configure(settings=dict(row.split("=", 1) for row in settings(tmp_path / "run")) | small())
    events = []
    lora = train(config, progress=events.append)
    updates = [event for event in events if event.what == "training"]
    assert [event.done for event in updates] == [1, 2] and updates[-1].total == 2
    assert updates[-1].status.loss > 0 and "update 2 of 2: loss" in updates[-1].text
    assert {"note", "caching prompts", "loading the base"} <= {event.what for event in events}
    assert capfd.readouterr() == ("", "")

    assert inspect(lora)["recipe"]["phases"] == load_lora(lora).recipe.phases
    assert json.dumps(inspect(str(lora)))


def small():
    """The settings of a small run whose values are no texts."""
    return {
        "train.steps": 2,
        "train.save_every": 2,
        "data.count": 6,
        "data.teacher_steps": 4,
        "data.teacher_guidance": 3,
        "data.resolution": 32,
        "data.batch_size": 3,
        "lora.rank": 4,
        "lora.alpha": 2,
        "objective.guidance": [3, 4],
        "train.batch_size": 3,
        "train.lr": 1e-2,
        "train.trackers": [],
        "train.report": False,
        "preview.every": 0,
        "validation.every": 0,
    }


def test_a_plan_is_what_the_dry_run_says(tmp_path):
    config = configure(settings={"base.path": speck().name, "output": tmp_path / "run", **small()})
    assert plan(config)["trained_parameters"] > 0
    assert not (tmp_path / "run").exists()


def test_an_evaluation_hands_on_its_lines_and_options(tmp_path, monkeypatch):
    """The report itself: tests/trainer/evaluation."""
    calls, lines = [], []

    def compare(*arguments, say, **options):
        say("a line")
        calls.append((arguments, options))
        return {"rows": []}

    monkeypatch.setattr(files, "compare", compare)
    assert evaluate(TINY, "a.safetensors", tmp_path, pictures=4, progress=lines.append) == {"rows": []}
    evaluate(TINY, ["a.safetensors", "b.safetensors"], str(tmp_path), steps=(4,))
    assert calls == [
        ((TINY, [Path("a.safetensors")], tmp_path), {"steps": [1, 2, 4, 8], "pictures": 4}),
        ((TINY, [Path("a.safetensors"), Path("b.safetensors")], tmp_path), {"steps": [4]}),
    ]
    assert [(line.what, line.text) for line in lines] == [("evaluating", "a line")]
