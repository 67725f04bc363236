"""A real ComfyUI on loopback: how to start it on a temporary folder, and how to queue graphs."""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from websocket import create_connection

from phased_consistency.trainer.system import comfyui as host
from phased_consistency.trainer.system.comfyui import DIRECT
from phased_consistency.trainer.system.comfyui import hosts as hosts
from phased_consistency.trainer.system.comfyui import python_of as python_of
from phased_consistency.trainer.tiny.comfy import write_files

RUN_SECONDS = 240
WARNING = "⚠ "  # before a line on a node that says what is wrong
HERE = Path(__file__).parent
PACK = HERE.parents[1]
BESIDE = ("ComfyUI-GGUF",)  # packs that are tested beside ours, where the host has them


def environment() -> dict[str, str]:
    """For a host's process: no bytecode into the pack, and one thread, since small models gain little from more, and
    on a busy machine the threads wait for one another."""
    return host.environment(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")


class Graph(dict):
    """A graph in the form the server takes."""

    def add(self, kind: str, **inputs: Any) -> str:
        """Add a node and return its id; an input is a value, or a link as `out` makes it."""
        node = str(len(self) + 1)
        self[node] = {"class_type": kind, "inputs": inputs}
        return node


def out(node: str, slot: int = 0) -> list:
    """A link to a node's output."""
    return [node, slot]


@dataclass(frozen=True)
class Run:
    """What the history says of one finished graph."""

    outputs: dict[str, dict[str, Any]]
    error: dict[str, Any] | None

    def text(self, node: str) -> str:
        """What a node wrote on itself, without the marks of warnings."""
        return unmarked(self.outputs[node]["text"][0])

    def warnings(self, node: str) -> list[str]:
        """The lines of it that are marked as warnings."""
        return warnings_in(self.outputs[node]["text"][0])


def unmarked(text: str) -> str:
    return "\n".join(line.removeprefix(WARNING) for line in text.splitlines())


def warnings_in(text: str) -> list[str]:
    return [line.removeprefix(WARNING) for line in text.splitlines() if line.startswith(WARNING)]


@dataclass
class Watched:
    """What a browser is told: text by node, preview pictures (how many, and the last as JPEG), how far each node is,
    and the error if there was one.

    texts: without the marks of warnings. warnings: by node, the lines that are marked.
    """

    texts: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    previews: int = 0
    last_preview: bytes = b""
    progress: dict[str, tuple[int, int]] = field(default_factory=dict)
    finished: bool = False

    def note(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            kind = int.from_bytes(message[:4], "big")
            if kind == 1:
                self.previews += 1
                self.last_preview = message[8:]  # after the kind of picture
            if kind == 3:
                end = 8 + int.from_bytes(message[4:8], "big")
                self.hear(message[8:end].decode(), message[end:].decode())
            return
        event = json.loads(message)
        if event["type"] == "progress":
            self.progress[event["data"]["node"]] = (event["data"]["value"], event["data"]["max"])
        if event["type"] == "executed" and event["data"]["node"] not in self.texts:  # all that a cached node sends
            for text in (event["data"]["output"] or {}).get("text", ()):
                self.hear(event["data"]["node"], text)
        self.finished = event["type"] in ("execution_success", "execution_error")
        if event["type"] == "execution_error":
            self.error = event["data"]

    def hear(self, node: str, text: str) -> None:
        """What a node says, in place of what it has said before."""
        self.texts[node] = unmarked(text)
        self.warnings[node] = warnings_in(text)


class Server(host.Host):
    """One running ComfyUI on the CPU, with ways to queue graphs."""

    def __init__(self, folder: Path, base: Path):
        super().__init__(folder, base, variables=environment())
        self.folder = folder

    def queue(self, graph: dict[str, Any], client: str = "") -> str:
        """Queue a graph and return its id; raises ValueError with the server's words if it is refused."""
        return json.loads(self.post("/prompt", prompt=graph, client_id=client or uuid.uuid4().hex))["prompt_id"]

    def post(self, path: str, **body: Any) -> bytes:
        """What the server answers; raises ValueError with its words if it refuses."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with DIRECT.open(request, timeout=30) as answer:
                return answer.read()
        except urllib.error.HTTPError as refusal:
            raise ValueError(refusal.read().decode()) from refusal

    def history(self, prompt: str) -> dict[str, dict[str, Any]]:
        """The outputs of a finished graph, by node, as API clients read them."""
        return self.get(f"/history/{prompt}")[prompt]["outputs"]

    def run(self, graph: dict[str, Any]) -> Run:
        """Queue a graph and wait for it."""
        return self.wait(self.queue(graph))

    def watch(self, graph: dict[str, Any]) -> Watched:
        """Queue a graph and note what a browser would be told while it runs."""
        client, seen = uuid.uuid4().hex, Watched()
        with closing(
            create_connection(f"ws://127.0.0.1:{self.port}/ws?clientId={client}", timeout=RUN_SECONDS)
        ) as socket:
            self.queue(graph, client)
            while not seen.finished:
                seen.note(socket.recv())
        return seen

    def wait(self, prompt: str) -> Run:
        end = time.monotonic() + RUN_SECONDS
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt}").get(prompt)
            if entry and entry["status"]["completed"] or entry and entry["status"]["status_str"] == "error":
                errors = [detail for kind, detail in entry["status"]["messages"] if kind == "execution_error"]
                return Run(entry["outputs"], errors[0] if errors else None)
            time.sleep(0.02)
        raise TimeoutError(f"The graph did not finish within {RUN_SECONDS} s. The log ends:\n{self.log[-3000:]}")

    def latents(self, graph: Graph, *nodes: str) -> tuple[Run, list[Tensor]]:
        """Run the graph with these nodes' LATENTs saved, and read them back."""
        saves = [graph.add("SaveLatent", samples=out(node), filename_prefix="test") for node in nodes]
        run = self.run(graph)
        assert run.error is None, run.error["exception_message"]
        files = [run.outputs[node]["latents"][0] for node in saves]
        return run, [load_file(self.base / "output" / f["subfolder"] / f["filename"])["latent_tensor"] for f in files]

    def tensors(self, graph: Graph, *links: list) -> tuple[Run, list[Tensor]]:
        """Run the graph with these IMAGEs, (B, H, W, C), and LATENTs saved as they are, and read them back."""
        names = [uuid.uuid4().hex for _ in links]
        for name, link in zip(names, links, strict=True):
            graph.add("TestTensor", value=link, name=name)
        run = self.run(graph)
        assert run.error is None, run.error["exception_message"]
        return run, [load_file(self.base / "output" / f"{name}.safetensors")["value"] for name in names]


def start(folder: Path, base: Path, models: Path, beside: Iterable[str] = BESIDE) -> Server:
    """Start a host on an empty base folder, with this pack, the tests' own nodes, and a folder of models.

    beside: other packs, where the host has them.
    """
    nodes = base / "custom_nodes"
    nodes.mkdir()
    (nodes / "phased-consistency").symlink_to(PACK, target_is_directory=True)
    for helpers in ("helper_nodes.py", "helper_packs.py", "helper_dits.py", "helper_formats.py"):
        shutil.copy(HERE / helpers, nodes)
    for name in beside:
        if (folder / "custom_nodes" / name).is_dir():
            (nodes / name).symlink_to(folder / "custom_nodes" / name, target_is_directory=True)
    (base / "models").symlink_to(models, target_is_directory=True)
    return Server(folder, base)


@contextmanager
def demo_host() -> Iterator[Server]:
    """The first host, with this pack and the demo's files alone, as `make comfy` sets it up."""
    with TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "custom_nodes").mkdir()
        (base / "custom_nodes" / "phased-consistency").symlink_to(PACK, target_is_directory=True)
        write_files(base)
        with Server(hosts()[0], base) as server:
            yield server
