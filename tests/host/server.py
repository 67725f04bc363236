"""A real ComfyUI on loopback: where to find one, how to start it on a temporary folder, and how to queue graphs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from websocket import create_connection

START_SECONDS, RUN_SECONDS = 240, 240


def hosts() -> list[Path]:
    """The ComfyUI folders in $COMFYUI_PATH (several are allowed), else comfy-cli's default one; those that exist."""
    named = os.environ.get("COMFYUI_PATH", "").split(os.pathsep)
    folders = [Path(p).expanduser() for p in named if p] or [Path.home() / "comfy" / "ComfyUI"]
    return [p for p in folders if (p / "main.py").is_file()]


def python_of(folder: Path) -> str:
    """The interpreter of a ComfyUI: $COMFYUI_PYTHON, else its own virtual environment's, else this one."""
    if named := os.environ.get("COMFYUI_PYTHON"):
        return named
    own = (folder / env / "bin" / "python" for env in (".venv", "venv"))
    return str(next((p for p in own if p.is_file()), sys.executable))


def environment() -> dict[str, str]:
    """For a host's process: the tests' own environment must not leak into it, nor bytecode into the pack.

    It runs on one thread: small models gain little from more, and on a busy machine the threads wait for one another.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PYTHON", "VIRTUAL_ENV"))}
    return {"OMP_NUM_THREADS": "1", **kept, "PYTHONDONTWRITEBYTECODE": "1"}


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
        """What a node wrote on itself."""
        return self.outputs[node]["text"][0]


@dataclass
class Watched:
    """What a browser is told: text by node, preview pictures, and how far each node is."""

    texts: dict[str, str] = field(default_factory=dict)
    previews: int = 0
    progress: dict[str, tuple[int, int]] = field(default_factory=dict)
    finished: bool = False

    def note(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            kind = int.from_bytes(message[:4], "big")
            self.previews += kind == 1
            if kind == 3:
                end = 8 + int.from_bytes(message[4:8], "big")
                self.texts[message[8:end].decode()] = message[end:].decode()
            return
        event = json.loads(message)
        if event["type"] == "progress":
            self.progress[event["data"]["node"]] = (event["data"]["value"], event["data"]["max"])
        self.finished = event["type"] in ("execution_success", "execution_error")


class Server:
    """One running ComfyUI. `base` holds its models, custom nodes, output; `log` is all it printed so far."""

    def __init__(self, folder: Path, base: Path):
        self.base, self._log = base, base / "server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        options = (
            "--cpu --listen 127.0.0.1 --disable-api-nodes --preview-method latent2rgb --database-url sqlite:///:memory:"
        )
        command = [
            python_of(folder),
            "main.py",
            *options.split(),
            "--port",
            str(self.port),
            "--base-directory",
            str(base),
        ]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(),
            )
        self._wait_until_ready()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                return self.get("/system_stats")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start within {START_SECONDS} s. Its log ends:\n{self.log[-3000:]}")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return json.load(answer)

    def queue(self, graph: dict[str, Any], client: str = "") -> str:
        """Queue a graph and return its id; raises ValueError with the server's words if it is refused."""
        body = json.dumps({"prompt": graph, "client_id": client or uuid.uuid4().hex}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/prompt", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as refusal:
            raise ValueError(refusal.read().decode()) from refusal

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
            time.sleep(0.1)
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
