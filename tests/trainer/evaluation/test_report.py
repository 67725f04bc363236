"""`pcm evaluate`, whole: what it writes, what it measures, and what it says of input that it cannot use."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from phased_consistency.samplers import Recipe
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.trainer.evaluation import contest
from phased_consistency.trainer.evaluation import report as reporting
from phased_consistency.trainer.evaluation.contestants import (
    choose_prompts,
    find_contestants,
    teacher_guidance,
    teacher_settings,
    tells_most,
    unique_names,
)
from phased_consistency.trainer.evaluation.features import (
    INCEPTION,
    Absent,
    ClipScore,
    clip_pixels,
    clip_vision,
    find_features,
)
from phased_consistency.trainer.pictures import to_image
from phased_consistency.trainer.tiny.bundled import bundled_folder, own_prompts
from phased_consistency.trainer.tiny.languages import language_of
from phased_consistency.trainer.training.loop import train
from support.runs import TINY, small_config, speck

CPU = torch.device("cpu")
SMALL = ("--steps", "1", "--pictures", "4", "--resolution", "32")
LINES = "a red star on a blue background\na green ring on a white background\na pink moon on a black background\n"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A reference of 4 steps, a sweep of two scales and plots of few pixels, which take seconds."""
    monkeypatch.setattr(reporting, "REFERENCE_STEPS", 4)
    monkeypatch.setattr(reporting.plots, "DPI", 60)
    monkeypatch.setattr(contest, "SWEEP", (1.0, 3.0))


@pytest.fixture(scope="session")
def lora(tmp_path_factory):
    """One of a smaller base than the other tests' is, since a report draws a hundred times."""
    return train(small_config(tmp_path_factory.mktemp("evaluated") / "run"))


@pytest.fixture
def without_plots(monkeypatch):
    """matplotlib takes longer than the tiny base."""
    monkeypatch.setattr(reporting.plots, "draw", lambda report, out: None)


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text(LINES)
    return tmp_path / "prompts.txt"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP with random weights, and the tiny base's words."""
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    words = CLIPTokenizer.from_pretrained(bundled_folder(TINY) / "tokenizer")
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "projection_dim": 8, **sizes}
    vision = {"image_size": 28, "patch_size": 14, "projection_dim": 8, **sizes}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    with torch.no_grad():
        ids = words("a red star", return_tensors="pt").input_ids
        score = model(input_ids=ids, pixel_values=torch.zeros(1, 3, 28, 28)).logits_per_image
        model.text_projection.weight.mul_(score.sign().item())  # to the side on which scores are above 0
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_the_whole_verb(pcm, lora, prompts, clip, without_plots, tmp_path):
    out = tmp_path / "report"
    options = ("--prompts", prompts, "--features", "latents", "--features", clip, "--clip", clip, "--out", out)
    small = ("--steps", "4,1", "--pictures", "4", "--resolution", "32", "--json")
    run = pcm("evaluate", "--base", speck().name, "--lora", lora, *small, *options)
    assert run.code == 0, run.err
    report = json.loads(run.out)
    assert report == json.loads((out / "report.json").read_text())
    rows = {(r["who"], r["steps"], r["guidance"]): r for r in report["rows"]}
    ours = {key[1:]: row for key, row in rows.items() if key[0] == lora.stem}
    assert set(ours) == {(1, 1.0), (4, 1.0)} and ours[4, 1.0]["evaluations"] == 4
    solvers = ("DDIM", "Euler", "DPM-Solver++(2M)")
    assert {key for key, row in rows.items() if row["guidance"] == 3.5 and row["evaluations"] == 4} == {
        (f"teacher, {solver}", 2, 3.5) for solver in solvers
    }, "the teacher's CFG is the middle of what the LoRA was distilled under, and costs two a step"
    assert report["reference"]["guidance"] == 3.5 and report["reference"]["evaluations"] == 8
    reference = report["rows"][0]
    assert reference["paired_error"]["value"] == 0 < ours[4, 1.0]["paired_error"]["low"]
    assert report["features"] == {"latents": 4 * 4 * 4, "tiny-clip": 8} and report["resolution"] == 32
    assert all(0 <= row["clip_score"]["value"] <= 100 for row in report["rows"])
    figures = [f for row in report["rows"] for f in (row["paired_error"], *every_figure(row))]
    assert len(figures) == len(report["rows"]) * (1 + 2 * 6)
    assert all(f["low"] <= f["value"] <= f["high"] for f in figures)
    assert all(space["diversity_share"]["value"] == 1 for space in reference["spaces"].values())
    assert report["prompts"]["different"] == 3 and report["prompts"]["source"] == "prompts.txt"
    assert report["consistency"][lora.stem]["1"]["4"]["low"] > 0
    assert report["left_out"] == []
    assert [point["guidance"] for point in report["guidance"][0]["sweep"]] == [1.0, 2.0, 3.0]
    assert report["guidance"][0]["negative_prompt"]["change"]["low"] > 0
    text = (out / "report.md").read_text()
    assert text.count(f"| {lora.stem} | 4 | 1 | 4 |") == text.count(f"| untrained, as {lora.stem} | 4 | 1 | 4 |") == 3
    assert "seed 0, from 3 prompts: prompts.txt" in text


def test_its_plots_and_pictures(pcm, lora, prompts, tmp_path):
    out = tmp_path / "report"
    options = ("--prompts", prompts, "--features", "latents", "--steps", "2,1", "--pictures", "4", "--resolution", "32")
    run = pcm("evaluate", "--base", speck().name, "--lora", lora, *options, "--out", out)
    assert run.code == 0, run.err
    text = (out / "report.md").read_text()
    for name in ("quality.png", "consistency.png", "guidance.png", "grid.png"):
        assert f"]({name})" in text
        with Image.open(out / name) as picture:
            assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(10**6)) > 20


def every_figure(row):
    return [figure for space in row["spaces"].values() for figure in space.values()]


def test_the_same_again_is_the_same(pcm, lora, prompts, tmp_path, without_plots):
    def report(name, seed=0):
        options = (*SMALL, "--prompts", prompts, "--seed", seed)
        assert pcm("evaluate", "--base", speck().name, "--lora", lora, *options, "--out", tmp_path / name).code == 0
        return (tmp_path / name / "report.json").read_bytes()

    assert report("once") == report("again") != report("seed", 1)


def test_a_report_whose_settings_all_cost_as_much_as_its_reference(pcm, lora, tmp_path, monkeypatch):
    """They are drawn, and the figures are written before any plot can fail."""

    def fail(report, out):
        raise RuntimeError("no plots")

    monkeypatch.setattr(reporting.plots, "draw", fail)
    options = ("--guidance", "1", "--steps", "4", "--features", "latents", "--out", tmp_path / "r")
    run = pcm("evaluate", "--base", speck().name, "--lora", lora, *SMALL[2:], *options)
    assert run.code == 1 and "no plots" in run.err and (tmp_path / "r" / "report.md").exists()
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert {row["evaluations"] for row in report["rows"]} == {4} == {report["reference"]["evaluations"]}
    panel = reporting.plots._quality(report, {lora.stem: "C0"}).axes[0]
    assert {bars.get_label() for bars in panel.containers} == {
        row["who"] + ", CFG 1" * (row["name"] == "teacher") for row in report["rows"][1:]
    }


def test_metrics_that_are_absent_are_named_and_the_rest_is_made(pcm, lora, tmp_path, monkeypatch, without_plots):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("phased_consistency.trainer.evaluation.features.find_spec", lambda name: True)
    options = ("--features", tmp_path / "gone", "--features", "inception", "--features", "latents")
    options += ("--clip", tmp_path / "missing", "--out", tmp_path / "r")
    run = pcm("evaluate", "--base", speck().name, "--lora", lora, *SMALL, *options)
    assert run.code == 0, run.err
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert list(report["features"]) == ["latents"] and report["rows"][1]["spaces"]["latents"]["frechet"]["low"] > 0
    gone, inception, score = report["left_out"]
    assert gone == (
        f"Features {tmp_path / 'gone'}: no folder at {tmp_path / 'gone'}. "
        "Give one with a CLIP model's config.json and model.safetensors."
    )
    assert f"Features inception: no weights at {tmp_path / 'hub' / 'checkpoints' / INCEPTION}. Put" in inception
    assert score.startswith(f"CLIP score: no folder at {tmp_path / 'missing'}")
    text = (tmp_path / "r" / "report.md").read_text()
    assert "## Left out" in text and all(line in text and f"Left out. {line}" in run.err for line in report["left_out"])


def test_every_asked_space_absent_still_makes_the_rest(pcm, lora, tmp_path):
    options = ("--features", tmp_path / "gone", "--out", tmp_path / "r")
    assert pcm("evaluate", "--base", speck().name, "--lora", lora, *SMALL, *options).code == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["features"] == {} and report["rows"][1]["paired_error"]["low"] > 0 and report["left_out"]


def test_spaces_of_one_name_are_told_apart(clip, tmp_path):
    second = tmp_path / clip.name
    CLIPVisionModelWithProjection.from_pretrained(clip).save_pretrained(second)
    spaces, _ = find_features([str(clip), "pixels", str(second)], CPU)
    assert [space.name for space in spaces] == ["tiny-clip", "pixels", "tiny-clip (2)"]


def test_names_are_never_given_twice():
    assert unique_names(["a", "b", "a (2)", "a", "a"], reserved=["b"]) == ["a", "b (2)", "a (2)", "a (3)", "a (4)"]


def test_torchmetrics_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("phased_consistency.trainer.evaluation.features.find_spec", lambda name: None)
    spaces, left_out = find_features(["inception", "pixels"], CPU)
    assert [space.name for space in spaces] == ["pixels"]
    assert "torchmetrics and torch-fidelity not installed" in left_out[0]


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """Bad input is found before any long work."""

    def load(*_, **__):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(reporting, "load_for_sample", load)


def evaluate(fails, tmp_path, lora_file, **changes):
    options = {"base": TINY, "lora": lora_file, "out": tmp_path / "r"} | changes
    return fails(2, "evaluate", *(part for key, value in options.items() for part in (f"--{key}", value)))


def test_a_lora_of_another_family(fails, lora, tmp_path, nothing_is_loaded):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.zeros(4, 2048), f"{name}.lora_up.weight": torch.zeros(64, 4)}
    save_file(tensors, tmp_path / "sdxl.safetensors")
    message = evaluate(fails, tmp_path, tmp_path / "sdxl.safetensors")
    assert "sdxl.safetensors is a LoRA for SDXL, the base is SD1.5. Use a matching pair." in message
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts. Write one a line."),
        (b"# only a comment\n\n", "holds no prompts. Write one a line."),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "is no text in UTF-8. Write a text file with one prompt a line."),
        (bytes(64), "is no text in UTF-8."),
    ],
)
def test_prompt_files_that_hold_none(fails, lora, tmp_path, nothing_is_loaded, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    assert f"bad.txt {message}" in evaluate(fails, tmp_path, lora, prompts=tmp_path / "bad.txt")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("prompts", "gone.txt", "No prompt file at gone.txt"),
        ("steps", "two", "--steps is 'two'; write numbers with commas"),
        ("steps", "1,41", "steps must be between 1 and 40"),
        ("pictures", "3", "--pictures is 3; a report compares sets, so make it at least 4"),
        ("guidance", "0.5", "--guidance is 0.5; the teacher's CFG scale is 1 (none) or more"),
        ("features", "lattents", "--features is 'lattents'; available: latents, pixels, inception, or the folder"),
        ("lora", "gone.safetensors", "No file at gone.safetensors"),
        ("base", "nowhere", "No base at nowhere"),
    ],
)
def test_bad_options(fails, lora, tmp_path, nothing_is_loaded, option, value, message):
    assert message in evaluate(fails, tmp_path, lora, **{option: value})


def test_an_out_that_is_a_file(fails, lora, tmp_path, nothing_is_loaded):
    (tmp_path / "r").write_text("mine")
    assert f"--out is {tmp_path / 'r'}, which is a file. Give a folder." in evaluate(fails, tmp_path, lora)
    assert (tmp_path / "r").read_text() == "mine"


def test_a_lora_that_does_not_fit_is_found_before_sampling(fails, lora, tmp_path):
    renamed = {k.replace("mid_block_resnets_0", "mid_block_resnets_7"): v for k, v in load_file(lora).items()}
    save_file(renamed, tmp_path / "other.safetensors")
    message = evaluate(fails, tmp_path, tmp_path / "other.safetensors")
    assert "other.safetensors: " in message and "It was made for another model." in message


def copy(lora, path, **recipe):
    header = {HEADER_KEY: Recipe(family="sd15", **recipe).to_header()} if recipe else {}
    save_file(load_file(lora), path, header)
    return path


def test_loras_that_read_the_base_differently(lora, tmp_path):
    v = copy(lora, tmp_path / "v.safetensors", prediction="v_prediction")
    with pytest.raises(ValueError, match=rf"different ways \({lora.stem}: epsilon; v: v_prediction\)\. Make a report"):
        find_contestants([lora, v], "sd15", [4])
    snr = copy(lora, tmp_path / "snr.safetensors", prediction="v_prediction", zero_terminal_snr=True)
    with pytest.raises(ValueError, match=r"\(v: no zero terminal SNR; snr: zero terminal SNR\)"):
        find_contestants([v, snr], "sd15", [4])


def test_a_known_file_says_epsilon_by_default_alone(lora, tmp_path, monkeypatch):
    """Beside a v-prediction LoRA it is no contradiction, and the base is loaded by the one that tells."""
    plain, known = copy(lora, tmp_path / "mine.safetensors"), copy(lora, tmp_path / "lcm-lora-sdv1-5.safetensors")
    v = copy(lora, tmp_path / "v.safetensors", prediction="v_prediction")
    contestants = find_contestants([plain, known, v], "sd15", [4])
    assert [c.recipe and c.recipe.source for c in contestants] == [None, "known file", "header"]
    assert tells_most(contestants[:1]).file == plain and tells_most(contestants[:2]).file == known
    loaded = []
    monkeypatch.setattr(reporting, "load_for_sample", lambda base, dtype, lora, **_: loaded.append(lora) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reporting.evaluate(TINY, [plain, known, v], tmp_path / "r", steps=[4], pictures=4, features=["latents"])
    assert loaded == [v]


def test_known_files_of_other_shifts(tmp_path):
    """Their shift is theirs, by header or not."""
    tensors = {f"transformer.pos_embed.proj.lora_{part}.weight": torch.zeros(1, 1, 1, 1) for part in "AB"}
    names = ("pcm_deterministic_4step_shift1", "pcm_deterministic_4step_shift3")
    files = [tmp_path / f"{name}.safetensors" for name in names]
    for file in files:
        save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{names[0]}: shift 1; {names[1]}: shift 3"):
        find_contestants(files, "sd3", [4])


def test_a_lora_without_a_recipe_and_one_with_cfg(pcm, lora, tmp_path, without_plots):
    """Names that are the same are told apart; each is sampled by its own recipe, and the reader is told."""
    (tmp_path / "a").mkdir()
    plain = copy(lora, tmp_path / "mine.safetensors")
    cfg = {"guidance_mode": "normalcfg", "guidance": 3.0, "guidance_max": 6.0, "negative_prompts": True}
    normal = copy(lora, tmp_path / "a" / "mine.safetensors", **cfg)
    options = ("--guidance", "4", "--features", "latents", "--out", tmp_path / "r", *SMALL)
    run = pcm("evaluate", "--base", speck().name, "--lora", plain, "--lora", normal, *options)
    assert run.code == 0, run.err
    assert "mine has no recipe in its header, and is no known file" in run.err
    assert "mine (2) is sampled at its own CFG 3, the reference at 4" in run.err
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    rows = [(r["who"], r["guidance"], r["evaluations"]) for r in report["rows"] if r["name"] != "teacher"]
    bare = [("untrained, as mine", 1.0, 1), ("untrained, as mine (2)", 3.0, 2)]
    assert rows == [("mine", 1.0, 1), bare[0], ("mine (2)", 3.0, 2), bare[1]]
    assert [g["negative_prompt"]["guidance"] for g in report["guidance"]] == [2.0, 3.0]
    panel = reporting.plots._quality(report, {"mine": "C0", "mine (2)": "C1"}).axes[0]
    colours = {bars.get_label(): bars[0].get_color() for bars in panel.containers}
    assert colours["untrained, as mine (2)"] == "C1"
    assert (colours["mine"], colours["mine (2)"]) == ("C0", "C1") and colours["teacher, Euler"].startswith("0.")
    assert teacher_guidance(find_contestants([plain, normal], "sd15", [2]), TINY) == 3.0
    assert teacher_guidance(find_contestants([plain], "sd15", [2]), TINY) == 4.0
    assert teacher_guidance(find_contestants([plain], "sd15", [2]), "some/base") == 7.5


def test_the_teacher_costs_no_more_than_the_lora():
    settings = teacher_settings({1, 5, 8}, 4.0)
    assert [(s.solver, s.steps) for s in settings if s.guidance == 4] == [
        (solver, steps) for steps in (2, 4) for solver in ("ddim", "euler", "dpm++")
    ]
    assert [(s.steps, s.evaluations) for s in settings if s.guidance == 1] == [(1, 1), (5, 5), (8, 8)]
    assert len(teacher_settings({2}, 1.0)) == 3, "an unguided teacher is its own unguided baseline"


def test_prompts_of_a_bundled_base_are_held_out():
    chosen = choose_prompts(None, TINY, 20)
    with open(own_prompts(TINY), encoding="utf-8") as file:
        assert not set(chosen.texts) & {line.strip() for line in file}
    assert len(chosen.texts) == 20 and chosen.language is language_of(TINY) and "held-out captions" in chosen.source
    default = choose_prompts(None, "some/base", 3)
    assert len(default.texts) == 3 and default.language is None and "default list" in default.source


def test_fewer_prompts_than_pictures_are_repeated(prompts):
    chosen = choose_prompts(str(prompts), TINY, 7)
    assert len(chosen.texts) == 7 and chosen.texts[3:6] == chosen.texts[:3] and chosen.as_dict()["different"] == 3


@pytest.fixture
def pictures():
    """Smooth ones, of which any resizing makes about the same."""
    return torch.nn.functional.interpolate(torch.rand(3, 3, 4, 4), (64, 64), mode="bicubic").clamp(0, 1)


def test_clip_score_is_transformers_own(clip, pictures):
    prompts = LINES.splitlines()
    model, words = CLIPModel.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip)
    side = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    inputs = CLIPImageProcessor(**side)([to_image(p) for p in pictures], return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs, **words(prompts, padding=True, return_tensors="pt"))
    expected = output.logits_per_image.diagonal() / model.logit_scale.exp() * 100
    scores = ClipScore(clip, CPU)(pictures, prompts)
    assert torch.allclose(scores, expected.clamp(min=0), atol=0.5) and scores.max() > 1
    assert ClipScore(clip, CPU)(pictures, ["a red star " * 99] * 3).isfinite().all(), "long prompts are cut"


def test_clip_features_of_a_whole_clip_and_of_its_vision_tower(clip, pictures, tmp_path):
    CLIPVisionModelWithProjection.from_pretrained(clip).save_pretrained(tmp_path / "vision")
    whole, tower = (clip_vision(folder, CPU) for folder in (clip, tmp_path / "vision"))
    assert (whole.name, tower.name) == ("tiny-clip", "vision")
    features = whole.of(None, pictures)
    assert features.shape == (3, 8) and torch.equal(features, tower.of(None, pictures))
    with torch.no_grad():
        projected = CLIPModel.from_pretrained(clip)(
            pixel_values=clip_pixels(pictures, 28), input_ids=torch.zeros(1, 2, dtype=torch.long)
        ).image_embeds
    assert torch.allclose(torch.nn.functional.normalize(features), projected, atol=1e-5)


def test_folders_that_hold_no_clip(clip, tmp_path):
    with pytest.raises(Absent, match="holds no CLIP that can be loaded"):
        clip_vision(tmp_path, CPU)
    CLIPVisionModelWithProjection.from_pretrained(clip).save_pretrained(tmp_path / "vision")
    with pytest.raises(Absent, match=r"vision lacks \d+ of the weights of a CLIPModel|no CLIP that can be loaded"):
        ClipScore(tmp_path / "vision", CPU)
    CLIPModel.from_pretrained(clip).save_pretrained(tmp_path / "wordless")
    with pytest.raises(Absent, match="no tokenizer in .*wordless"):
        ClipScore(tmp_path / "wordless", CPU)
