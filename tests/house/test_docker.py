"""The Dockerfile by its linter, and that it copies all that the package is made of. No image is built here."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")


@pytest.fixture
def copied():
    """What the Dockerfile copies: files and folders of the repository's root."""
    lines = re.findall(r"^COPY (.+) \S+$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name for line in lines for name in line.split()}


def lint(file):
    command = shutil.which("hadolint") or HADOLINT
    return subprocess.run([str(command), str(file)], capture_output=True, text=True)


@pytest.mark.skipif(not (HADOLINT.exists() or shutil.which("hadolint")), reason="hadolint not installed")
def test_the_linter_has_nothing_to_say(tmp_path):
    result = lint(DOCKERFILE)
    assert result.returncode == 0, result.stdout
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN cd /tmp\n")
    assert "DL3007" in lint(tmp_path / "Dockerfile").stdout, "and it would"


def test_it_copies_what_the_package_is_made_of(copied):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {package.split(".")[1] for package in project["tool"]["setuptools"]["packages"] if "." in package}
    data = project["tool"]["setuptools"]["package-data"]["phased_consistency"]
    needed = {"pyproject.toml", "__init__.py", project["project"]["readme"], *project["project"]["license-files"]}
    assert needed | folders | {pattern.split("/")[0] for pattern in data} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_docker_is_sent_what_it_copies(copied):
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == copied


def test_its_extras_are_those_of_the_project():
    extras = re.search(r'"\.\[(.+)\]"', DOCKERFILE.read_text(encoding="utf-8"))[1].split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extras and set(extras) <= project["optional-dependencies"].keys()
