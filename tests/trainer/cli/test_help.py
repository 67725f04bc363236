"""`pcm --help` and what the shell completes: verbs in groups, whole paragraphs, names from the code's own tables."""

import pytest
import typer

from phased_consistency.trainer.cli.completion import preset_names_with, setting_names_with
from phased_consistency.trainer.cli.main import app
from phased_consistency.trainer.config.presets import FAMILIES, PRESETS, RELATIVES

GROUPS = {
    "Train": {"train", "report", "watch", "settings", "presets"},
    "Draw and measure": {"sample", "edit", "evaluate"},
    "LoRA files": {"inspect", "check", "convert", "tag", "merge", "resize", "extract", "sidecars", "panels"},
    "This machine": {"doctor", "bench", "bench-gpu", "bench-data"},
}
COMMANDS = typer.main.get_command(app).commands
WORDS = [(name,) for name in COMMANDS if name != "edit"] + [("edit", name) for name in COMMANDS["edit"].commands]


def panels(text: str) -> dict[str, list[str]]:
    """The panels of a help by their titles: the lines in each."""
    lines: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("╭─"):
            lines[line.strip("╭─╮ ")] = []
        elif line.startswith("│"):
            lines[list(lines)[-1]].append(line.strip("│ "))
    return lines


def test_every_verb_is_in_its_group(pcm):
    listed = panels(pcm("--help").out)
    assert {title: {line.split()[0] for line in listed[title]} for title in GROUPS} == GROUPS
    assert set(listed) - set(GROUPS) == {"Options"}
    assert {name: command.rich_help_panel for name, command in COMMANDS.items()} == {
        name: title for title, names in GROUPS.items() for name in names
    }


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_a_paragraph_is_a_line(pcm, words):
    """In a terminal that is wide enough; in others the terminal's width alone breaks it."""
    command = COMMANDS[words[0]] if len(words) == 1 else COMMANDS["edit"].commands[words[1]]
    paragraphs = command.help.split("\n\n")
    assert not any("\n" in paragraph for paragraph in paragraphs)
    lines = [line.strip() for line in pcm(*words, "--help").out.splitlines()]
    assert all(paragraph in lines for paragraph in paragraphs if len(paragraph) < 190)


@pytest.mark.parametrize("columns", ["80", "120"])
def test_narrow_lines_are_full(pcm, monkeypatch, columns):
    """No line of the text could have taken the first word of the next."""
    monkeypatch.setenv("COLUMNS", columns)
    for words in WORDS:
        monkeypatch.setenv("COLUMNS", columns)
        text = pcm(*words, "--help").out.split("╭─")[0]
        lines = [line.strip() for line in text.splitlines()]
        for line, following in zip(lines, lines[1:], strict=False):
            if line and following:
                assert len(line) + 1 + len(following.split()[0]) > int(columns) - 2, (words, line)


def test_the_presets_in_the_help_are_the_table_s(pcm):
    said = " ".join(pcm("train", "--help").out.split("Presets: ")[1].split()).rstrip(".")
    of_families, relatives, alone = said.split("; ")
    families, _, kinds = of_families.partition(", then one of ")
    families = families.replace(" or ", ", ").split(", ")
    relatives = [name.strip("-") for name in relatives.removesuffix(" and a family").split(", ")]
    assert (families, relatives) == ([*FAMILIES], [*RELATIVES, "refine"])
    names = [family + kind for family in families for kind in kinds.split(", ")]
    names += [f"{relative}-{family}" for family in families for relative in relatives]
    assert {*names, *alone.removeprefix("or ").split(", ")} == set(PRESETS)


@pytest.fixture
def complete(pcm, monkeypatch):
    """What the shell is offered for the last of these words."""

    def run(*words: str, shell: str = "bash") -> list[str]:
        monkeypatch.setenv("_PCM_COMPLETE", f"complete_{shell}")
        monkeypatch.setenv("COMP_WORDS", " ".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", " ".join(words))
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        result = pcm()
        assert (result.code, result.err) == (0, ""), result
        return result.out.splitlines()

    return run


def test_the_shell_completes_verbs_presets_and_settings(complete):
    assert complete("pcm", "ed") == ["edit"]
    assert complete("pcm", "edit", "in") == ["inpaint", "interpolate"]
    assert complete("pcm", "train", "--acc") == ["--accept-changes"]
    names = [f"sd15-4step{more}" for more in ("", "-adv", "-normalcfg", "-dmd", "-tdm")]
    for verb in ("train", "bench", "doctor"):
        assert complete("pcm", verb, "--preset", "sd15-4") == names
    assert complete("pcm", "train", "train.s") == ["train.steps=", "train.shard=", "train.seed=", "train.save_every="]
    assert "train.seed=\tseed of every random draw of the run" in complete("pcm", "train", "train.s", shell="fish")
    assert complete("pcm", "inspect", "some") == [""], "files are the shell's"


def test_completion_can_be_installed(pcm):
    assert {"--install-completion", "--show-completion"} <= set(pcm("--help").out.split())


def test_what_completes_is_what_there_is():
    from phased_consistency.trainer.config.load import flat, load_config

    assert preset_names_with("") == [*PRESETS]
    offered = [key.rstrip("=") for key, _ in setting_names_with("")]
    assert len(offered) == len(set(offered)) > 80
    for name in ("demo", "ctm-sd15", "progressive-sdxl"):
        keys = set(flat(load_config(preset=name).model_dump(mode="json")))
        assert {key for key in keys if key not in offered} == set()
    assert all(description and len(description) <= 70 and "\n" not in description
               for _, description in setting_names_with(""))  # fmt: skip
