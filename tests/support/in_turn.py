"""`pcm ...` in the processes that `accelerate launch` starts, one command after another.

    accelerate launch ... -m support.in_turn COMMANDS.json

Starting two processes takes longer than what most tests do with them. COMMANDS.json holds the arguments of each
command, in which RANK stands for the number of the process; each process writes what its commands said beside it, as
`said-<number>.json`: for each command its exit code, stdout and stderr.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path

from phased_consistency.trainer.cli.main import main


def run(arguments: list[str]) -> dict[str, str | int]:
    """What `pcm` with these arguments ends with, and what it says."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["pcm", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # between commands: one that stops a run may come once more after it
    commands, rank = Path(sys.argv[1]), os.environ["RANK"]
    said = [run([part.replace("RANK", rank) for part in command]) for command in json.loads(commands.read_text())]
    commands.with_name(f"said-{rank}.json").write_text(json.dumps(said))
