"""What a run says on stderr is its own: the libraries' notices stay away, and what a user has set stays as it is."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

from phased_consistency.trainer.system import quiet
from support.runs import settings

OURS = re.compile(
    r"Expected: about .*better\.|"
    r"Loading /.*\.|6 samples in .*, 0 left out\.|LoRA of rank 4, alpha 2 on \d+ modules\.|Time: .*%\.|"
    r"Measured at .*|None of the 6 samples is held out.*|Report: .*|"
    r"/.*safetensors: 0 keys unmatched of .*|Caching (teacher's latents|prompts): \d+ of \d+\.|"
    r"\d of the 6 different captions are longer than .*|"
    r"Update [12] of 2: loss .*|Measured at update [02]: .*|The LoRA is no nearer to the teacher than .*"
)
API = """
import sys
from phased_consistency.trainer.training.loop import train
from phased_consistency.trainer.config.load import load_config
print(train(load_config(overrides=sys.argv[1:])))
"""


def stderr_of(*command: str) -> list[str]:
    """The lines on stderr of Python with these arguments, in an environment that asks for nothing."""
    environment = {name: value for name, value in os.environ.items() if name not in quiet.VARIABLES}
    ended = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return [line for line in re.split(r"[\r\n]+", ended.stderr) if line.strip()]


def run_settings(folder: Path) -> list[str]:
    """A small run with a preview, a log of its own and a report."""
    return settings(folder, train__steps=2, preview__every=2, train__report="true", train__trackers=None)


def test_the_command_line_says_its_own_lines_alone(tmp_path):
    lines = stderr_of("-m", "phased_consistency.trainer", "train", *run_settings(tmp_path / "run"))
    assert [line for line in lines if not OURS.fullmatch(line.strip())] == []
    assert lines[0].startswith("Expected: ") and lines[1].startswith("Loading ") and len(lines) >= 9


def test_a_program_of_one_s_own_hears_nothing(tmp_path):
    assert stderr_of("-c", API, *run_settings(tmp_path / "run")) == []


def test_what_a_user_has_set_stays(monkeypatch):
    for variable in quiet.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    chosen, free = (logging.getLogger(name) for name in quiet.LOGGERS[:2])
    levels = chosen.level, free.level
    try:
        chosen.setLevel(logging.DEBUG)
        free.setLevel(logging.NOTSET)
        quiet.quiet_libraries()
        assert (chosen.level, free.level) == (logging.DEBUG, logging.ERROR)
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "info" and os.environ["DIFFUSERS_VERBOSITY"] == "error"
    finally:
        for logger, level in zip((chosen, free), levels, strict=True):
            logger.setLevel(level)
