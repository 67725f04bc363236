"""Files that are written whole or not at all.

How: `samplers.writing.written_whole` writes to a temporary name beside the file, flushes that to disk, and
renames it. A rename is the one step that the system does whole; flushed before it, the new name never stands
for half a file, even after a loss of power.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...samplers.writing import written_whole


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all. Equal tensors and metadata give equal bytes.

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
    """Put the header's metadata in alphabetical order, in place.

    safetensors writes them in another order each time, and equal runs must give equal bytes. Raises OSError
    for a header that would change its length, which would move the tensors behind it.
    """
    length = struct.unpack("<Q", file.read(8))[0]
    header = json.loads(file.read(length))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    # as safetensors itself writes it: compact, and filled up with blanks
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
    if len(text) != length:
        raise OSError("its header cannot be put in order")
    file.seek(8)
    file.write(text)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 whole or not at all. Raises OSError where it cannot be written."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")
