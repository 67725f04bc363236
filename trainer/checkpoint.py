"""Atomic files, and checkpoints that resume exactly."""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..samplers.lora_file import read_header
from ..samplers.writing import written_whole

# (step, facts)
Facts = tuple[int, dict[str, Any]]
# (step, tensors by group, facts)
State = tuple[int, dict[str, dict[str, Tensor]], dict[str, Any]]


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all: to a temporary name, flushed to disk, renamed.

    Raises OSError naming the file when the disk is full or read-only; what stood there before is untouched.
    """
    try:
        with written_whole(path) as part:
            save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata)
            with part.open("rb+") as file:
                _sort_metadata(file)
    except (OSError, SafetensorError) as error:
        advice = "Free space or choose another folder; nothing that was there is lost."
        raise OSError(f"Cannot write {path}: {error}. {advice}") from error


def _sort_metadata(file: BinaryIO) -> None:
    """Put the header's metadata in order: safetensors writes them in a new one each time, and equal runs must give
    equal bytes."""
    length = struct.unpack("<Q", file.read(8))[0]
    header = json.loads(file.read(length))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
    if len(text) != length:
        raise OSError("its header cannot be put in order")
    file.seek(8)
    file.write(text)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def save_state(folder: Path, step: int, groups: dict[str, dict[str, Tensor]], facts: dict[str, Any], keep: int) -> Path:
    """Save tensors by group (adapter, average, optimizer) and JSON facts after `step`; the last `keep` files stay."""
    tensors = {f"{group}/{name}": t.detach().cpu() for group, named in groups.items() for name, t in named.items()}
    path = folder / f"step-{step:07d}.safetensors"
    write_tensors(path, tensors, {"step": str(step), "facts": json.dumps(facts)})
    for old in sorted(folder.glob("step-*.safetensors"))[:-keep]:
        old.unlink()
    return path


def latest_facts(folder: Path) -> Facts | None:
    """Those of the newest checkpoint, or None. Raises ValueError when it is damaged."""
    newest = _newest(folder)
    if newest is None:
        return None
    try:
        metadata = read_header(newest).metadata
        return int(metadata["step"]), json.loads(metadata["facts"])
    except (ValueError, LookupError) as error:
        raise _damaged(newest, str(error).removesuffix(" Get it again.")) from error


def _newest(folder: Path) -> Path | None:
    return max(folder.glob("step-*.safetensors"), default=None)


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(
        f"The checkpoint {path} is damaged ({why}) "
        "Delete it: the run then goes on from the one before it, or from the start."
    )


def load_latest_state(folder: Path) -> State | None:
    """That of the newest checkpoint, or None. Raises ValueError when it is damaged."""
    found = latest_facts(folder)
    if found is None:
        return None
    groups: dict[str, dict[str, Tensor]] = {}
    newest = _newest(folder)
    with safe_open(newest, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (a safetensors file, not a dict)
            group, slash, name = key.partition("/")
            if not slash:
                raise _damaged(newest, f"{key!r} is no name of its tensors.")
            groups.setdefault(group, {})[name] = file.get_tensor(key)
    step, facts = found
    return step, groups, facts


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """An optimizer's state as named tensors: "<parameter>/<entry>"; numbers become 0-d tensors, and entries that hold
    more (bitsandbytes') come as "<parameter>/<entry>/<entry>"."""
    state = optimizer.state_dict()["state"]
    return {f"{names[i]}/{entry}": value for i, own in state.items() for entry, value in _flat(own)}


def _flat(state: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for entry, value in state.items():
        if isinstance(value, dict):  # their tables are one tensor for all parameters, which a file cannot hold twice
            yield from ((path, tensor.clone()) for path, tensor in _flat(value, f"{prefix}{entry}/"))
        else:
            yield f"{prefix}{entry}", torch.as_tensor(value)


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], names: list[str]) -> None:
    """Put `optimizer_tensors` back."""
    number = {name: i for i, name in enumerate(names)}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, *within, entry = key.split("/")
        i = number[name]
        own = state.setdefault(i, {})
        for outer in within:
            own = own.setdefault(outer, {})
        # in the order in which its parameter lies in memory, which fused kernels go by
        as_parameter = value.shape == parameters[i].shape and value.dtype == parameters[i].dtype
        own[entry] = torch.empty_like(parameters[i]).copy_(value) if as_parameter else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def agreed_changes(
    folder: Path, before: Facts, settings: dict[str, Any], may_change: Collection[str] = (), accept: bool = False
) -> list[dict[str, Any]]:
    """Every change of settings between a run's starts: {"step": n, "changed": {dotted key: [then, now]}}.

    folder: of the run. before: its newest checkpoint's, which says what it was made with. may_change: keys that may
    always differ. accept: whether others may too; else ValueError shows them.
    """
    step, facts = before
    if "settings" not in facts:
        raise ValueError(
            f"{folder} holds a run of an earlier version, which drew other samples. "
            "Use another output folder to start anew, or delete the folder."
        )
    earlier = facts["changes"]
    changed = {k: [a, b] for k, a, b in _differences(facts["settings"], settings) if k not in may_change}
    if not changed:
        return earlier
    if not accept:
        lines = "\n".join(f"  {key}: {then} then, {now} now" for key, (then, now) in changed.items())
        raise ValueError(
            f"{folder} holds a run with other settings:\n{lines}\n"
            "Use the same settings to go on, another output folder to start anew, or --accept-changes to go on with "
            "the new ones."
        )
    return [*earlier, {"step": step, "changed": changed}]


def check_same_base(facts: dict[str, Any], path: str, base_hash: str) -> None:
    """Raise ValueError where a checkpoint is of a base with another hash; before anything is cached of it."""
    then = facts["base"]
    if then != base_hash:
        raise ValueError(
            f"The base {path} is not the one that this run was begun with: its SHA-256 was {then[:16]}… and is "
            f"{base_hash[:16]}… now. Put the other file back to go on, use another output folder to start anew, or "
            "--accept-changes."
        )


def _differences(a: dict, b: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    found = []
    for key in a.keys() | b.keys():
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found += _differences(x, y, f"{prefix}{key}.")
        elif x != y:
            found.append((prefix + key, x, y))
    return sorted(found)
