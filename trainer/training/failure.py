"""Why a run ends early, and what is left of it."""

from __future__ import annotations

from pathlib import Path


class RunFailed(RuntimeError):
    """The run could not be finished; the message says why, what is kept, and what to do."""

    ending = "failed"  # the word for it in the run's log


class RunStopped(RunFailed):
    """The run was asked to stop, and can go on."""

    ending = "stopped"


def what_is_kept(run: Path) -> str:
    """The newest checkpoint in a run's folder, in the words of a failure's message."""
    folder = run / "checkpoints"
    newest = max(folder.glob("step-*.safetensors"), default=None)
    if newest is None:
        return "No checkpoint was due yet, and what was cached is kept"
    return f"The last checkpoint, {newest.stem}, is kept in {folder}"
