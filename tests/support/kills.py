"""Runs that are killed again and again, at random points, until they end: each must end in the same bytes.

    python -m support.kills --kills 50 --seed 0

Prints a line for each kill: what was about to be done, and what the folder holds then. A process that has imported
everything forks each attempt, so that one takes seconds; what ends it is SIGKILL, or for a point in the middle of a
write an alarm without a handler, after which no line of Python runs either.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a pool of threads does not live through a fork

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from phased_consistency.samplers.lora_file import read_header  # noqa: E402
from phased_consistency.trainer.training.loop import train  # noqa: E402
from support.runs import (
    sha256,  # noqa: E402
    small_config,  # noqa: E402
)

STEPS = 6
SETTINGS = {
    "data__count": 12,
    "lora__dtype": "fp32",
    "train__steps": STEPS,
    "train__save_every": 2,
    "train__batch_size": 2,
    "train__accumulation": 2,
    "train__ema": 0.9,
    "train__lr_schedule": "cosine",
    "train__warmup": 2,
    "adversarial__weight": 0.1,
    "adversarial__width": 16,
    "preview__every": 3,
    "preview__steps": [1],
    "validation__every": 2,
    "validation__count": 2,
    "validation__steps": [1, 2],
    "validation__teacher_steps": 3,
}
# What Python tells of before it is done, and which of its arguments is the file.
WRITES = {"open": 0, "os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.truncate": 0}
LONGEST_WRITE = 0.02  # seconds


@dataclass(frozen=True)
class Kill:
    """Where to end an attempt: before the file operation with this number (from 0), or `after` seconds from it; or
    after some seconds from the start, whatever is done then."""

    operation: int | None = None
    after: float = 0.0


class Watch:
    """Sees a process' writes within a folder, writes each down in `told`, and ends the process where it is to end."""

    def __init__(self, folder: Path, told: Path, kill: Kill | None):
        self.folder, self.kill, self.seen = str(folder), kill, 0
        self.told = os.open(told, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        if kill and kill.operation is None:
            signal.setitimer(signal.ITIMER_REAL, max(kill.after, 1e-6))
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in WRITES or not str(arguments[WRITES[event]]).startswith(self.folder):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        name = os.path.relpath(str(arguments[WRITES[event]]), os.path.dirname(self.folder))
        name = name.removeprefix(os.path.basename(self.folder) + os.sep)
        os.write(self.told, f"{event.removeprefix('os.')} {name}\n".encode())
        if self.kill and self.seen == self.kill.operation:
            if not self.kill.after:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.setitimer(signal.ITIMER_REAL, self.kill.after)
        self.seen += 1


def attempt(folder: Path, told: Path, kill: Kill | None) -> bool:
    """Train in a forked process; whether it came to its end. Raises RuntimeError where it failed by itself."""
    config = small_config(folder, **SETTINGS)
    child = os.fork()
    if child == 0:
        code, log = 1, os.open(told.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            Watch(folder, told, kill)
            train(config)
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGALRM):
        return False
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"An attempt failed by itself: {told.with_suffix('.log').read_text()}")
    return True


def check_whole(folder: Path) -> None:
    """Raise ValueError, or what reading it raises, for a file that stands half written under its own name."""
    for path in folder.rglob("[!.]*"):
        if path.suffix == ".safetensors":
            read_header(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).load()


def results(folder: Path) -> dict[str, str]:
    """Hashes of what a run leaves: its LoRAs and its pictures."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.png"), *folder.glob("previews/*.png")]
    return {path.name: sha256(path) for path in sorted(files)}


def choose(rng: random.Random, operations: int, seconds: float) -> Kill:
    """A third each: right before a write, within a write, at any time."""
    kind = rng.randrange(3)
    if kind == 2:
        return Kill(after=rng.uniform(0, seconds))
    return Kill(rng.randrange(operations), kind * rng.uniform(0, LONGEST_WRITE))


def kill_again_and_again(kills: int, seed: int, say=print) -> int:
    """How many kills there were, of runs that all ended in the same bytes. Raises RuntimeError where one did not."""
    rng, done, runs = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as place:
        told, first = Path(place, "told"), Path(place, "undisturbed")
        began = time.monotonic()
        if not attempt(first, told, None):
            raise RuntimeError("The undisturbed run was killed by something else.")
        seconds, operations, expected = time.monotonic() - began, len(told.read_text().splitlines()), results(first)
        say(f"The undisturbed run: {seconds:.1f} s, {operations} file operations, {len(expected)} files at the end.")
        while done < kills:
            folder = Path(place, f"run-{runs}")
            while done < kills and not attempt(folder, told, choose(rng, operations, seconds)):
                done += 1
                check_whole(folder)
                say(f"{done:3} {_told(told)}; {_held(folder)}")
            if not attempt(folder, told, None):
                raise RuntimeError("An attempt was killed by something else.")
            if (found := results(folder)) != expected:
                changed = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
                raise RuntimeError(f"Run {runs} ended in other bytes: {', '.join(changed)}.")
            say(f"    run {runs} ended, in the same bytes.")
            runs += 1
            shutil.rmtree(folder)
    say(f"{done} kills of {runs} runs: all ended in the same bytes, {', '.join(expected)}.")
    return done


def _told(told: Path) -> str:
    lines = told.read_text().splitlines()
    return f"killed at operation {len(lines)}, {lines[-1]}" if lines else "killed before anything was written"


def _held(folder: Path) -> str:
    steps = sorted(int(p.stem.split("-")[1]) for p in folder.glob("checkpoints/step-*.safetensors"))
    parts = len(list(folder.rglob("*.part")))
    return f"checkpoints {steps or 'none'}, {parts} half-written files" if folder.is_dir() else "no folder yet"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    kill_again_and_again(given.kills, given.seed, lambda line: print(line, flush=True))
