"""ComfyUI on this machine: where it is installed, which Python it has, and a running one to ask."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

START_SECONDS, STOP_SECONDS = 240, 20
ADDRESS = "127.0.0.1"
OPTIONS = f"--listen {ADDRESS} --disable-api-nodes --preview-method latent2rgb --database-url sqlite:///:memory:"
PYTHONS = (".venv/bin/python", "venv/bin/python", ".venv/Scripts/python.exe", "venv/Scripts/python.exe")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not reach this machine
PORTABLE = "../python_embeded/python.exe"  # ComfyUI's own download for Windows; it is spelt so


def hosts() -> list[Path]:
    """The ComfyUI folders that exist, of those in $COMFYUI_PATH (one or several), else of comfy-cli's default one."""
    paths = map(os.path.expanduser, os.environ.get("COMFYUI_PATH", "").split(os.pathsep))
    folders = [Path(p).resolve() for p in paths if p] or [default_workspace()]
    return [p for p in folders if (p / "main.py").is_file()]


def default_workspace() -> Path:
    """Where comfy-cli installs ComfyUI unless told otherwise."""
    home = Path.home() if sys.platform == "linux" else Path.home() / "Documents"
    return home / "comfy" / "ComfyUI"


def python_of(folder: Path) -> str:
    """The interpreter of a ComfyUI: $COMFYUI_PYTHON, else its own virtual environment's, else this one."""
    if chosen := os.environ.get("COMFYUI_PYTHON"):
        return chosen
    interpreters = (folder / name for name in (*PYTHONS, PORTABLE))
    return str(next((path for path in interpreters if path.is_file()), sys.executable))


def environment(**defaults: str) -> dict[str, str]:
    """The environment for a host's process: this one's, without what belongs to this Python and to its tests.

    defaults: variables for the host where they are not set here.
    """
    ours = ("CONDA", "PYTEST", "PYTHON", "VIRTUAL_ENV")
    return defaults | {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def has_gpu(folder: Path) -> bool:
    """Whether the torch of this ComfyUI finds a GPU. Raises RuntimeError where it has none."""
    question = "import torch as t; print(getattr(t, 'accelerator', t.cuda).is_available())"
    answer = subprocess.run([python_of(folder), "-c", question], env=environment(), capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(
            f"The Python of {folder}, {python_of(folder)}, cannot import torch: {answer.stderr.strip()[-300:]}. "
            "Set COMFYUI_PYTHON to the one that ComfyUI is started with."
        )
    return answer.stdout.split()[-1] == "True"  # whatever torch printed before


def free_port(wanted: int = 0) -> int:
    """The first port from `wanted` on that no program has; for 0 any. Raises ValueError where a hundred are in use."""
    for port in range(wanted, wanted + 100) if wanted else [0]:
        with socket.socket() as probe:
            try:
                probe.bind((ADDRESS, port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise ValueError(f"The ports {wanted} to {wanted + 99} are all in use: choose another.")


class Host:
    """A running ComfyUI, which is stopped at the end of a `with`.

    folder: ComfyUI itself. base: folder of its models, custom nodes and output, where its log goes too. port:
    0 is any free one. cpu: whether to keep off the GPU. variables: its environment; default: `environment()`.
    Raises RuntimeError with the end of its log when it does not start.
    """

    def __init__(self, folder: Path, base: Path, port: int = 0, cpu: bool = True, variables: Mapping | None = None):
        self.base = base
        self.port = port or free_port()
        self.log_file = base / "server.log"
        options = [*OPTIONS.split(), *(["--cpu"] if cpu else [])]
        places = ["--port", str(self.port), "--base-directory", str(base.resolve())]
        with self.log_file.open("w") as log:
            self._process = subprocess.Popen(
                [python_of(folder), "main.py", *options, *places],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment() if variables is None else variables,
            )
        try:
            self._wait_until_ready()
        except BaseException:  # Ctrl-C too: no server may be left behind
            self.stop()
            raise

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The server's address."""
        return f"http://{ADDRESS}:{self.port}"

    @property
    def log(self) -> str:
        """All that it has printed so far."""
        return self.log_file.read_text(errors="replace")

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                return self.get("/system_stats")
            except OSError:  # nobody listens yet, or not in time
                time.sleep(0.5)
        status = self._process.poll()
        outcome = f"did not start within {START_SECONDS} s" if status is None else f"ended with status {status}"
        raise RuntimeError(f"ComfyUI {outcome}. Its log ends:\n{self.log[-3000:]}")

    def get(self, path: str) -> Any:
        """The JSON at a path of the server."""
        with DIRECT.open(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def wait(self) -> int:
        """Wait until it ends by itself; returns its exit status."""
        return self._process.wait()

    def stop(self) -> None:
        """End it if it still runs; one that does not listen is killed after `STOP_SECONDS`."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
