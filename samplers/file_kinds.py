"""What a file is that is no safetensors file, by its first bytes: a download often leaves another in its place."""

from __future__ import annotations

import re
from pathlib import Path

HEAD = 512  # bytes that tell
PICTURE = "a picture"
AGAIN = "Download the file itself again."
PICKLE = "Only .safetensors files are read (no .ckpt, .pt, .bin): convert it."
# how a file begins, white space and a byte order mark aside -> what it is, and what to do
KINDS = (
    (rb"version https://git-lfs", "a git-lfs pointer", "Run git lfs pull, or download the file itself again."),
    (rb"(?i)<(!doctype html|html|head|body)\b", "a web page, such as a site's for signing in", AGAIN),
    (rb"<\?xml|<Error>", "XML, such as a server's message of an error", AGAIN),
    (rb"\{|\[\s*[\[{\"\]\d]", "JSON, such as a server's message of an error", AGAIN),
    (rb"GGUF", "a GGUF file, whose weights are quantised", "Take the model in .safetensors, in 16 bits."),
    (rb"PK\x03\x04", "a zip archive or a file of torch.save", PICKLE),
    (rb"\x80[\x02-\x05]", "a pickle, as torch.save wrote it", PICKLE),
    (rb"\x1f\x8b|7z\xbc\xaf|Rar!|\xfd7zXZ|\x28\xb5\x2f\xfd", "a packed archive", "Unpack it first."),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP", PICTURE, "Take the model that it shows."),
    (rb"\x89HDF", "an HDF5 file", "Take the model in .safetensors."),
)  # fmt: skip


def known_kind(head: bytes) -> tuple[str, str] | None:
    """What a file is that begins with these bytes, and what to do; None where `KINDS` has no such beginning."""
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next(((kind, advice) for pattern, kind, advice in KINDS if re.match(pattern, begin)), None)


def kind_of(path: Path) -> str:
    """What a file is that is no safetensors file, and what to do, in a sentence or two without its name at the front:
    "is a web page, such as a site's for signing in, and no .safetensors file. Download the file itself again."."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        return f"is empty (0 bytes). {AGAIN}"
    if known := known_kind(head):
        kind, advice = known
        return f"is {kind}, and no .safetensors file. {advice}"
    if re.fullmatch(rb"[\t\n\r\x20-\x7e]{8,}", head):
        return f"is a text that begins {head[:30].decode('ascii')!r}, and no .safetensors file. {AGAIN}"
    return "is not a .safetensors file, the only kind read (no .ckpt, .pt, .bin): convert it, or get it again."
