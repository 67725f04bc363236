"""Feeds mutated files to everything that reads files from others, and says what came of it.

    python -m support.fuzzing --count 2000 --seed 0

Every input is read as the program reads it, under an audit hook. It may be accepted, or refused with a sentence that
names the file or a key; a file that only differs in what does not matter must be read as the one it was made of.
The nodes are fuzzed where there is a ComfyUI (see docs/contributing.md). Exit code 1 where anything else happened.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from math import ceil
from pathlib import Path

from support.fuzz.mutators import Mutant, Target
from support.fuzz.watching import MOST_GROWTH, Report, Watch, complaint, kind_of

COLUMNS = (
    "target",
    "inputs",
    "accepted",
    "refused with a sentence",
    "anything else",
    "memory, MB",
    "slowest, s",
    "audit",
)
MOST_SENTENCES = 4
TESTS = Path(__file__).resolve().parents[1]  # from where it is run as a module


def fuzz(targets: dict[str, Target], count: int, seed: int, watch: Watch) -> dict[str, Report]:
    """`count` inputs or a few more, shared among the targets."""
    whole = sum(target.share for target in targets.values())
    shares = {name: ceil(count * target.share / whole) for name, target in targets.items()}
    return {name: fuzz_target(name, target, shares[name], seed, watch) for name, target in targets.items()}


def fuzz_target(name: str, target: Target, count: int, seed: int, watch: Watch) -> Report:
    """So many inputs of one target; each has a generator of its own, from the seed, the target and its number."""
    report, answers = Report(), {}
    for number in range(count):
        mutant = target.draw(random.Random(f"{seed} {name} {number}"))
        start = time.perf_counter()
        answer, error, growth, seen = watch.call(lambda mutant=mutant: target.read(mutant))
        report.seconds = max(report.seconds, time.perf_counter() - start)
        report.growth = max(report.growth, growth)
        report.inputs, report.events = report.inputs + 1, report.events + len(seen)
        wrong = [f"did {event}" for event in seen[:1]]
        wrong += [f"took {growth / 1e6:.0f} MB"] if growth > MOST_GROWTH else []
        wrong += _wrong(target, mutant, answer, error, answers)
        if wrong:
            report.bad.append((f"{mutant.kind} ({number})", "; ".join(wrong)))
        elif error is None:
            report.accepted += 1
        else:
            report.refused += 1
            report.said[kind_of(str(error))] += 1
    return report


def _wrong(target: Target, mutant: Mutant, answer: object, error: BaseException | None, answers: dict) -> list[str]:
    """What is wrong with an answer; answers: those to whole files, which it fills."""
    if error is not None and (what := complaint(error, target.names)):
        return [what]
    if not mutant.same:
        return []
    if error is not None:
        return [f"refused, though nothing that matters was changed: {str(error)[:200]}"]
    if mutant.whole not in answers:
        answers[mutant.whole] = target.read(mutant._replace(data=mutant.whole))
    right = answers[mutant.whole]
    return [] if answer == right else [f"read as {answer!r:.200}, which is {right!r:.200}"]


def table(reports: dict[str, Report]) -> str:
    """Markdown: a row for each target, and one for all."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    rows += [r.row(name) for name, r in reports.items()]
    rows.append(sum(reports.values(), Report()).row("all"))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def said(reports: dict[str, Report]) -> str:
    """The most frequent sentences of each target."""
    lines = []
    for name, report in reports.items():
        lines += [f"{name}: {times} x {text}" for text, times in report.said.most_common(MOST_SENTENCES)]
    return "\n".join(lines)


def fuzz_nodes(host: Path, folder: Path, count: int, seed: int) -> dict[str, Report]:
    """The nodes' reports, from a ComfyUI's own Python."""
    from host.tiny import make_checkpoint, make_loras
    from phased_consistency.trainer.system.comfyui import environment, python_of

    for kind in ("checkpoints", "loras", "custom_nodes"):
        (folder / kind).mkdir(parents=True)
    make_loras(folder / "loras", make_checkpoint(folder / "checkpoints" / "tiny.safetensors"))
    command = [python_of(host), "-m", "support.fuzzing", "--nodes", folder, "--count", count, "--seed", seed]
    variables = environment(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1") | {"COMFYUI_PATH": str(host)}
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=TESTS, env=variables, capture_output=True, text=True)
    if not done.stdout:
        raise RuntimeError(f"The nodes could not be fuzzed:\n{done.stderr[-3000:]}")
    return {name: Report.of(told) for name, told in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="of inputs; a third is for the nodes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="targets by name")
    parser.add_argument("--nodes", type=Path, help=argparse.SUPPRESS)  # the folder, in a ComfyUI's own Python
    asked = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    warnings.simplefilter("ignore")
    if asked.nodes:
        from support.fuzz.nodes import make_targets as make_nodes

        reports = fuzz(make_nodes(asked.nodes), asked.count, asked.seed, Watch(asked.nodes))
        print(json.dumps({name: vars(report) for name, report in reports.items()}))
        return 0
    with tempfile.TemporaryDirectory() as place:
        from phased_consistency.trainer.system.comfyui import hosts
        from support.fuzz.targets import make_targets

        host = None if asked.only else next(iter(hosts()), None)
        nodes = asked.count // 3 if host else 0
        reports = fuzz_nodes(host, Path(place) / "host", nodes, asked.seed) if nodes else {}
        targets = make_targets(Path(place))
        targets = {name: target for name, target in targets.items() if name in (asked.only or targets)}
        reports = fuzz(targets, asked.count - nodes, asked.seed, Watch(Path(place))) | reports
    bad = [f"{name}: {label}: {what}" for name, report in reports.items() for label, what in report.bad]
    shown = "\n\n".join(["\n".join(bad), table(reports), said(reports)]).strip()
    print(shown.encode("ascii", "backslashreplace").decode())
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
