"""kohya's hashes of a LoRA file, which A1111 and ModelSpec know it by."""

from __future__ import annotations

import hashlib
import struct

from safetensors.torch import save
from torch import Tensor

EMPTY_HASH = hashlib.sha256().hexdigest()


def hashes(tensors: dict[str, Tensor], ss_metadata: dict[str, str]) -> dict[str, str]:
    """kohya's two hashes: SHA-256 of the tensor bytes, and of 64 KiB at 1 MiB of the file with `ss_*` keys alone."""
    data = save(tensors, ss_metadata)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    by_name = {"sshs_model_hash": hashlib.sha256(data[start:]).hexdigest()}
    if by_name["sshs_model_hash"] == EMPTY_HASH:
        raise ValueError("Refusing to write a LoRA without tensor bytes: its hash would match every other empty file.")
    if len(data) > 0x100000:
        by_name["sshs_legacy_hash"] = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    return by_name
