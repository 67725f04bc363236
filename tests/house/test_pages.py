"""The documents say what the code does: generated blocks, commands, links, the README's size, settings explained."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from house.pages import BLOCKS, README, ROOT, app, block, commands, fences, pages

from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.config.reference import settings

TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in pages()}
LINKS = [(page, target) for page, text in TEXTS.items() for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)]
VERBS = typer.main.get_command(app).commands
COMMANDS = list(dict.fromkeys(command.line for command in commands()))


GENERATED = [(page, name) for page, blocks in BLOCKS.items() for name in blocks]


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, name in GENERATED if name != "memory"])
def test_a_generated_block_is_the_code_s(page, name):
    assert block(name).search(TEXTS[page])[2] == BLOCKS[page][name](), "run: python tests/house/pages.py"


def test_the_memory_table_is_what_dry_runs_print():
    """Twenty seconds of work on the shapes of full-size networks, so in a process of its own, with the slow tests."""
    script = "from house.pages import memory_table; print(memory_table())"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "tests", capture_output=True, text=True)
    assert ended.stdout.strip() == block("memory").search(TEXTS["docs/memory.md"])[2], ended.stderr


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 200
    assert len(README.read_bytes()) <= 14 * 1024


def test_every_setting_has_a_description():
    rows = list(settings())
    assert len(rows) > 90
    assert [row.key for row in rows if not row.description] == []


# --- commands


def arguments(line: str) -> list[str]:
    """A command's words, as a shell hands them on, without a comment."""
    return shlex.split(line, comments=True)


def parse(words: list[str]) -> None:
    """Raise where the command line knows no such verb or option, or misses one that it needs; nothing is run."""
    verb, *rest = words
    command = VERBS[verb]
    if hasattr(command, "commands"):  # pcm edit inpaint
        verb, *rest = rest
        command = command.commands[verb]
    command.make_context(verb, rest)
    if verb in ("train", "bench"):
        check_settings(rest)


def check_settings(words: list[str]) -> None:
    """Raise ValueError for an unknown preset, an unknown setting, or a value that it cannot have."""
    overrides = [word for word in words if re.match(r"[a-z_]+(\.\w+)*=", word)]
    preset = words[words.index("--preset") + 1] if "--preset" in words else "demo"
    if not preset.isupper():  # a stand-in, as in `pcm train --preset NAME`
        load_config(None, overrides, preset)


def knows_options(script: Path, words: list[str]) -> None:
    """Raise where a script has no such option; it is not imported."""
    source = script.read_text(encoding="utf-8")
    unknown = [word for word in words if word.startswith("--") and f'"{word}"' not in source]
    if unknown:
        raise ValueError(f"{script.name} knows no {', '.join(unknown)}")


def test_there_are_commands_that_ci_runs_and_that_it_does_not():
    run = [command for command in commands() if not command.not_run]
    assert len({command.line for command in run}) >= 20
    assert len({command.line for command in commands()} - {command.line for command in run}) >= 20


def wrong(lines: list[str], check: Callable[[str], None]) -> list[str]:
    """The lines that a check refuses, with what it says of them."""
    problems = []
    for line in lines:
        try:
            check(line)
        except Exception as error:
            problems.append(f"{line}: {error!r}")
    return problems


def test_every_command_parses():
    def check(line: str) -> None:
        program, *words = arguments(line)
        if program == "pcm":
            parse(words)
        else:
            path = ROOT.joinpath(*words[1].split(".")[1:])
            knows_options(path / "__main__.py" if path.is_dir() else path.with_suffix(".py"), words[2:])

    assert wrong(COMMANDS, check) == []


def test_every_launched_command_parses():
    launch = re.compile(r"^.*launch .*-m phased_consistency\.trainer ([a-z].*)$", re.M)
    lines = [line for text in TEXTS.values() for line in launch.findall(text)]
    assert lines and wrong(lines, lambda line: parse(arguments(line))) == []


def test_every_script_is_there():
    def check(line: str) -> None:
        module, *words = line.split()
        knows_options(ROOT.joinpath("tests", *module.split(".")).with_suffix(".py"), words)

    lines = [line for text in TEXTS.values() for line in re.findall(r"^cd tests && python -m (.*)$", text, re.M)]
    assert len(lines) >= 4 and wrong(lines, check) == []


def test_every_command_in_a_sentence_has_known_options():
    def check(words: str) -> None:
        verb, *rest = shlex.split(words)
        command = VERBS[verb]
        if hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            command = command.commands[rest[0]]
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in rest if word.startswith("--")} <= {*options, "--help"}
        if verb in ("train", "bench"):
            check_settings(rest)

    spans = [words for text in TEXTS.values() for words in re.findall(r"`pcm ([a-z][^`]*)`", text)]
    assert len(spans) > 50 and wrong(spans, check) == []


def test_make_has_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    either = re.compile(r"`make ([a-z]+)`|^make ([a-z]+)", re.M)
    targets = {"".join(pair) for text in TEXTS.values() for pair in either.findall(text)}
    assert {"check", "comfy", "demo", "test"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.M)] == []


def test_toml_example_is_a_valid_configuration(tmp_path):
    (example,) = [content for kind, content in fences(TEXTS["README.md"]) if kind == "toml"]
    file = tmp_path / "run.toml"
    file.write_text(example)
    config = load_config(str(file), ["train.steps=2000"])
    assert (config.name, config.train.steps, config.data.images) == ("my-pcm", 2000, "pictures")


# --- links


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def followed(page: str, target: str) -> tuple[Path, str]:
    """The file that a link of a page leads to, and the anchor in it."""
    file, _, anchor = target.partition("#")
    return ((ROOT / page).parent / file).resolve() if file else ROOT / page, anchor


def leads_somewhere(page: str, target: str) -> bool:
    file, anchor = followed(page, target)
    there = file.exists() and file.is_relative_to(ROOT)
    return there and (not anchor or anchor in anchors(file.read_text(encoding="utf-8")))


def test_every_link_leads_somewhere():
    assert len(LINKS) > 100
    assert [f"{page}: {target}" for page, target in LINKS if not leads_somewhere(page, target)] == []


def test_every_page_is_reached_from_the_index():
    reached, queue = set(), ["docs/README.md"]
    while queue:
        page = queue.pop()
        reached.add(page)
        files = {followed(page, target)[0] for source, target in LINKS if source == page}
        names = {file.relative_to(ROOT).as_posix() for file in files if file.is_relative_to(ROOT)}
        queue += names & TEXTS.keys() - reached
    assert TEXTS.keys() - reached == set()


def test_every_page_begins_with_a_title_and_what_it_answers():
    opening = re.compile(r"# .+\n\n[A-Z]")
    assert [page for page, text in TEXTS.items() if page.startswith("docs/") and not opening.match(text)] == []


def test_every_picture_is_shown_by_a_page():
    pictures = {path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".jpg")}
    assert pictures - {followed(page, target)[0] for page, target in LINKS} == set()


# --- names of the code


def defined(tree: ast.Module) -> set[str]:
    """The functions, classes and methods of a module, a method as `Class.method`."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    top = [node for node in tree.body if isinstance(node, kinds)]
    inner = {f"{node.name}.{child.name}" for node in top for child in node.body if isinstance(child, kinds)}
    return inner | {node.name for node in top}


def test_every_file_and_function_that_a_page_names_is_there():
    """`trainer/training/loop.py`, `trainer/training/loop.py:train`, `samplers/phases.py:PhaseGrid.plan`."""
    reference = re.compile(r"`((?:docs|nodes|samplers|tests|trainer)/[\w/.-]+\.(?:py|md))(?::([\w.]+))?`")
    missing = []
    for page, text in TEXTS.items():
        for file, name in reference.findall(text):
            path = ROOT / file
            if "NAME" in file:
                continue
            if not path.is_file() or (name and name not in defined(ast.parse(path.read_text(encoding="utf-8")))):
                missing.append(f"{page}: {file}:{name}")
    assert missing == []


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_a_page_names_every_room(page):
    rooms = [folder.name for folder in (ROOT / "trainer").iterdir() if (folder / "__init__.py").is_file()]
    assert len(rooms) > 10 and [room for room in rooms if f"{room}/ " not in TEXTS[page].replace("`", " ")] == []
