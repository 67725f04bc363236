"""ComfyUI's page in a headless browser, as an artist uses it: templates, widgets, Run, what nodes show, help."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Route, TimeoutError, expect

SECONDS = 120  # to wait for anything: a busy machine draws a frame a second
SIZE = {"width": 1440, "height": 900}
SETTINGS = {  # no greeting at the first start; text on nodes at any zoom; nothing over the graph
    "Comfy.TutorialCompleted": True,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}
# milliseconds until complaints have come, notices have gone, a picture of a few kB is there, and a template is open
COMPLAINING, NOTICES, PICTURE, OPENING = 500, 6000, 15000, 30000
MARGIN = (140, 30, 80, 90)  # pixels above, right, below and left of the graph that the page's bars are over
SIDEBAR = ".side-tool-bar-container, [data-testid=side-toolbar]"
COMPLAINTS = ":is([role=dialog], [data-testid=error-overlay])"
TABS = ".workflow-tabs"
ALL = "app.graph.nodes.map((node) => node.type)"
TEXTS = ".dom-widget:visible, .lg-node-widget:visible"  # texts on nodes, and those in Nodes 2.0
OURS = re.compile("PCM|phased-consistency")
IN_A_LANGUAGE = re.compile(r"/docs/\w+/[\w-]+\.md$")  # a help page is looked for in the artist's language first


@dataclass(frozen=True)
class PageRun:
    """What the page showed while a graph ran. prompt: what it queued; progress: of nodes by kind, in order of time."""

    prompt: dict[str, Any]
    error: str | None
    progress: dict[str, list[float]]
    previews: set[str]


class Frontend:
    """The page of one running ComfyUI.

    stand_in changes a prompt on its way to the server, for what the tests do not have. errors: exceptions in the page,
    and what its console says of us.
    """

    def __init__(self, browser: Browser, url: str, stand_in: Callable[[dict[str, Any]], None]):
        self.url, self.errors, self._stand_in, self._queued = url, [], stand_in, []
        self.page: Page = browser.new_page(viewport=SIZE, reduced_motion="reduce")
        self.page.set_default_timeout(SECONDS * 1000)
        self.page.add_init_script(path=Path(__file__).with_name("page.js"))
        self.page.on("pageerror", lambda error: self.errors.append(f"{error} {error.stack}"))
        self.page.on("console", self._note)
        # beyond this machine is nothing to wait for, and the core templates' moving pictures take all the time there is
        self.page.route(lambda at: not at.startswith((url, "blob:", "data:")), lambda route: route.abort())
        self.page.route(re.compile(r"/templates/.*\.(webp|png|mp4)"), lambda route: route.abort())
        self.page.route(re.compile("/prompt$"), self._queue)
        self.open()

    def open(self) -> None:
        """Load the page, or load it again."""
        self.page.goto(self.url, wait_until="commit")
        self.page.wait_for_function("tests.ready()")
        self.page.evaluate("tests.record()")

    def _note(self, message: ConsoleMessage) -> None:
        source = message.location["url"]
        text = f"{message.text} {source}"
        ours = source.startswith(self.url) and OURS.search(text) and not IN_A_LANGUAGE.search(source)
        if message.type == "error" and ours:
            self.errors.append(text)

    def _queue(self, route: Route) -> None:
        body = route.request.post_data_json
        if body is None:
            return route.continue_()
        self._queued.append(json.loads(json.dumps(body["prompt"])))
        self._stand_in(body["prompt"])
        route.continue_(post_data=json.dumps(body))

    def panel(self) -> Locator:
        """The template browser, open at this pack's templates."""
        panel = self.page.get_by_role("dialog")
        if panel.count():  # which a test that failed has left open
            self.dismiss()
        self.page.locator(SIDEBAR).get_by_role("button", name="Templates").first.click()
        panel.get_by_text("phased-consistency", exact=True).first.click()
        return panel

    def open_template(self, name: str) -> int:
        """Open a template of this pack from the template browser; returns the width of its picture there, or 0."""
        panel = self.panel()
        panel.get_by_placeholder(re.compile("search", re.IGNORECASE)).fill(name)
        card = panel.get_by_test_id(f"template-workflow-{name}")
        card.wait_for()
        width = self._thumbnail(name)
        self.open_card(card)
        return width

    def open_card(self, card: Locator) -> None:
        """Open the template of this card."""
        panel = self.page.get_by_role("dialog")
        self.page.evaluate("tests.leave()")
        card.click()
        try:
            panel.wait_for(state="detached", timeout=OPENING)
        except TimeoutError:  # a card that is just drawn anew takes no click
            with suppress(TimeoutError):
                card.click(timeout=COMPLAINING)
            panel.wait_for(state="detached")
        self.page.wait_for_function("tests.arrived()")
        self.page.wait_for_timeout(COMPLAINING)

    def _thumbnail(self, name: str) -> int:
        try:
            return self.page.wait_for_function("name => tests.thumbnail(name)", arg=name, timeout=PICTURE).json_value()
        except TimeoutError:
            return 0

    def load(self, graph: dict[str, Any], name: str | None = None) -> None:
        """Put a graph into the page, without the template browser, in a tab of this name."""
        self.page.evaluate("([graph, name]) => app.loadGraphData(graph, true, true, name)", [graph, name])
        self.page.wait_for_timeout(COMPLAINING)

    def load_prompt(self, graph: dict[str, Any]) -> None:
        """Put a graph into the page that is in the form that the server takes."""
        self.settle()
        self.page.evaluate("graph => app.loadApiJson(graph, 'graph.json')", graph)
        self.page.wait_for_timeout(COMPLAINING)

    def settle(self) -> None:
        """Let the page note what a run has changed in the open graph.

        Else it does so while loadApiJson() builds another graph, and keeps that one for the open tab's: a fault of
        ComfyUI's frontend that a busy machine shows.
        """
        self.page.evaluate("tests.take()")
        self.page.wait_for_timeout(COMPLAINING)

    def tab(self) -> str:
        """The name of the tab that is open."""
        return self.page.evaluate("app.extensionManager.workflow.activeWorkflow.filename")

    def open_tab(self, name: str) -> None:
        """Go back to a graph that is open, by its tab."""
        self.page.evaluate("tests.leave()")
        self.page.locator(TABS).get_by_text(name, exact=True).first.click()
        self.page.mouse.move(
            SIZE["width"] / 2, SIZE["height"] / 2
        )  # away from the picture of the tab, which is a dialog
        self.page.wait_for_function("tests.arrived()")
        self.page.wait_for_timeout(COMPLAINING)

    def texts(self) -> dict[str, str]:
        """What is written on the nodes that are shown, by their ids."""
        return self.page.evaluate("tests.texts()")

    def complaints(self) -> list[str]:
        """What the page says of missing nodes, missing files and refused graphs."""
        return self.page.locator(COMPLAINTS).all_inner_texts()

    def dismiss(self) -> None:
        """Close the dialog in which an older page tells of a failure; newer ones have none to be closed."""
        self.page.keyboard.press("Escape")
        expect(self.page.get_by_role("dialog")).to_have_count(0, timeout=SECONDS * 1000)

    def unknown_nodes(self) -> list[str]:
        """Kinds of nodes in the graph that this ComfyUI does not have."""
        return self.page.evaluate("tests.unknown()")

    def set(self, kind: str, widget: str, value: float) -> None:
        """Type a number into a widget of the node of this kind."""
        self.page.mouse.click(*self.page.evaluate("([kind, name]) => tests.place(kind, name)", [kind, widget]))
        self.page.locator(".graphdialog input").fill(str(value))
        self.page.keyboard.press("Enter")
        is_set = "([kind, name, value]) => tests.widget(kind, name).value === value"
        self.page.wait_for_function(is_set, arg=[kind, widget, value])

    def run(self, then: Callable[[], None] | None = None) -> PageRun:
        """Press Run, and wait until the graph has ended or the page complains. then: what is done once it is queued."""
        self.page.evaluate("complaints => tests.start(complaints)", COMPLAINTS)
        button = self.page.get_by_test_id("queue-button")
        if then is None:
            button.click()
        else:
            with self.page.expect_response(re.compile("/prompt$")):
                button.click()
            then()
        complaints = f"{COMPLAINTS}:not([data-earlier])"
        self.page.wait_for_function(f"tests.ended() || document.querySelector('{complaints}')")
        moments = self.page.evaluate("tests.moments")
        ended = next((moment for moment in moments if moment["kind"].startswith("execution")), {})
        progress = defaultdict(list)
        for moment in moments:
            for kind, value in moment["progress"].items():
                progress[kind].append(value)
        return PageRun(
            prompt=self._queued[-1],
            error=None if ended.get("kind") == "execution_success" else ended.get("error") or str(self.complaints()),
            progress=dict(progress),
            previews={kind for moment in moments for kind in moment["previews"]},
        )

    def said(self, kind: str) -> str:
        """The text on the node of this kind, which must be there to see."""
        text = self.page.wait_for_function("kind => tests.widget(kind, '$$node-text-preview')?.value", arg=kind)
        said = text.json_value()
        self.page.locator(TEXTS).filter(has_text=said.splitlines()[0]).first.wait_for()
        return said

    def lines(self, kind: str) -> list[str]:
        """The lines on the node of this kind as they are drawn: all to be seen, no word broken, warnings marked."""
        self.look_at(kind)
        self.page.wait_for_function("kind => tests.lines(kind).every((line) => line.visible)", arg=kind)
        lines = self.page.evaluate("kind => tests.lines(kind)", kind)
        assert all(line["whole"] for line in lines), lines
        assert all(line["marked"] == line["text"].startswith("⚠ ") for line in lines), lines
        return [line["text"] for line in lines]

    def node(self, kind: str, **widgets: Any) -> None:
        """Put a new node of this kind beside the others, as from the menu."""
        self.page.evaluate("([kind, widgets]) => tests.add(kind, widgets)", [kind, widgets])
        self.page.wait_for_timeout(COMPLAINING)

    def give(self, kind: str, **widgets: Any) -> None:
        """Give widgets of the node of this kind other values."""
        self.page.evaluate("([kind, widgets]) => tests.give(kind, widgets)", [kind, widgets])

    def write(self, kind: str, lines: list[str]) -> None:
        """Write lines on the node of this kind, as the host does."""
        self.page.evaluate("([kind, text]) => tests.write(kind, text)", [kind, "\n".join(lines)])

    def heights(self, kind: str) -> tuple[float, float]:
        """The height of the node of this kind in the classic view, and the one that its widgets need."""
        return tuple(self.page.evaluate("kind => tests.heights(kind)", kind))

    def picture(self, kind: str) -> tuple[str, int]:
        """The address and the width of the picture that the node of this kind shows."""
        self.page.wait_for_function("kind => tests.node(kind).imgs?.[0]?.naturalWidth", arg=kind)
        return tuple(self.page.evaluate("kind => tests.node(kind).imgs.map((i) => [i.src, i.naturalWidth])[0]", kind))

    def help(self, kind: str) -> Locator:
        """The help page of the node of this kind, opened as an artist does: by the node, and the i above it."""
        self.look_at(kind)
        self.page.mouse.click(*self.page.evaluate("kind => tests.place(kind)", kind))
        self.page.get_by_test_id("info-button").click()
        page = self.page.locator(".node-help-content")
        page.locator("table").first.wait_for()
        return page

    def look_at(self, *kinds: str) -> None:
        """Show nodes of these kinds as large as they fit beside what is always there."""
        self.page.evaluate("([kinds, margin]) => tests.lookAt(kinds, margin)", [kinds, MARGIN])

    def places(self) -> dict[str, tuple[float, ...]]:
        """Left, top, right and bottom of every node with its title, in the graph's pixels, by id and title."""
        return {name: tuple(place) for name, place in self.page.evaluate("tests.places()")}

    def frames(self) -> list[tuple[str, tuple[float, ...]]]:
        """The title of every group, and left, top, right and bottom of its frame."""
        return [(title, tuple(place)) for title, place in self.page.evaluate("tests.frames()")]

    def zoom(self) -> float:
        return self.page.evaluate("app.canvas.ds.scale")

    def zoom_on(self, width: int, height: int) -> float:
        """The zoom at which a page of this size shows the whole open graph, as large as it fits."""
        more = width - SIZE["width"], height - SIZE["height"]
        return self.page.evaluate(f"([margin, more]) => tests.fit({ALL}, tests.room(margin, more))", [MARGIN, more])

    def cut(self) -> list[str]:
        """Titles and values of widgets that are not shown whole."""
        return self.page.evaluate("tests.cut()")

    def unread(self) -> int:
        """Pixels of the note's text that are below the note's end."""
        return self.page.evaluate("tests.unread()")

    @contextmanager
    def sized(self, width: int, height: int) -> Iterator[None]:
        """The page in another size, with the whole open graph as large as it fits there; then as it was."""
        view = self.page.evaluate("[app.canvas.ds.scale, [...app.canvas.ds.offset]]")
        self.page.set_viewport_size({"width": width, "height": height})
        try:
            self.page.wait_for_timeout(COMPLAINING)
            self.look_at(*self.page.evaluate(ALL))
            yield
        finally:
            self.page.set_viewport_size(SIZE)
            self.page.evaluate("([scale, offset]) => Object.assign(app.canvas.ds, { scale, offset })", view)

    @contextmanager
    def nodes_2(self) -> Iterator[None]:
        """The open graph in Nodes 2.0."""
        self.use("Comfy.VueNodes.Enabled", True)
        try:
            self.page.wait_for_function("tests.elements()")
            yield
        finally:
            self.use("Comfy.VueNodes.Enabled", False)

    def use(self, setting: str, value: Any) -> None:
        """Change a setting."""
        self.page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [setting, value])

    def screenshot(self, name: str, crop: tuple[str, ...] = (), large: tuple[int, int] | None = None) -> None:
        """Write NAME.png into the folder $PCM_SCREENSHOTS, where that is set. crop: to nodes of these kinds. large: the
        size of the page, where it is to be another, with the whole graph."""
        folder = os.environ.get("PCM_SCREENSHOTS")
        if folder and large:
            with self.sized(*large):
                self.screenshot(name, crop)
        elif folder:
            size = self.page.viewport_size
            self.page.mouse.move(size["width"] / 2, size["height"] - 5)  # where nothing is shown beside the pointer
            self.page.wait_for_timeout(NOTICES)
            clip = self.page.evaluate("kinds => tests.area(kinds)", crop) if crop else None
            self.page.screenshot(path=Path(folder, f"{name}.png"), clip=clip)
