"""What the registry and its users get: metadata, pictures, packed files, workflows, translations."""

import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import yaml
from PIL import Image

from host.locales import LANGUAGES, translations

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(scope="module")
def pyproject(root):
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def packed(root):
    """The files that `comfy node publish` packs: git's, without those that .comfyignore names."""

    def git(*arguments, **keywords):
        run = subprocess.run(
            ["git", "-c", "safe.directory=*", *arguments], cwd=root, capture_output=True, text=True, **keywords
        )
        assert run.stderr == ""
        return set(run.stdout.splitlines())

    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    files = {file for file in git("ls-files") if (root / file).is_file()}
    ignore = ("-c", f"core.excludesFile={root / '.comfyignore'}", "check-ignore", "--no-index", "--stdin")
    return files - git(*ignore, input="\n".join(files))


def test_the_registry_takes_the_metadata(pyproject):
    project, comfy = pyproject["project"], pyproject["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{1,99}", project["name"]) and "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert project["dependencies"] == []  # in ComfyUI, nothing else is needed
    assert {"Repository", "Documentation", "Issues"} <= project["urls"].keys()
    # no accelerator: with one named, whoever has another, or none, is warned of a conflict
    assert project["classifiers"] == ["Operating System :: OS Independent"]
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])


@pytest.mark.parametrize(("key", "sides"), [("Icon", (1, 1)), ("Banner", (21, 9))])
def test_the_pictures_are_what_the_registry_shows(root, pyproject, key, sides):
    """Run `python -m support.artwork` (in tests/) after a change (see there)."""
    repository = pyproject["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    base, path = pyproject["tool"]["comfy"][key].split("/main/")
    assert base == f"https://raw.githubusercontent.com/{repository}"
    with Image.open(root / path) as image:
        assert image.width * sides[1] == image.height * sides[0]
        assert key == "Banner" or image.width <= 400


def test_what_the_nodes_and_the_trainer_need_is_packed(root, packed):
    folders = ("nodes", "samplers", "trainer", "locales", "workflows")
    needed = chain.from_iterable((root / folder).rglob("*") for folder in folders)
    files = {str(path.relative_to(root)) for path in needed if path.is_file() and "__pycache__" not in path.parts}
    shown_by_the_registry = {"nodes/web/icon.png", "nodes/web/banner.png"}
    not_for_comfyui = {file for file in files if file.startswith(("trainer/tiny/sd15/", "trainer/tiny/sdxl/"))}
    others = {
        "__init__.py",
        "py.typed",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "BENCHMARKS.md",
        "CHANGELOG.md",
        "Makefile",
    }
    pages = {str(path.relative_to(root)) for path in (root / "docs").rglob("*") if path.is_file()}
    assert packed == files - shown_by_the_registry - not_for_comfyui | others | pages


def test_no_link_in_what_is_packed_is_dead(root, packed):
    folders = {str(folder) for file in packed for folder in Path(file).parents}
    for page in (file for file in packed if file.endswith(".md")):
        text = (root / page).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            target = os.path.normpath(Path(page).parent / link)
            assert "://" in link or target in packed | folders, f"{page}: {link}"


def test_pictures_of_help_pages_are_packed(root, packed):
    """The frontend looks for them beside the pages of one language, in nodes/web/docs."""
    for page in (root / "nodes" / "web" / "docs").glob("*.md"):
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert f"nodes/web/docs/{picture}" in packed, page.name


def workflow(root, name):
    return yaml.safe_load((root / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))


def test_ci_covers_the_lowest_versions_that_we_name(root, pyproject):
    jobs = workflow(root, "test")["jobs"]
    lowest = jobs["python"]["strategy"]["matrix"]["python"][0], jobs["comfyui"]["strategy"]["matrix"]["comfyui"][0]
    named = pyproject["project"]["requires-python"], pyproject["tool"]["comfy"]["requires-comfyui"]
    assert tuple(f">={version}" for version in lowest) == named
    setup, check = jobs["lowest"]["steps"][1:]
    assert setup["with"]["python-version"] == lowest[0] and "RESOLUTION=lowest-direct" in check["run"]


def test_a_tag_publishes_only_its_own_version(root, pyproject):
    published = workflow(root, "publish")
    assert published[True] == {"push": {"tags": ["v*"]}}  # YAML reads the key `on` as true
    steps = published["jobs"]["publish"]["steps"]
    guard = next(step["run"] for step in steps if "run" in step)
    assert steps[-1]["uses"].startswith("Comfy-Org/publish-node-action@")

    def run(tag):
        environment = os.environ | {"GITHUB_REF_NAME": tag}
        return subprocess.run(["bash", "-ec", guard], cwd=root, env=environment, capture_output=True, text=True)

    assert run(f"v{pyproject['project']['version']}").returncode == 0
    refused = run("v99.0.0")
    assert refused.returncode == 1 and "The tag is v99.0.0, but pyproject.toml has version" in refused.stdout


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_keep_every_number(language):
    for english, row in translations().items():
        numbers = set(re.findall(r"\d+(?:\.\d+)?", english))
        assert numbers <= set(re.findall(r"\d+(?:\.\d+)?", row[language])), english


def test_translations_have_nothing_that_the_frontend_reads_as_code():
    """In vue-i18n's messages these are placeholders, links and plurals."""
    assert [text for row in translations().values() for text in row.values() if set("{}@|") & set(text)] == []
