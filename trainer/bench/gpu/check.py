"""The sections in their order, each written down as soon as it has ended, until the time is up."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from ...evaluation.markdown import markdown_table
from ...system.files import write_text
from ...system.machine import best_device, out_of_memory, package_version
from ...training.failure import RunStopped
from ..report import machine
from .bases import made_of_configs
from .fast import SWITCHES, beside_reference, measure_card, sampler_overhead, switched
from .right import devices_agree, nothing_waits, resumes
from .section import CheckSection, Unfit, Verdict, Workplace, place_of
from .small import FITS, fits

LIMIT = 420.0  # seconds
REPORT = "gpu-check"  # the report's name, before .json and .md
# What comes of a section; of those with a promise, all but "needs" count against it unless it holds.
HOLDS, BROKEN, MEASURED, FAILED, LEFT_OUT, NEEDS = "holds", "broken", "measured", "failed", "left out", "needs"
FASTER = "at least as fast as the reference loop, in no more memory; no slower than counted allows"


def _sections() -> tuple[CheckSection, ...]:
    """All sections, what tells the most first; their seconds are guesses for an H200."""
    beside = lambda family: partial(beside_reference, family=family)  # noqa: E731
    switch = lambda name, seconds: CheckSection(name, seconds, "", partial(switched, name=name))  # noqa: E731
    fit = lambda name, seconds: CheckSection(  # noqa: E731
        name, seconds, "a whole run fits", partial(fits, name=name)
    )
    early = {"sdxl B=2": 12, "sdxl B=10": 16, "sdxl fp8": 14, "sdxl int8": 14, "sd3 B=2": 8, "sd3 compile": 60}
    late = {name: 90 if "compile" in name else 12 for name in SWITCHES if name not in early}
    return (
        CheckSection("machine", 8, "", measure_card),
        CheckSection("devices agree", 8, "losses and gradients are those of a CPU", devices_agree),
        CheckSection("nothing waits", 25, "the host waits for no GPU in an update", nothing_waits),
        CheckSection("bench sdxl", 65, FASTER, beside("sdxl")),
        CheckSection("bench sd15", 60, FASTER, beside("sd15")),
        CheckSection("bench sd3", 55, FASTER, beside("sd3")),
        *(switch(name, seconds) for name, seconds in early.items()),
        fit("sd3 in 16 GB", 25),
        CheckSection("sampler overhead", 12, "no slower than a bare loop", sampler_overhead),
        CheckSection("resumes", 35, "a killed run ends in the same bytes", resumes),
        *(fit(name, 20) for name in FITS if name != "sd3 in 16 GB"),
        *(switch(name, seconds) for name, seconds in late.items()),
    )


SECTIONS = _sections()


def check_gpu(
    out: Path,
    *,
    limit: float = LIMIT,
    only: Iterable[str] = (),
    tiny: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the sections, and write gpu-check.json and gpu-check.md into the folder `out` after each of them.

    limit: seconds; a section that by guess, at the pace of those before, does not fit what is left of them is left out.
    only: names of sections. tiny: on the least bases, and on a CPU where there is no GPU, to try the check itself.
    say: takes a line on each section. The result is JSON-ready: "machine", "limit", "tiny", "seconds", "sections" with
    outcome, sentence, seconds and figures of each, "open", the names of those whose promise is not seen to hold, and
    "text" for people.

    Raises ValueError without a GPU, unless tiny, and for a section that there is not; RunStopped or KeyboardInterrupt
    where it is stopped, once that is written.
    """
    sections = _chosen(only)
    device = best_device()
    if device.type != "cuda" and not tiny:
        raise ValueError("pcm bench-gpu needs a CUDA GPU, and torch sees none here. --tiny tries it on the CPU.")

    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    report = {"machine": machine(), "version": package_version(), "limit": limit, "tiny": tiny}
    report["sections"] = [_row(section, LEFT_OUT, "not begun") for section in sections]
    gc.freeze()  # what is imported stays: looking through it for garbage again and again takes longer than tiny updates
    with tempfile.TemporaryDirectory(prefix="pcm-gpu-", ignore_cleanup_errors=True) as folder:
        place = Workplace(Path(folder), device, tiny)
        with made_of_configs(place.folder):
            for number, section in enumerate(sections):
                passed = time.monotonic() - began
                ahead = section.seconds * _pace(sections[:number], report["sections"])
                if passed + ahead > limit:
                    left = max(0.0, limit - passed)
                    reason = f"takes {ahead:.0f} s by guess, and {left:.0f} of {limit:.0f} s are left"
                    report["sections"][number] = _row(section, LEFT_OUT, reason)
                else:
                    report["sections"][number] = _run(section, place)
                _write(out, report, time.monotonic() - began)
                row = report["sections"][number]
                say(f"[{time.monotonic() - began:4.0f} s] {section.name}: {row['outcome']} | {row['sentence']}")
                if row.get("stopped"):
                    raise KeyboardInterrupt
    return report


def _chosen(only: Iterable[str]) -> list[CheckSection]:
    """The sections of these names, or all. Raises ValueError for a name that there is not."""
    names = list(only)
    known = [section.name for section in SECTIONS]
    if strange := [name for name in names if name not in known]:
        raise ValueError(f"There is no section {strange[0]!r}; available: {', '.join(known)}.")
    return [section for section in SECTIONS if not names or section.name in names]


def _pace(sections: list[CheckSection], rows: list[dict[str, Any]]) -> float:
    """How much longer sections that came to their end have taken so far than they were guessed to."""
    ended = [
        (section.seconds, row["seconds"])
        for section, row in zip(sections, rows, strict=False)
        if row["outcome"] in (HOLDS, BROKEN, MEASURED)
    ]
    return sum(seconds for _, seconds in ended) / sum(guess for guess, _ in ended) if ended else 1.0


def _run(section: CheckSection, place: Workplace) -> dict[str, Any]:
    """One section's row; whatever it raises is its outcome, and the next has its own chance."""
    start = time.monotonic()
    stopped, figures = False, {}
    try:
        place.clean()
        verdict: Verdict = section.run(place)
        outcome = {True: HOLDS, False: BROKEN, None: MEASURED}[verdict.holds]
        sentence, figures = verdict.sentence, verdict.figures
    except Unfit as reason:
        outcome, sentence = NEEDS, str(reason)
    except (KeyboardInterrupt, RunStopped):
        outcome, sentence, stopped = LEFT_OUT, "stopped", True
    except Exception as error:
        first = next(iter(str(error).splitlines()), "no reason given")
        kind = "out of memory" if out_of_memory(error) else type(error).__name__
        outcome, sentence = FAILED, f"{kind} in {place_of(error)}: {first}"
    row = _row(section, outcome, sentence, time.monotonic() - start, figures)
    return row | ({"stopped": True} if stopped else {})


def _row(
    section: CheckSection, outcome: str, sentence: str, seconds: float = 0.0, figures: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "name": section.name,
        "promise": section.promise,
        "outcome": outcome,
        "sentence": " ".join(sentence.split()),
        "seconds": round(seconds, 1),
        "figures": figures or {},
    }


def _write(out: Path, report: dict[str, Any], seconds: float) -> None:
    """Write the report as it stands."""
    rows = report["sections"]
    report["seconds"] = round(seconds, 1)
    fine = (HOLDS, NEEDS, *((MEASURED,) if report["tiny"] else ()))
    report["open"] = [row["name"] for row in rows if row["promise"] and row["outcome"] not in fine]
    report["text"] = check_text(report)
    write_text(out / f"{REPORT}.json", json.dumps(report, indent=1, default=str) + "\n")
    write_text(out / f"{REPORT}.md", report["text"] + "\n")


def check_text(report: dict[str, Any]) -> str:
    """The report in Markdown: the machine, a row for each section, and what the promises come to."""
    facts = {**report["machine"], "phased-consistency": report["version"]}
    head = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if value != "")
    cells = [
        [row["name"], row["promise"], row["outcome"], row["sentence"].replace("|", "/"), f"{row['seconds']:.0f}"]
        for row in report["sections"]
    ]
    promised = [row for row in report["sections"] if row["promise"]]
    held = sum(row["outcome"] == HOLDS for row in promised)
    last = f"{held} of {len(promised)} promises hold, in {report['seconds']:.0f} s."
    if report["open"]:
        last += f" Not seen to hold: {', '.join(report['open'])}."
    if report["tiny"]:
        last += " Tried on tiny bases: neither speed nor memory is judged."
    return "\n\n".join([f"{head}.", markdown_table(["section", "promise", "outcome", "", "s"], cells), last])
