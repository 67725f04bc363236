"""Checkpoints: tensors by group and JSON facts in one safetensors file, from which a run goes on exactly."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ...samplers.lora_file import read_header
from ..system.files import write_tensors

# (step, facts)
Facts = tuple[int, dict[str, Any]]
# (step, tensors by group, facts)
State = tuple[int, dict[str, dict[str, Tensor]], dict[str, Any]]


def save_state(folder: Path, step: int, groups: dict[str, dict[str, Tensor]], facts: dict[str, Any], keep: int) -> Path:
    """Save tensors by group (adapter, average, optimizer) and JSON facts after `step`; the last `keep` files stay.

    Raises OSError where the file cannot be written; the older ones are then untouched.
    """
    tensors = {f"{group}/{name}": t.detach().cpu() for group, named in groups.items() for name, t in named.items()}
    path = folder / f"step-{step:07d}.safetensors"
    write_tensors(path, tensors, {"step": str(step), "facts": json.dumps(facts)})
    for old in sorted(folder.glob("step-*.safetensors"))[:-keep]:
        old.unlink()
    return path


def latest_facts(folder: Path) -> Facts | None:
    """Step and facts of the newest checkpoint, or None. Raises ValueError when it is damaged."""
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
    """Step, tensors and facts of the newest checkpoint, or None. Raises ValueError when it is damaged."""
    newest = _newest(folder)
    if newest is None:
        return None
    step, facts = latest_facts(folder)
    groups: dict[str, dict[str, Tensor]] = {}
    with safe_open(newest, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (a safetensors file, not a dict)
            group, slash, name = key.partition("/")
            if not slash:
                raise _damaged(newest, f"{key!r} is no name of its tensors.")
            groups.setdefault(group, {})[name] = file.get_tensor(key)
    return step, groups, facts


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
    before = facts["base"]
    if before != base_hash:
        raise ValueError(
            f"The base {path} is not the one that this run was begun with: its SHA-256 was {before[:16]}… and is "
            f"{base_hash[:16]}… now. Put the other file back to go on, use another output folder to start anew, or "
            "--accept-changes."
        )


def _differences(then: dict, now: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    """(dotted key, value then, value now) for every setting that differs between two nested tables, in order."""
    differences = []
    for key in then.keys() | now.keys():
        before, after = then.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            differences += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            differences.append((prefix + key, before, after))
    return sorted(differences)
