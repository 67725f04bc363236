"""What docs/robustness.md says of a fault, and a run that ends with it."""

import re
from functools import cache
from pathlib import Path

import pytest

from phased_consistency.trainer.training.loop import RunFailed, train

DOC = Path(__file__).parents[2] / "docs" / "robustness.md"


@cache
def rows() -> dict[str, str]:
    """The table of the page, read once: fault -> what the user sees."""
    text = DOC.read_text(encoding="utf-8").split("## Faults")[1].split("\n## ")[0]
    cells = [re.split(r"(?<!\\)\|", line)[1:3] for line in text.splitlines() if line.startswith("| ")]
    return {name.strip(): said.strip().strip("`") for name, said in cells if name.strip() != "fault"}


def row(fault: str) -> re.Pattern:
    """What the page says that the user sees: the row's sentence, where … stands for what differs."""
    return re.compile(re.escape(rows()[fault]).replace("…", ".*"), re.DOTALL)


def fails(config, fault, reporter=None, error=RunFailed, **how):
    """The run ends with what the row says; nothing is left half written."""
    with pytest.raises(error) as raised:
        train(config, reporter, **how)
    assert row(fault).search(str(raised.value)), f"said: {raised.value}"
    assert not list(config.run_folder.rglob("*.part"))
