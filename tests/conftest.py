"""For every test: the repository root is not importable as bare folders, runs are repeatable, and skips are named."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
# With the root on sys.path (`python -m pytest`), our nodes/ folder would shadow the host's module `nodes`.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]


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
    from runs import TINY

    return load_base(TINY)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A small run on the tiny base, finished: its configuration and its LoRA. Leave its folder as it is."""
    from phased_consistency.trainer.loop import train
    from runs import small_config

    config = small_config(tmp_path_factory.mktemp("trained") / "run")
    return config, train(config)


@pytest.fixture
def pcm(monkeypatch, capsys):
    """Run `pcm ...` in this process; returns its exit code, stdout and stderr."""
    from phased_consistency.trainer import cli

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli, "_quiet_libraries", lambda: None)

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
    """Name every skipped test in the run's last lines; the very last one tells whether host tests are among them."""
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        reporter.write_line(f"not run: {report.nodeid}: {str(reason).removeprefix('Skipped: ')}")
    host = sum(
        report.nodeid.startswith("tests/host/") or "host" in getattr(report, "keywords", ()) for report in skipped
    )
    if host:
        reporter.write_line(f"{host} host tests were NOT run: they need a ComfyUI (set COMFYUI_PATH).", yellow=True)
    return result
