"""The README says what the code does: its tables, its commands, its files."""

import re
import shlex
from pathlib import Path

import pytest
from readme_tables import README, TABLES, block

from phased_consistency.trainer.cli.main import app

TEXT = README.read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.S | re.M)
COMMANDS = [line for _, fence in FENCES for line in fence.splitlines() if line.startswith("pcm ")]


@pytest.mark.parametrize("name", TABLES)
def test_table_is_the_code_s(name):
    assert block(name).search(TEXT)[2] == TABLES[name](), "run: python tests/readme_tables.py"


def test_there_are_commands():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_command_has_known_options(command):
    import typer

    _, verb, *words = shlex.split(command)
    known = typer.main.get_command(app).commands[verb]
    if hasattr(known, "commands"):  # pcm edit inpaint
        known = known.commands[words[0]]
    options = {o for p in known.params for o in p.opts}
    assert {w for w in words if w.startswith("--")} <= options


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", TEXT))
def test_linked_file_exists(target):
    assert (Path(README).parent / target).is_file()


def test_toml_example_is_a_valid_configuration(tmp_path):
    from phased_consistency.trainer.config.load import load_config

    (example,) = [fence for kind, fence in FENCES if kind == "toml"]
    file = tmp_path / "run.toml"
    file.write_text(example)
    config = load_config(str(file), ["train.steps=2000"])
    assert (config.name, config.train.steps, config.data.images) == ("my-pcm", 2000, "pictures")
