"""`pcm` in every shell: home folders, encodings, JSON for programs, and files that it writes and reads again."""

import io
import json
import sys
from pathlib import Path

import pytest

from phased_consistency.samplers.writing import copy_with_metadata
from phased_consistency.trainer.config.config import Config
from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.config.presets import PRESETS
from phased_consistency.trainer.config.write import config_text
from support.runs import TINY, settings

JAPANESE = "日本語の説明 é"


@pytest.fixture
def japanese(lora, tmp_path):
    """A LoRA with a description that no Western encoding has."""
    out = tmp_path / "japanese.safetensors"
    copy_with_metadata(lora, out, {"modelspec.description": JAPANESE})
    return out


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home folder, which is another one than where `pcm` runs."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    return folder


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "utf-8"])
def test_what_the_encoding_lacks_is_replaced(monkeypatch, japanese, encoding):
    from phased_consistency.trainer.cli.main import main

    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="strict"))
    monkeypatch.setattr(sys, "argv", ["pcm", "inspect", str(japanese)])
    with pytest.raises(SystemExit) as end:
        main()
    sys.stdout.flush()
    lines = written.getvalue().decode(encoding).splitlines()
    assert not end.value.code
    (line,) = [line for line in lines if "modelspec.description" in line]
    assert line.endswith(JAPANESE.encode(encoding, "replace").decode(encoding))


def test_the_home_folder_in_settings_and_files(home):
    (home / "run.toml").write_text(
        '[base]\npath = "~/base.safetensors"\n[data]\nshards = ["~/a.tar", "https://x.org/~b.tar"]\n'
    )
    config = load_config("~/run.toml", ["output=~/runs/x", "lora.init=~/l.safetensors", "data.cache=~"])
    assert config.base.path == str(home / "base.safetensors") and config.lora.init == str(home / "l.safetensors")
    assert config.data.shards == (str(home / "a.tar"), "https://x.org/~b.tar")
    assert config.run_folder == home / "runs" / "x" and config.data.cache == str(home)


def test_every_setting_that_is_a_place_knows_the_home_folder(home):
    from phased_consistency.trainer.config.config import PLACES

    for section, key in (*PLACES, ("data", "cache")):
        overrides = {"base.path": "x"} | {f"{section}.{key}": "~/x"}
        if key == "shards":
            overrides["data.shards"] = '["~/x"]'
        config = load_config(overrides=[f"{name}={value}" for name, value in overrides.items()])
        value = getattr(getattr(config, section), key)
        assert value in (str(home / "x"), (str(home / "x"),)), (section, key)


def test_the_home_folder_in_options(pcm, fails, home, lora):
    (home / "mine.safetensors").write_bytes(lora.read_bytes())
    assert pcm("inspect", "~/mine.safetensors").code == 0
    assert f"No base at {home / 'gone'}" in fails(2, "check", "~/mine.safetensors", "--base=~/gone")
    merged = pcm("merge", "~/mine.safetensors:0.5", "~/mine.safetensors:0.5", "--out=~/both.safetensors")
    assert merged.code == 0 and (home / "both.safetensors").is_file()
    prompted = fails(2, "sample", "--base", "~/gone", "--prompt", "~/a prompt", "--out=~/x.png")
    assert f"No base at {home / 'gone'}" in prompted


def test_errors_are_json_where_that_is_asked_for(pcm):
    for code, words, message in (
        (2, ("inspect", "gone.safetensors"), "No file at gone.safetensors"),
        (2, ("inspect", "gone.safetensors", "--jsn"), "No such option: --jsn"),
        (2, ("check", "gone.safetensors"), "Missing option '--base'"),
        (2, ("train", "--preset", "dmeo"), "Did you mean 'demo'?"),
    ):
        result = pcm(*words, "--json")
        assert result.code == code and message in json.loads(result.out)["error"], words
        assert result.err.startswith("Error: ") and "Traceback" not in result.err


def test_the_version(pcm):
    from importlib.metadata import version

    assert pcm("--version").out == f"pcm {version('phased-consistency')}\n"


# --- configurations as files


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_as_toml_is_read_back_the_same(tmp_path, name, described):
    config = load_config(preset=name)
    (tmp_path / "run.toml").write_text(config_text(config, described), encoding="utf-8")
    again = load_config(str(tmp_path / "run.toml"))
    assert again == config and again.preset == name


def test_any_text_and_number_is_read_back_the_same(tmp_path):
    strange = "C:\\new\\tab \"quoted\" 'é' # \U0001f600 \x7f\t\x01\n"
    values = load_config(preset="demo").model_dump() | {
        "preview": {"prompts": (strange, "")},
        "data": {"buckets": ("768x512", "512x768"), "images": "a 'b' \"c\" \\ é"},
    }
    values["train"] |= {"lr": 1e-30, "weight_decay": 1e300, "seed": 2**64 - 1}
    config = Config.model_validate(values)
    (tmp_path / "run.toml").write_text(config_text(config), encoding="utf-8")
    assert load_config(str(tmp_path / "run.toml")) == config


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_dry_run_can_be_saved_and_run(pcm, tmp_path, encoding):
    """As any shell saves it: Windows PowerShell's `>` writes UTF-16 and its own line ends."""
    first = pcm("train", *settings(tmp_path / "a run", name="my lora", train__lr=1e-30), "--dry-run")
    (tmp_path / "run.toml").write_bytes(first.out.replace("\n", "\r\n").encode(encoding))
    assert first.code == 0 and "# Memory estimate (GiB)" in first.out
    again = pcm("train", "run.toml", "--dry-run")
    assert again.out == first.out and again.code == 0


def test_write_config_starts_a_file(pcm, fails, tmp_path):
    words = ("train", "--preset", "sd15-4step", "train.steps=7", "--write-config", "run.toml")
    assert "pcm train run.toml" in pcm(*words).out
    text = (tmp_path / "run.toml").read_text(encoding="utf-8")
    assert "steps = 7  # optimizer updates" in text and "# init =  # few-step LoRA" in text
    assert load_config("run.toml") == load_config(overrides=["train.steps=7"], preset="sd15-4step")
    assert "run.toml is there already" in fails(2, *words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[base]\npath = "C:\\Users\\me"', "Line 2 has a backslash between double quotes, where it begins an escape"),
        ('[base]\npath = "C:\\new\\base"', "base.path = 'C:\\new\\x08ase' holds a line break, a tab or the like"),
        ('[data]\nshards = ["C:\\tars"]', "data.shards.0 = 'C:\\tars' holds a line break, a tab or the like"),
        ("[train]\nsteps = 1.2.3", "is not valid TOML"),
    ],
)
def test_backslashes_get_a_sentence(tmp_path, text, message):
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as raised:
        load_config(str(tmp_path / "run.toml"), ["base.dtype=fp32"])
    assert message in str(raised.value)
    assert ("forward slashes" in str(raised.value)) == ("backslash" in message or "holds" in message)


def test_a_file_in_another_encoding_is_said(tmp_path):
    (tmp_path / "run.toml").write_bytes('name = "é"'.encode("cp1252"))
    with pytest.raises(ValueError, match=r"run\.toml is not valid TOML: it is not UTF-8 .* Save it in UTF-8"):
        load_config(str(tmp_path / "run.toml"))


def test_a_preset_in_place_of_a_file(fails):
    for word in ("sd15-4step", "sd15-4stp", "sd15-4step.toml"):
        assert "use --preset sd15-4step" in fails(2, "train", word)
    assert "`pcm presets` lists them" in fails(2, "train", "mine.toml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.steps", "5"], "train.steps is a setting without a value. Write train.steps=VALUE, without spaces."),
        (["."], ". is a folder; expected a config file, settings as key=value, or --preset."),
        (["base.toml"], "No config file at base.toml."),
        (["data.images="], "data.images = '' is empty: name a place, or leave the setting out"),
        (["output= "], "output = '' is empty"),
        (['data.shards=[""]'], "data.shards.0 = '' is empty"),
    ],
)
def test_words_that_name_nothing_get_a_sentence(fails, words, message):
    assert message in fails(2, "train", "--preset", "demo", *words)


def test_names_may_hold_spaces():
    for name in ("my lora", "v1.5 é", "a", "_x-1", "日本"):
        assert load_config(overrides=["base.path=b", f"name={name}"]).name == name
    for name in ("..", ".hidden", "-x", "x.", "x ", "../up", "a/b", "a:b", ""):
        with pytest.raises(ValueError, match="is no file's name for every system: write letters, digits, spaces"):
            load_config(overrides=["base.path=b", f"name='{name}'"])


def test_seeds_have_a_bound(tmp_path):
    from phased_consistency.trainer.training.loop import train
    from support.runs import small_config

    train(small_config(tmp_path / "run", base__path=TINY, train__seed=2**64 - 1, train__steps=1))
    for key in ("train.seed", "preview.seed"):
        with pytest.raises(ValueError, match=f"{key} = {2**64}: input should be less than or equal to {2**64 - 1}"):
            load_config(overrides=["base.path=b", f"{key}={2**64}"])


# --- lists


def test_settings_are_those_of_the_page(pcm, fails, root):
    page = (root / "docs" / "config.md").read_text(encoding="utf-8")
    rows = json.loads(pcm("settings", "--json").out)
    assert {f"| `{row['key']}` |" for row in rows if row["key"] != "objective.name"} == {
        line[: line.index(" |") + 2] for line in page.splitlines() if line.startswith("| `")
    }
    assert len({row["key"].split(".")[0] for row in rows}) > 8
    lora = pcm("settings", "lora").out
    assert "lora.rank = 64\n    whole number, at least 1\n    rank of every module" in lora and "train." not in lora
    assert "train.steps = 5000" in pcm("settings", "train.steps").out
    assert "objective.curriculum" in pcm("settings", "ct").out and "\nlora." not in pcm("settings", "ct").out
    assert "Did you mean 'train'? Available: name, output, base, data" in fails(2, "settings", "trian")


def test_presets_are_a_table(pcm, fails):
    table = pcm("presets").out.splitlines()
    assert len(table) == len(PRESETS) + 1 and [line.split()[0] for line in table[1:]] == list(PRESETS)
    assert all(line.index("samples") > 90 for line in table if "samples" in line)
    one = pcm("presets", "digits").out
    assert len(one.splitlines()) == 3 and PRESETS["digits"].source in one
    assert json.loads(pcm("presets", "demo", "--json").out)["demo"]["cost"] == PRESETS["demo"].cost
    assert "No preset begins with 'dmeo'. Did you mean 'demo'?" in fails(2, "presets", "dmeo")
    assert Path("docs/presets.md").exists() is False, "the table needs no file of the checkout"
