"""A run's own record: log.jsonl, the trackers, and the page at its end, written by the first process alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ..system.saying import Say
from .log import LOG, RunLog, without_places
from .progress import Status
from .trackers import Trackers

AT_ONCE = "interrupted at once"


class Journal:
    """Passes on what a run tells: nothing here decides anything in it.

    folder: the run's. trackers: None in all processes but the first, which write nothing. with_page: whether
    report.html is made at the end.
    """

    def __init__(self, folder: Path, trackers: Trackers | None, with_page: bool, say: Say):
        self.folder, self.trackers, self.with_page, self.say = folder, trackers, with_page, say
        self.log = RunLog(folder / LOG if trackers else None, say)

    @contextmanager
    def open(self, step: int, facts: dict[str, Any], at_end: Callable[[], dict[str, Any]]) -> Iterator[None]:
        """Write down a start of the run that goes on from `step`, and at the end of this block how it ended.

        facts: for the line of the start. at_end: called for the facts in the line of the end.
        """
        self.log.begin(step, **facts)
        end = {"how": "stopped", "reason": AT_ONCE}
        try:
            self._track(lambda trackers: trackers.start(step))
            yield
            end = {"how": "finished"}
        except Exception as error:
            end = {"how": getattr(error, "ending", "failed"), "reason": without_places(str(error) or repr(error))}
            raise
        finally:
            self._close(end, at_end)

    def update(self, status: Status, numbers: dict[str, float]) -> None:
        """Write down the numbers of an update by name."""
        values = numbers | {"samples per second": status.samples_per_second}
        self.log.add("update", step=status.step, seconds=round(self.log.seconds, 3), **values)
        self._track(lambda trackers: trackers.figures(values, status.step))

    def validation(
        self, step: int, figures: dict[str, float], plain: dict[str, float], best: dict[str, Any] | None
    ) -> None:
        """Write down the figures that were measured after an update, by name.

        plain: those of the weights themselves where `figures` are of their average. best: the best so far.
        """
        seconds = round(self.log.seconds, 3)
        self.log.add("validation", step=step, seconds=seconds, figures=figures, plain=plain, best=best)
        values = {f"validation/{name}": value for name, value in figures.items()}
        values |= {f"validation without averaging/{name}": value for name, value in plain.items()}
        self._track(lambda trackers: trackers.figures(values, step))

    def saved(self, step: int, path: Path, sentence: str) -> None:
        """Write down that a LoRA, or a network, was saved and tested; sentence: on the test."""
        self.log.add("saved", step=step, file=path.name, sentence=sentence)

    def picture(self, step: int, image: Image.Image) -> None:
        """Pass on the preview of an update."""
        self._track(lambda trackers: trackers.picture("preview", image, step))

    def _track(self, do: Callable[[Trackers], None]) -> None:
        if self.trackers:
            do(self.trackers)

    def _close(self, end: dict[str, Any], at_end: Callable[[], dict[str, Any]]) -> None:
        """Write down the end of a start. No error from here may hide the one that ended the run."""
        if not self.trackers:
            return
        self.log.add("end", seconds=round(self.log.seconds, 3), **end, **at_end())
        self.trackers.finish()
        # last, as the page is made from the log; and not while the user waits for an interrupted run to let go
        if self.with_page and end.get("reason") != AT_ONCE:
            self._write_page()

    def _write_page(self) -> None:
        try:
            from .page import write_report

            self.say(f"Report: {write_report(self.folder)['report']}")
        except Exception as error:  # a run does not fail for want of one
            self.say(f"No report: {error}")
