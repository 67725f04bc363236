"""`pcm watch`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, answer


def watch(
    run: Annotated[Path, typer.Argument(help="Run folder, such as runs/pcm-lora.")],
    every: Annotated[float, typer.Option(help="Seconds between two looks.")] = 5.0,
    report: Annotated[
        bool, typer.Option("--report", help="Write report.html at each look, too; an open browser reads it anew.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Watch a run that goes on, from another terminal: curves, rate, time left, memory, the newest pictures and files.

    Ends with the run, or by Ctrl-C, which leaves the run alone. Without a terminal, or with --json, it looks once.

    Example: pcm watch runs/pcm-lora
    """
    from contextlib import suppress

    from rich.console import Console

    from ..reporting.story import Story
    from ..reporting.watch import facts
    from ..reporting.watch import watch as look

    if as_json:
        answer(facts(Story.of(run)), as_json, "")
        return
    with suppress(KeyboardInterrupt):
        look(run, every, report, Console(highlight=False))
