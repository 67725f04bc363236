"""What a run writes down of itself: log.jsonl, the trackers, and the report at its end; by the first process alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ..config.config import Config
from ..system.processes import Processes
from .log import LOG, History, without_places
from .progress import Status
from .trackers import Trackers

AT_ONCE = "interrupted at once"
Say = Callable[[str], None]


class Journal:
    """Everything of one run that is only told. Raises ValueError where a tracker's package is missing."""

    def __init__(self, config: Config, processes: Processes, say: Say):
        self.config, self.say, self.writes = config, say, processes.first
        self.trackers = Trackers(config, say) if self.writes else None
        self.history = History(config.run_folder / LOG if self.writes else None, say)

    @contextmanager
    def open(self, step: int, facts: dict[str, Any], at_end: Callable[[], dict[str, Any]]) -> Iterator[None]:
        """Around a start of the run that goes on from `step`; facts: of the start; at_end: what its end is to tell."""
        self.history.begin(step, **facts)
        end = {"how": "stopped", "reason": AT_ONCE}
        try:
            self._track(lambda trackers: trackers.start(step))
            yield
            end = {"how": "finished"}
        except Exception as error:
            end = {"how": getattr(error, "how", "failed"), "reason": without_places(str(error) or repr(error))}
            raise
        finally:
            self._close(end, at_end)

    def update(self, status: Status, shown: dict[str, float]) -> None:
        """Of an update, its numbers by name."""
        values = shown | {"samples per second": status.samples_per_second}
        self.history.add("update", step=status.step, seconds=round(self.history.seconds, 3), **values)
        self._track(lambda trackers: trackers.figures(values, status.step))

    def validation(
        self, step: int, figures: dict[str, float], plain: dict[str, float], best: dict[str, Any] | None
    ) -> None:
        """Note what was measured after an update, by name; plain: of the weights that an average is made of."""
        seconds = round(self.history.seconds, 3)
        self.history.add("validation", step=step, seconds=seconds, figures=figures, plain=plain, best=best)
        named = {"validation": figures, "validation without averaging": plain}
        values = {f"{kind}/{name}": value for kind, of in named.items() for name, value in of.items()}
        self._track(lambda trackers: trackers.figures(values, step))

    def saved(self, step: int, path: Path, sentence: str) -> None:
        """Of a LoRA, or a network, that was written and tested."""
        self.history.add("saved", step=step, file=path.name, sentence=sentence)

    def picture(self, step: int, image: Image.Image) -> None:
        """Of a preview."""
        self._track(lambda trackers: trackers.picture("preview", image, step))

    def _track(self, do: Callable[[Trackers], None]) -> None:
        if self.writes:
            do(self.trackers)

    def _close(self, end: dict[str, Any], at_end: Callable[[], dict[str, Any]]) -> None:
        """Whatever goes wrong here, hides nothing of what ended the run."""
        if not self.writes:
            return
        self.history.add("end", seconds=round(self.history.seconds, 3), **end, **at_end())
        self.trackers.finish()
        if self.config.train.report and end.get("reason") != AT_ONCE:
            self._report()

    def _report(self) -> None:
        try:
            from .page import report

            self.say(f"Report: {report(self.config.run_folder)['report']}")
        except Exception as error:  # a run does not fail for want of one
            self.say(f"No report: {error}")
