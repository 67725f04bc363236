"""Runs that are killed at random points, in a process that has trained nothing yet, and so can be forked."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import kills

TESTS = Path(__file__).resolve().parents[2]  # from where it is run as a module
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="attempts are forked, which needs POSIX")


@FORKS
def test_killed_runs_end_in_the_same_bytes():
    command = [sys.executable, "-m", "support.kills", "--kills", "5", "--seed", "3"]
    result = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len([line for line in lines if re.match(r" +\d+ killed ", line)]) == 5
    assert re.match(r"5 kills of \d+ runs: all ended in the same bytes, pcm-lora", lines[-1])


def test_a_file_that_is_half_written_is_found(lora, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    half = tmp_path / "run" / "checkpoints" / "step-0000002.safetensors"
    half.write_bytes(lora.read_bytes())
    kills.check_whole(tmp_path / "run")
    half.write_bytes(lora.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is cut short"):
        kills.check_whole(tmp_path / "run")


@pytest.mark.parametrize("lost", ["name", "bytes"])
def test_a_run_that_ends_otherwise_is_found(lost, monkeypatch, capsys):
    """The attempts are stood in for by ones that write a file, of which the second time something else comes out."""
    ended = []

    def attempt(folder, told, kill):
        folder.mkdir(exist_ok=True)
        told.write_text("open a\n")
        if kill:
            return False
        ended.append(folder)
        (folder / ("a.safetensors" if lost == "bytes" or len(ended) == 1 else "b.safetensors")).write_bytes(
            b"other" if lost == "bytes" and len(ended) == 2 else b"same"
        )
        return True

    monkeypatch.setattr(kills, "attempt", attempt)
    monkeypatch.setattr(kills, "check_whole", lambda folder: None)
    with pytest.raises(RuntimeError, match="Run 0 ended in other bytes: a.safetensors"):
        kills.kill_again_and_again(1, 0)
