"""`pcm report`, and the end of every run: report.html in the run folder, one file that needs no other."""

from __future__ import annotations

import io
from itertools import cycle
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError
from markupsafe import Markup
from PIL import Image

from ..objectives import OBJECTIVES
from ..system.pages import data_url, jpeg_url, write_page
from .curves import curves
from .log import LOG
from .story import BESIDE, Story, duration

REPORT, TEMPLATE = "report.html", Path(__file__).parent / "page.html"
SHOWN = 7  # grids; where there are more, some are left out
# A PNG of at most so many bytes and pixels of width goes in as it is; any other as a JPEG, and no wider.
SMALL, WIDEST, QUALITY = 200_000, 1200, 86
# Colours of the parts of the time, in turn.
COLOURS = ("#2f6fb0", "#e08a3c", "#4a9a5f", "#b9504a", "#8a6db5", "#8c6d5b", "#d07fb4", "#8b929e")


def write_report(folder: Path, out: Path | None = None) -> dict[str, Any]:
    """Write the page on a run, which may still be under way; out: default report.html in its folder.

    Returns where it is and what became of the run, JSON-ready, with a "text" for people. Raises ValueError
    for a folder without a log, for one of another version or that was damaged, and for a name that is no
    page's; OSError where it cannot be written.
    """
    out = out or folder / REPORT
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out is {str(out)!r}; write a name that ends in .html.")
    story = Story.of(folder)
    try:
        write_page(out, TEMPLATE, _content(story), duration=duration, share=lambda part: f"{part:.1%}")
        state, reason = story.state
        facts = {"report": str(out), "state": state, "reason": reason, "step": story.step, "steps": story.steps}
        files = {which: lora["name"] for which, lora in story.loras.items()}
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, UndefinedError) as error:
        raise ValueError(f"{folder / LOG} is of another version, or damaged: {error!r}.") from error
    return facts | {"files": files, "text": f"{out}: {state}, {story.step} of {story.steps} updates"}


def _content(story: Story) -> dict[str, Any]:
    """The values of the template."""
    state, reason = story.state
    stops = [start["to"] for start in story.starts[:-1]]
    objective = OBJECTIVES[story.settings["objective"]["name"]]
    svgs = curves(story.updates, story.measured, story.best.get("step"), stops, objective.loss_tells)
    columns, figures = story.figures()
    grids, left_out = _grids(story.folder)
    return {
        "story": story,
        "state": state,
        "reason": reason,
        "best": story.best,
        "curves": {title: Markup(svg) for title, svg in svgs.items()},
        "columns": columns,
        "figures": figures,
        "grids": grids,
        "grids_left_out": left_out,
        "best_grid": _picture(story.folder / f"{story.name}-best.preview.png"),
        "parts": [(name, part, colour) for (name, part), colour in zip(story.parts(), cycle(COLOURS))],
        "beside": BESIDE,
    }


def _grids(folder: Path) -> tuple[list[tuple[int, str]], int]:
    """(update, address) of the previews, the first, the last and some between, and how many are left out."""
    files = sorted((folder / "previews").glob("step-*.png"))
    chosen = files
    if len(files) > SHOWN:
        chosen = [files[round(i * (len(files) - 1) / (SHOWN - 1))] for i in range(SHOWN)]
    grids = [(int(path.stem.removeprefix("step-")), _picture(path)) for path in chosen]
    return [(step, address) for step, address in grids if address], len(files) - len(chosen)


def _picture(path: Path) -> str | None:
    """A picture as an address that holds it; None where there is none, or no whole one."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if len(data) <= SMALL and image.width <= WIDEST:
                return data_url(data, "png")
            image.thumbnail((WIDEST, 4 * WIDEST), Image.Resampling.LANCZOS)
            return jpeg_url(image, QUALITY)
    except (OSError, ValueError, SyntaxError):
        return None
