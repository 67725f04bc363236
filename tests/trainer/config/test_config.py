"""The configuration: what overrides what, and that every mistake is named at once with what would be right."""

import json
import re

import pytest

from phased_consistency.trainer.config.config import Config
from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.config.presets import PRESETS
from phased_consistency.trainer.objectives import OBJECTIVES

BASE = "base.path=a-base"


@pytest.fixture
def toml(tmp_path):
    """Write a TOML file and return its path."""

    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def problems(*overrides, file=None, preset=None):
    with pytest.raises(ValueError) as raised:
        load_config(file, list(overrides), preset)
    return str(raised.value)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.step=5", "train.step: unknown key. Did you mean 'steps'?"),
        ("lora.rnak=8", "lora.rnak: unknown key. Did you mean 'rank'?"),
        ("trian.steps=5", "trian: unknown key. Did you mean 'train'?"),
        ("nmae=x", "nmae: unknown key. Did you mean 'name'?"),
        ("data.zebra=1", "data.zebra: unknown key. Known here: images, shards, prompts, count"),
    ],
)
def test_unknown_keys_name_the_nearest(key, near):
    assert near in problems(BASE, key)


def test_every_problem_is_listed_at_once():
    text = problems("train.stpes=1", "train.lr=-1", "lora.rank=0", "objective.points=30", "base.dtype=int4")
    assert text.startswith("The configuration has 6 problems:")
    for part in (
        "base.path: is required; diffusers folder",
        "base.dtype = 'int4': input should be 'fp32', 'bf16' or 'fp16'",
        "train.stpes: unknown key",
        "train.lr = -1: input should be greater than 0",
        "lora.rank = 0: input should be greater than or equal to 1",
        "points = 30 does not divide 1000",
    ):
        assert part in text
    assert len(text.splitlines()) == 7


def test_a_base_is_required():
    assert "1 problem:\n  base.path: is required" in problems()


@pytest.mark.parametrize(
    ("guidance", "complaint"),
    [
        ("[6, 5]", r"1 <= low <= high; got [6, 5]"),
        ("[0.5, 2]", r"1 <= low <= high; got [0.5, 2]"),
        ("[5]", "objective.guidance.1: is required; objective.guidance has more entries"),
        ("5", "objective.guidance = 5: input should be a valid tuple"),
        ("[5, inf]", "objective.guidance.1 = inf: input should be a finite number"),
    ],
)
def test_guidance_is_a_range(guidance, complaint):
    assert complaint in problems(BASE, f"objective.guidance={guidance}")


def test_points_must_divide_the_ticks():
    assert "points = 30 does not divide 1000" in problems(BASE, "objective.points=30")
    assert "Nearest that do: 20, 25, 40" in problems(BASE, "objective.points=30")
    assert "phases must be between 1 and points = 40; got 41" in problems(BASE, "objective.phases=41")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.lr=1e-4", 1e-4),
        ("train.steps=20", 20),
        ("train.gradient_checkpointing=true", True),
        ("preview.steps=[1, 2]", (1, 2)),
        ('preview.prompts=["a cat", "a dog"]', ("a cat", "a dog")),
        ("train.trackers=wandb", ("wandb",)),
        ("train.trackers=[]", ()),
        ("objective.guidance=[2, 3.5]", (2.0, 3.5)),
        ("data.images=/some where/with spaces", "/some where/with spaces"),
        (r"data.images=C:\pictures\new", r"C:\pictures\new"),
        ("base.path='quoted'", "quoted"),
        ("output=runs/a=b", "runs/a=b"),
        ("output=2026-01-31", "2026-01-31"),
        ("name=plain", "plain"),
        (" name = spaced", "spaced"),
    ],
)
def test_overrides_need_no_quotes(override, value):
    config = load_config(overrides=[BASE, override])
    for key in override.partition("=")[0].strip().split("."):
        config = getattr(config, key)
    assert config == value and type(config) is type(value)


def test_overrides_that_cannot_be_read():
    assert "Cannot read the override 'train.steps': write key=value, for example" in problems(BASE, "train.steps")
    assert "Cannot set train.lr.fast: lr is a value" in problems(BASE, "train.lr=1", "train.lr.fast=2")
    assert "base = 'a-base': input should be a valid dictionary" in problems("base=a-base")


def test_preset_then_file_then_override(toml):
    file = toml("[train]\nsteps = 7\nlr = 3e-3\n[base]\npath = 'mine'")
    preset = PRESETS["sd15-4step"].values
    config = load_config(file, ["train.lr=4e-3"], "sd15-4step")
    assert (config.train.lr, config.train.steps, config.base.path) == (4e-3, 7, "mine")
    assert config.train.batch_size == preset["train"]["batch_size"] and config.base.dtype == preset["base"]["dtype"]
    assert config.train.accumulation == 1


def test_a_file_may_name_its_preset(toml):
    file = toml("preset = 'sd15-2step'\n[lora]\nrank = 8")
    config = load_config(file)
    assert (config.objective.phases, config.lora.rank) == (2, 8)
    assert load_config(file, preset="sd15-8step").objective.phases == 8, "the command line's preset goes before it"


def test_presets_are_not_changed_by_use():
    before = json.dumps({name: p.values for name, p in PRESETS.items()})
    load_config(overrides=["train.lr=1", "base.path=b", "objective.phases=1"], preset="sd15-4step")
    assert json.dumps({name: p.values for name, p in PRESETS.items()}) == before


def test_the_old_name_of_trackers_is_told():
    assert "train.tensorboard: is train.trackers now, a list" in problems(BASE, "train.tensorboard=false")
    assert "train.trackers.0 = 'mlflow': input should be 'tensorboard', 'wandb' or 'trackio'" in problems(
        BASE, "train.trackers=mlflow"
    )


def test_a_config_remembers_its_preset():
    assert load_config(overrides=[BASE]).preset is None
    assert load_config(overrides=["train.steps=3"], preset="demo").preset == "demo"


def test_settings_for_others_have_no_places(tmp_path):
    shareable = load_config(overrides=[f"base.path={tmp_path / 'mine.safetensors'}", f"output={tmp_path}"]).for_others()
    assert str(tmp_path) not in json.dumps(shareable) and shareable["base"]["path"] == "mine.safetensors"
    assert shareable["preview"]["steps"] == [1, 2, 4, 8] and shareable["validation"]["every"] == 500


def test_unknown_presets_name_the_nearest(toml):
    message = f"Unknown preset 'sd15-4steps'. Did you mean 'sd15-4step'? `pcm presets` lists all {len(PRESETS)}."
    assert problems(preset="sd15-4steps") == message
    assert "Unknown preset 4." in problems(file=toml("preset = 4"))


def test_files_that_cannot_be_read(toml, tmp_path):
    assert "is not valid TOML: " in problems(file=toml("[train\nsteps = 1"))
    assert "No config file at gone.toml. Write one (pcm train --preset NAME --write-config gone.toml), or" in problems(
        file="gone.toml"
    )
    latin = tmp_path / "latin.toml"
    latin.write_bytes("name = 'färg'".encode("latin-1"))
    assert "is not valid TOML: " in problems(file=str(latin))


def test_a_byte_order_mark_does_no_harm(tmp_path):
    path = tmp_path / "notepad.toml"
    path.write_bytes(b"\xef\xbb\xbf[base]\r\npath = 'x'\r\n")
    assert load_config(str(path)).base.path == "x"


def test_a_date_in_a_file_is_a_problem_like_any_other(toml):
    assert "train.seed = datetime.date(2026, 1, 31): " in problems(BASE, file=toml("[train]\nseed = 2026-01-31"))


def test_names_that_are_no_file_names():
    assert "name = '../up' is no file's name for every system" in problems(BASE, "name=../up")


def test_a_configuration_does_not_change():
    config = load_config(overrides=[BASE])
    with pytest.raises(ValueError, match="frozen"):
        config.train.lr = 1


def test_what_decides_the_weights_holds_no_place_on_this_machine():
    places = ("base.path", "base.tokenizer", "base.config", "data.images", "data.prompts", "data.cache", "output")
    config = load_config(overrides=[f"{key}=/home/someone/{key}" for key in places])
    text = json.dumps(config.what_decides_the_weights())
    assert "someone" not in text
    assert config.what_decides_the_weights()["base"]["path"] == "base.path"


def test_what_a_run_only_shows_does_not_decide_the_weights():
    def decided(*overrides):
        return load_config(overrides=[BASE, *overrides]).what_decides_the_weights()

    for sentence in (
        "preview.every=3",
        "train.save_every=3",
        "train.trackers=[]",
        "train.report=false",
        "train.keep_checkpoints=5",
        "validation.every=7",
        "validation.steps=[1]",
        "validation.teacher_steps=9",
        "validation.best=false",
        "output=o",
    ):
        assert decided(sentence) == decided(), sentence
    weights = ("train.seed=1", "train.steps=9", "lora.rank=2", "train.ema=0.5", "base.dtype=fp32")
    for decides in (*weights, "data.count=4", "validation.count=4"):
        assert decided(decides) != decided(), decides


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_says_where_it_comes_from(name):
    config = load_config(preset=name)
    assert config.grid().plan().steps == config.grid().phases
    assert PRESETS[name].source and PRESETS[name].cost
    assert config.data.resolution % 64 == 0 or name == "digits"


MATCHED = [("dmd", 1), ("dmd", 4), ("tdm", 2), ("tdm", 4)]


def test_the_presets_are_what_they_are_named():
    kinds = ["stochastic", "stochastic-adv", "4step-normalcfg", "8step-normalcfg"]
    kinds += [f"{n}step{more}" for n in (1, 2, 4, 8) for more in ("", "-adv")]
    families = "sd15", "sdxl", "sd3"
    pcm = {f"{family}-{kind}" for family in families for kind in kinds}
    relatives = {f"{name}-{family}" for family in families for name in set(OBJECTIVES) - {"pcm", "dmd", "tdm"}}
    refined = {f"refine-{family}" for family in families}
    matching = {(f"{family}-{n}step-{name}", family, name, n) for family in families for name, n in MATCHED}
    others = {"demo", "demo-1step", "demo-2step", "demo-sd15", "digits", "lcf-demo", "tdm-demo"}
    assert set(PRESETS) == pcm | relatives | refined | {row[0] for row in matching} | others
    for preset, family, name, steps in matching:
        config = load_config(preset=preset)
        assert (config.name, config.base.family) == (f"{name}-{family}-{steps}step", family)
        assert (config.objective.name, config.objective.jumps) == (name, steps)
    for name in relatives:
        config, (objective, family) = load_config(preset=name), name.split("-")
        assert (config.name, config.base.family, config.objective.name) == (name, family, objective)
    for name in pcm:
        config = load_config(preset=name)
        family, kind = name.split("-", 1)
        assert (config.name, config.base.family) == (f"pcm-{name}", family)
        stochastic = kind.startswith("stochastic")
        assert config.objective.phases == (1 if stochastic else int(kind[0]))
        assert config.objective.mode == ("stochastic" if stochastic else "deterministic")
        assert config.objective.guidance_mode == ("normalcfg" if "normalcfg" in kind else "smallcfg")
        assert (config.adversarial.weight > 0) == kind.endswith("-adv")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "stochastic", "phases": 4}, "Set objective.phases=1, or objective.mode=deterministic"),
        ({"min_alpha": 0.5, "phases": 2}, "min_alpha is for one phase; got 0.5 with phases = 2"),
        ({"phases": 64}, "phases must be between 1 and points = 40; got 64"),
        ({"points": 48}, "points = 48 does not divide 1000"),
        ({"guidance_mode": "bigcfg"}, "objective.guidance_mode = 'bigcfg': input should be 'smallcfg' or 'normalcfg'"),
    ],
)
def test_choices_that_exclude_each_other(settings, message):
    overrides = [f"objective.{k}={v}" for k, v in settings.items()]
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(overrides=["base.path=x", *overrides])


def test_a_preset_of_another_objective_keeps_its_familys_guidance():
    assert load_config(preset="cd-sdxl").objective.guidance == (7, 8)
    assert load_config(preset="ctm-sdxl").objective.guidance == (7, 8)


def test_a_change_of_objective_keeps_what_both_know(tmp_path):
    """Nothing that the user did not write is complained of."""
    changed = load_config(overrides=["base.path=x", "objective.name=lcm"], preset="sd3-4step").objective
    assert (changed.name, changed.points, changed.guidance) == ("lcm", 100, (4, 4))
    file = tmp_path / "run.toml"
    file.write_text('preset = "sd15-4step"\n[base]\npath = "x"\n[objective]\nname = "ct"\n')
    assert load_config(str(file)).objective.name == "ct"


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (
            ["name=ct", "guidance=[3, 4]"],
            "objective.guidance: unknown key. The objective ct takes no such setting (pcm,",
        ),
        (["name=lcm", "phases=4"], "takes no such setting (pcm, lcf, progressive, tdm do). Known here: name, points"),
        (["name=tcd", "curriculum=ect"], "The objective tcd takes no such setting (ct does)"),
        (["name=lcn"], "objective.name = 'lcn': available: pcm, lcm,"),
        (["name=dscd", "delat=1"], "objective.delat: unknown key. Did you mean 'delta'?"),
        (["name=cd", "metric=lpips"], "objective.metric = 'lpips': input should be 'l2' or 'l1'"),
        (["name=ct", "curriculum=ict", "q=4"], "objective.q: a setting of the curriculum ect"),
        (["name=cd", "huber_c=0.5"], "objective.huber_c is of the metric l1, and objective.metric is l2"),
    ],
)
def test_an_objective_refuses_what_it_does_not_take(given, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        load_config(overrides=["base.path=x", *(f"objective.{item}" for item in given)])


def test_what_wants_stages_or_an_average_says_so():
    base = ["base.path=x", "objective.name=progressive"]
    with pytest.raises(ValueError, match="this run of the objective pcm is one stage. Set train.lr_schedule=cosine"):
        load_config(overrides=["base.path=x", "train.lr_schedule=stages"])
    with pytest.raises(ValueError, match="there is no average: train.ema is 0. Set train.ema=0.98"):
        load_config(overrides=[*base, "objective.average_teaches=true"])
    staged = load_config(
        overrides=[*base, "objective.average_teaches=true", "train.ema=0.9", "train.lr_schedule=stages"]
    )
    assert staged.objective.stage_count() == 3 and staged.objective.averaged_teacher()


def test_the_adversarial_loss_is_of_two_objectives():
    with pytest.raises(ValueError, match="the objective tcd has no adversarial loss; those with one: pcm, ufogen"):
        load_config(overrides=["base.path=x", "objective.name=tcd", "adversarial.weight=0.1"])
    with pytest.raises(ValueError, match="ufogen is only a diffusion loss without it. Set adversarial.weight=0.1"):
        load_config(overrides=["base.path=x", "objective.name=ufogen"])


def test_every_objectives_settings_survive_json():
    for name in OBJECTIVES:
        weight = 0.1 if OBJECTIVES[name].adversarial == "required" else 0
        config = load_config(overrides=["base.path=x", f"objective.name={name}", f"adversarial.weight={weight}"])
        assert Config.model_validate(json.loads(config.model_dump_json())) == config


def test_every_setting_of_an_objective_has_a_description():
    for name, row in OBJECTIVES.items():
        assert all(f.description for key, f in row.model_fields.items() if key not in ("name", "curriculum")), name


def test_every_setting_that_needs_one_has_a_description():
    for section in (Config.model_fields[name].annotation for name in ("base", "data")):
        assert all(f.description for key, f in section.model_fields.items() if key not in ("family", "prediction"))


@pytest.mark.parametrize("name", PRESETS)
def test_the_phases_of_every_preset_are_of_one_length(name):
    """Other programs sample at no other edges."""
    grid = load_config(preset=name).grid()
    assert grid.points % grid.phases == 0


def test_each_family_has_its_scripts_guidance():
    ranges = {family: load_config(preset=f"lcm-{family}").objective.guidance for family in ("sd15", "sdxl", "sd3")}
    assert ranges == {"sd15": (6.0, 16.0), "sdxl": (4.0, 16.0), "sd3": (3.0, 8.0)}
