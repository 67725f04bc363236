"""What docs/robustness.md says of a fault, a run that ends with it, and the same run taken up again."""

import re
from functools import cache
from pathlib import Path

import pytest

from phased_consistency.trainer.training.loop import RunFailed, train
from support.runs import Notes, sha256

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


def steps_kept(config):
    return [int(p.stem.split("-")[1]) for p in sorted(config.run_folder.glob("checkpoints/*.safetensors"))]


def goes_on(config, whole, **how):
    """The same command ends the run, in the same bytes as if nothing had been."""
    notes = Notes()
    assert sha256(train(config, notes, **how)) == sha256(whole)
    return notes


class Acting(Notes):
    """Does something after an update, by its number."""

    def __init__(self, **acts):
        super().__init__()
        self.acts = {int(name.removeprefix("after_")): act for name, act in acts.items()}

    def update(self, status):
        super().update(status)
        if status.step in self.acts:
            self.acts[status.step]()
