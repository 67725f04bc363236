"""LoRA files from Python: what one is, its weights, and how good it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.report import evaluate as compare
from ..lora.describe import describe
from ..reporting.progress import Progress
from ..sharing.pairs import Lora
from ..sharing.read import read_lora


def inspect(file: str | Path) -> dict[str, Any]:
    """What a LoRA's header says, its hashes, and which tensors are not finite: the values of `pcm inspect --json`.

    Raises ValueError or FileNotFoundError for a bad file.
    """
    return describe(_path(file))


def load_lora(file: str | Path, *, family: str | None = None, alpha: float | None = None) -> Lora:
    """A LoRA of any published key style: its recipe, and its factors by diffusers' names of the modules.

    family, alpha: for files that do not tell. Raises ValueError or FileNotFoundError for a bad file.
    """
    return read_lora(_path(file), family, alpha)


def evaluate(
    base: str | Path,
    loras: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    steps: Sequence[int] = (1, 2, 4, 8),
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Compare LoRAs with the teacher and the untrained base; write the report into the folder `out`, and return it.

    options: those of `pcm evaluate` by name: prompts, pictures, seed, guidance, features, clip, resolution, dtype,
    family, tokenizer, config, parts, t5. progress: called with each line.
    Raises ValueError or FileNotFoundError for bad input.
    """
    files = [loras] if isinstance(loras, str | os.PathLike) else loras

    def say(line: str) -> None:
        if progress is not None:
            progress(Progress("evaluating", line))

    return compare(os.fspath(base), [_path(file) for file in files], _path(out), steps=[*steps], say=say, **options)


def _path(file: str | Path) -> Path:
    """A path with `~` as the home folder."""
    return Path(file).expanduser()
