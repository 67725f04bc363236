"""For every test: the repository root is not importable as bare folders, runs are repeatable, skips are named, and
there are two tiers.

The fast tier, `make check`, leaves out what is marked `host`, `web` or `slow`; `make test` runs all. Nobody marks a
test `slow` by hand: support/tiers.py reads what a test and its fixtures call, and one that trains more than once,
starts a process or compiles is slow. There support/guard.py watches the others: one that starts a process or
trains twice all the same, or takes more than 5 s of its own CPU time, fails with a sentence that says what to do.

With `-n`, support/spread.py gives each worker whole groups, the longest first: the tests of a host, those in its
browser, and those of a file that share a fixture; every other test is a group of its own.
"""

import gc
import importlib.metadata
import os
import re
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from host.fixtures import models as models  # for tests/host and tests/web: one server for both
from host.fixtures import picture as picture
from host.fixtures import server as server
from support.guard import Tiers
from support.spread import Spread

os.environ["HF_HUB_OFFLINE"] = "1"
# Libraries ask again and again what is installed, a tenth of a small run's time; it does not change while tests run.
importlib.metadata.version = cache(importlib.metadata.version)

ROOT = Path(__file__).resolve().parent.parent
NEEDS = {"web": "Chromium and a ComfyUI (set CHROMIUM, COMFYUI_PATH)", "host": "a ComfyUI (set COMFYUI_PATH)"}
LACKING = re.compile("no (ComfyUI|Playwright|Chromium) found")  # other tests are skipped for what the host is
# With the root on sys.path (`python -m pytest`), our nodes/ folder would shadow the host's module `nodes`.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Tiers(judging="not slow" in config.option.markexpr), "tiers")
    config.pluginmanager.register(Spread(), "spread")


def pytest_collection_finish() -> None:
    """What is imported and collected stays: the garbage collector need not go through it again and again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_base():
    """The bundled tiny SD1.5 in fp32. Shared: leave it as it is, and put no adapter on it."""
    from phased_consistency.trainer.families import load_base
    from support.runs import TINY

    return load_base(TINY)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A small run on the tiny base, finished: its configuration and its LoRA. Leave its folder as it is."""
    from phased_consistency.trainer.training.loop import train
    from support.runs import TINY, small_config

    config = small_config(tmp_path_factory.mktemp("trained") / "run", base__path=TINY, train__save_every=2)
    return config, train(config)


@pytest.fixture
def pcm(monkeypatch, capsys, tmp_path):
    """Run `pcm ...` in this process and the test's own folder; returns its exit code, stdout and stderr.

    In the checkout there may be runs that somebody has made, and a preset's run folder is relative.
    """
    from phased_consistency.trainer.cli import main as cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["pcm", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code or 0, out=out, err=err)

    return run


@pytest.fixture
def fails(pcm):
    """Run `pcm ...`, expect this exit code and a message without a traceback, and return the message."""

    def run(code, *args):
        result = pcm(*args)
        assert result.code == code, result
        assert re.findall(r"^Error: .", result.err, re.MULTILINE) and "Traceback" not in result.err
        return result.err

    return run


@pytest.fixture
def lora(trained):
    """The LoRA of that run."""
    return trained[1]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """Name every skipped test in the run's last lines; the very last ones tell what those of a kind lack here."""
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    for report in skipped:
        reporter.write_line(f"not run: {report.nodeid}: {_reason(report)}")
    lacking = [report for report in skipped if LACKING.match(_reason(report))]
    for kind, needs in NEEDS.items():
        number = sum(
            report.nodeid.startswith(f"tests/{kind}/") or kind in getattr(report, "keywords", ()) for report in lacking
        )
        if number:
            reporter.write_line(f"{number} {kind} tests were NOT run, see above: they need {needs}.", yellow=True)
    return result


def _reason(report) -> str:
    """Why a test was skipped."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    return str(reason).removeprefix("Skipped: ")
