"""Starts a ComfyUI up to its custom nodes, and prints as JSON what each of them did to it while it was loaded.

Run with the host's own interpreter: `python guest.py COMFYUI_FOLDER BASE_FOLDER`. All that modules hold is compared, by
identity: names, classes with their methods, tables with their entries.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

HOST, BASE = (Path(folder).resolve() for folder in sys.argv[1:])
sys.path[0] = str(HOST)  # not this file's own folder, which has a server.py too
sys.argv = ["main.py", "--cpu", "--disable-api-nodes", "--base-directory", str(BASE)]
os.chdir(HOST)

import main  # noqa: E402, F401  the host's: it imports all the rest, and starts no server where it is imported
import torch  # noqa: E402

import nodes  # noqa: E402

LOADS = 4
SKIPPED = ("__builtins__", "__warningregistry__")
DEPTH = 4  # of tables in tables
TABLES = (dict, list, tuple, set, frozenset)
PLAIN = (int, float, str, bytes, tuple, type(None))
GONE = object()  # in place of what is not there


class Table(NamedTuple):
    """A table as it was: its value, and copies of its entries by their keys (of a set their number alone)."""

    value: Any
    length: int
    entries: dict[Any, Any]


def copied(value: Any, depth: int = DEPTH) -> Any:
    """The value itself; a `Table` where it is one, whose entries are copied in the same way."""
    table = vars(value) if isinstance(value, argparse.Namespace) else value
    if not depth or not isinstance(table, TABLES):
        return value
    if isinstance(table, (set, frozenset)):
        return Table(value, len(table), {})
    items = list(table.items()) if isinstance(table, dict) else enumerate(list(table))
    return Table(value, len(table), {key: copied(entry, depth - 1) for key, entry in items})


def of_module(name: str, module: Any) -> dict[str, Any]:
    """What a module holds, its classes' members included; modules in it count for themselves."""
    members = {}
    for key, value in list(vars(module).items()) if isinstance(module, ModuleType) else ():
        if isinstance(value, ModuleType) or key in SKIPPED or value is sys.modules:
            continue
        members[f"{name}.{key}"] = copied(value)
        if isinstance(value, type) and value.__module__ == name:
            for member, content in list(vars(value).items()):
                members[f"{name}.{key}.{member}"] = copied(content)
    return members


def of_process() -> dict[str, Any]:
    """What could be changed that no module holds."""
    loggers = [logging.root, *(log for log in logging.root.manager.loggerDict.values() if hasattr(log, "handlers"))]
    settings = {
        "torch dtype": torch.get_default_dtype(),
        "torch threads": torch.get_num_threads(),
        "torch gradients": torch.is_grad_enabled(),
        "torch deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch precision": torch.get_float32_matmul_precision(),
        "torch random": torch.get_rng_state().numpy().tobytes(),
        "random": random.getstate(),
        "threads": threading.active_count(),
        "atexit": atexit._ncallbacks(),
    }
    tables = {log.name: (log.level, *log.handlers, *log.filters) for log in loggers}
    tables |= {str(number): signal.getsignal(number) for number in signal.valid_signals()} | dict(os.environ)
    return settings | {f"process {name}": value for name, value in tables.items()}


def state(modules: dict[str, Any]) -> dict[str, Any]:
    """Everything that a pack could change, by name: what these modules hold, and the process beside them."""
    contents = of_process()
    for name, module in modules.items():
        contents.update(of_module(name, module))
    return contents


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names under which something else is found than before."""
    names = ((name, before.get(name, GONE), after.get(name, GONE)) for name in {**before, **after})
    return sorted(other for each in names for other in different(*each))


def different(name: str, before: Any, after: Any) -> Iterator[str]:
    """The name, where something else is under it than before, and the names of a table's entries that are others.

    Objects must be the same ones; plain values, which some tables make anew, need only be equal.
    """
    tables = isinstance(before, Table) and isinstance(after, Table)
    a, b = (before.value, after.value) if tables else (before, after)
    if a is not b and not (isinstance(a, PLAIN) and type(a) is type(b) and a == b):
        yield name
    if not tables:
        return
    if before.length != after.length:
        yield f"{name} length"
    for key in before.entries | after.entries:
        entries = before.entries.get(key, GONE), after.entries.get(key, GONE)
        if entries[0] is not entries[1]:  # of the same object there is nothing to name
            yield from different(f"{name}[{key!r:.80}]", *entries)


class AuditWatch:
    """The work that is done from `start` to `stop`: files opened that are no Python, processes, connections."""

    KINDS = ("open", "socket.", "subprocess.", "os.system")

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.on and event.startswith(self.KINDS):
            name = str(arguments[0]) if event == "open" else ""
            if not name.endswith((".py", ".pyc")):
                self.seen.append(f"{event} {name}".strip())

    def start(self) -> None:
        self.on, self.seen = True, []

    def stop(self) -> list[str]:
        self.on = False
        return self.seen


class Visits:
    """Takes the place of the host's `load_custom_node`, and notes what it does for each custom node."""

    def __init__(self, load: Callable[..., Awaitable[bool]]):
        self.load, self.watch = load, AuditWatch()
        self.reports, self.again = {}, {}

    async def __call__(self, path: str, *rest: Any, **more: Any) -> bool:
        if more.get("module_parent") != "custom_nodes":
            return await self.load(path, *rest, **more)
        known = dict(sys.modules)
        before = state(known)
        self.watch.start()
        await self.load(path, *rest, **more)
        work = self.watch.stop()
        own = path.replace(".", "_x_")
        self.reports[path] = {
            "changed": changed(before, state(known)),
            "modules": sorted(name for name in {*sys.modules} - {*known} if not name.startswith(own)),
            "work": work,
            "names": sorted(vars(sys.modules[own])),
        }
        self.again[path] = lambda: self.load(path, *rest, **more)
        return True

    async def time(self, path: str) -> list[float]:
        """CPU seconds of the process to load a custom node, `LOADS` times as if it was the first; compiled once."""
        sys.dont_write_bytecode, sys.pycache_prefix, seconds = False, str(BASE / "pycache"), []
        for _ in range(LOADS):
            for name in [name for name in sys.modules if name.startswith(path.replace(".", "_x_"))]:
                del sys.modules[name]
            start = time.process_time()
            await self.again[path]()
            seconds.append(time.process_time() - start)
        return seconds


async def visit() -> dict[str, dict[str, Any]]:
    """What each custom node did, by its file's or folder's name."""
    nodes.load_custom_node = visits = Visits(nodes.load_custom_node)
    await nodes.init_extra_nodes(init_custom_nodes=True, init_api_nodes=False)
    return {Path(path).name: report | {"seconds": await visits.time(path)} for path, report in visits.reports.items()}


print(json.dumps(asyncio.run(visit())))
