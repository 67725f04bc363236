"""A short moving picture of the demo in a real browser: the template opens and runs, once more with another prompt.

    python -m web.recording

in tests/ writes docs/web_run.webp, with a ComfyUI of its own.
"""

from __future__ import annotations

import base64
import io
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Locator, sync_playwright

from host.server import demo_host
from web.conftest import chromium
from web.frontend import SETTINGS, Frontend

FILE = Path(__file__).parents[2] / "docs" / "web_run.webp"
WIDTH, QUALITY = 960, 70  # of the moving picture
PROMPT = "a large mushroom on a blue background"
STRIDES, STRIDE = 5, 40  # of the pointer on its way to what it clicks, and milliseconds for each
# seconds that a frame is shown at most, where nothing holds it: a busy machine's waits are left out, previews are seen
LONGEST, LONGEST_OF_A_RUN = 0.05, 0.075
SETTLED = 400  # milliseconds until the page shows what it has got
LOADED = "['00_demo', '00_demo_7_stroke_to_image'].every((name) => tests.thumbnail(name))"
POINTER = """
  addEventListener("DOMContentLoaded", () => {
    const pointer = document.createElement("div");
    pointer.style = `position: fixed; left: -30px; width: 22px; height: 30px; z-index: 99999; pointer-events: none;
      background: white; clip-path: polygon(0 0, 100% 65%, 55% 68%, 80% 100%, 55% 100%, 35% 72%, 0 90%)`;
    document.body.append(pointer);
    const follow = ({ x, y }) => Object.assign(pointer.style, { left: `${x}px`, top: `${y}px` });
    addEventListener("mousemove", follow, true);
  });
"""


class Recording:
    """What a page shows, frame by frame, since this was made."""

    def __init__(self, frontend: Frontend):
        self.page, self.frames, self.held, self.longest = frontend.page, [], {}, LONGEST
        self._session = self.page.context.new_cdp_session(self.page)
        self._session.on("Page.screencastFrame", self._take)
        self._session.send("Page.startScreencast", {"format": "jpeg", "quality": 95})

    def _take(self, event: dict[str, Any]) -> None:
        self.frames.append((event["metadata"]["timestamp"], self.longest, base64.b64decode(event["data"])))
        self._session.send("Page.screencastFrameAck", {"sessionId": event["sessionId"]})

    def hold(self, seconds: float) -> None:
        """Show what the page shows now for so long."""
        self.page.wait_for_timeout(SETTLED)
        self.held[len(self.frames) - 1] = seconds

    def point(self, at: Locator) -> None:
        """Move the pointer to something, so that it is seen to go there."""
        box = at.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for i in range(STRIDES, 0, -1):
            self.page.mouse.move(x + i * STRIDE, y + i * STRIDE / 2)
            self.page.wait_for_timeout(STRIDE)
        self.page.mouse.move(x, y)
        self.hold(2 * STRIDE / 1000)

    def save(self, path: Path) -> float:
        """Write it as an animated WebP that repeats. Returns its seconds."""
        pairs = pairwise([*self.frames, self.frames[-1]])
        shown = [min(after - before, longest) for (before, longest, _), (after, *_) in pairs]
        shown = [self.held.get(i, seconds) for i, seconds in enumerate(shown)]
        pictures = [Image.open(io.BytesIO(data)) for *_, data in self.frames]
        height = WIDTH * pictures[0].height // pictures[0].width
        first, *others = (picture.resize((WIDTH, height), Image.Resampling.LANCZOS) for picture in pictures)
        milliseconds = [max(1, round(1000 * seconds)) for seconds in shown]
        first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0, quality=QUALITY, method=4)
        return sum(shown)


def show(frontend: Frontend) -> Recording:
    """The demo's first minute, as an artist has it."""
    card = frontend.panel().get_by_test_id("template-workflow-00_demo")
    frontend.page.wait_for_function(LOADED)
    frontend.page.wait_for_timeout(SETTLED)
    recording = Recording(frontend)
    recording.hold(0.6)
    recording.point(card)
    frontend.open_card(card)
    recording.hold(0.6)
    run(frontend, recording, 1.2)
    text = frontend.page.locator("textarea").first
    recording.point(text)
    text.fill("")
    text.press_sequentially(PROMPT)
    run(frontend, recording, 1.8)
    return recording


def run(frontend: Frontend, recording: Recording, seconds: float) -> None:
    """Run the graph, and look at its pictures for so long."""
    recording.point(frontend.page.get_by_test_id("queue-button"))
    recording.longest = LONGEST_OF_A_RUN
    frontend.run()
    recording.longest = LONGEST
    recording.hold(seconds)


def main() -> None:
    """Write the moving picture, and say how long and how large it is."""
    with demo_host() as server, sync_playwright() as playwright:
        server.post("/settings", **SETTINGS)
        frontend = Frontend(chromium(playwright), f"{server.url}/", lambda prompt: None)
        frontend.page.add_init_script(POINTER)
        frontend.open()
        recording = show(frontend)
    seconds = recording.save(FILE)
    print(f"{FILE}: {len(recording.frames)} frames, {seconds:.1f} s, {FILE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
