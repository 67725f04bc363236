"""A first visit, from the empty page to an edit, with the clicks that it takes: the template, a run, another
prompt, two mistakes and their mending, an edit.

    python -m pytest tests/web/test_first_visit.py -s

prints the table that docs/measurements/comfyui.md has.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

CLICKS = 18  # at most, of the whole visit
ROW = "| {} | {:.1f} | {} |"


def test_a_first_visit_takes_few_clicks(frontend):
    text = frontend.page.locator("textarea").first
    rows = []

    def step(name: str, do: Callable[[], Any]) -> Any:
        """Do it, and note its seconds and clicks."""
        frontend.page.evaluate("tests.clicks = 0")
        start = time.monotonic()
        result = do()
        rows.append((name, time.monotonic() - start, frontend.page.evaluate("tests.clicks")))
        return result

    def write(prompt: str) -> None:
        text.click()
        text.fill(prompt)

    step("open the template 00_demo", lambda: frontend.open_template("00_demo"))
    assert step("run it: four pictures", frontend.run).error is None
    step("write another prompt", lambda: write("a large fox on a blue background"))
    assert step("run again", frontend.run).error is None

    step("a mistake: a word that the base does not know", lambda: write("a purple dinosaur on a white background"))
    assert "The base does not draw 'purple dinosaur'. Nearest are: " in step("run: a sentence", frontend.run).error
    frontend.dismiss()
    step("mend it", lambda: write("a large panda on a blue background"))
    assert step("run the mended prompt", frontend.run).error is None

    step("a mistake: an edge of 512", lambda: frontend.set("EmptySD3LatentImage", "width", 512))
    assert "draws at most 256 on an edge" in step("run: a sentence", frontend.run).error
    frontend.dismiss()
    step("mend it", lambda: frontend.set("EmptySD3LatentImage", "width", 128))
    assert step("run with the mended edge", frontend.run).error is None

    step("open an edit, 00_demo_3_inpaint", lambda: frontend.open_template("00_demo_3_inpaint"))
    assert step("run it", frontend.run).error is None

    rows.append(("all", *(sum(row[i] for row in rows) for i in (1, 2))))
    print("", "| what | s | clicks |", "|---|---|---|", *(ROW.format(*row) for row in rows), sep="\n")
    assert rows[-1][2] <= CLICKS
