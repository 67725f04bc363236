"""`pcm tag`: changes entries of a LoRA's header, and not a byte of its tensors."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageOps
from safetensors.torch import load_file

from ...samplers import Recipe
from ...samplers.families import family_title
from ...samplers.lora_family import family_from_metadata
from ...samplers.lora_file import (
    PEFT_KEY,
    LoraHeader,
    header_text,
    read_header,
    tensor_hash,
)
from ...samplers.recipe import HEADER_KEY
from ...samplers.writing import copy_with_metadata
from ..lora.hashes import hashes
from ..system.pages import jpeg_url
from .pairs import HASHES, check_out
from .sidecars import open_picture

THUMBNAIL = "modelspec.thumbnail"
SIDE, QUALITY = 256, 90  # a thumbnail's side in pixels, as ModelSpec wants it, and its quality as a JPEG
NETWORK = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")
# entries that the tensors decide: a header that says otherwise lies
OF_TENSORS = (*HASHES, *NETWORK, PEFT_KEY, "format")


def tag(
    source: Path,
    changes: dict[str, str],
    remove: Collection[str] = (),
    out: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Set and remove entries of a safetensors header; without `out` the file itself is changed, whole or not at all.

    `sshs_legacy_hash`, a hash of the `ss_*` entries too, is made anew where one of them changes; a
    `pcm.recipe` brings its `modelspec.usage_hint`. Returns figures, and a sentence on them as "text". Raises
    ValueError for an entry that is to be removed and is not there, one that the tensors decide, or that tells
    of another family, and for a header that would grow above `MOST_HEADER` bytes; OSError where it cannot be
    written.
    """
    header = read_header(source)
    target = out or header.path.resolve()  # a link stays a link
    if out is not None:
        check_out(out, [source], overwrite)
    _check(header, changes, remove)
    if HEADER_KEY in changes:  # the same for people, lest the two differ
        changes = {"modelspec.usage_hint": Recipe.from_header(changes[HEADER_KEY]).usage_hint()} | changes
    figures = {"out": str(target), "set": sorted(changes), "removed": sorted(remove)}
    if any(key.startswith("ss_") for key in (*changes, *remove)):
        changes = changes | _legacy_hash(header, changes, remove)

    try:
        # in the target's own folder: a rename replaces a file in one step only within a disk
        with TemporaryDirectory(dir=target.parent, prefix=".pcm-tag-") as folder:
            copy = Path(folder) / header.path.with_suffix(".safetensors").name
            copy_with_metadata(source, copy, changes, remove=remove)
            os.replace(copy, target)
    except OSError as error:
        advice = "Choose another folder with --out; the file is as it was."
        raise OSError(f"Cannot write {target}: {error}. {advice}") from error

    size = len(header_text(target))
    text = f"{target}: {len(figures['set'])} set, {len(remove)} removed; header {size} bytes, tensors as they were"
    return figures | {"header_bytes": size, "tensor_hash": tensor_hash(target), "text": text}


def thumbnail(picture: Path) -> dict[str, str]:
    """The entry that shows a picture in ComfyUI's model library and SwarmUI: a JPEG, `SIDE` pixels square, as data URL.

    The middle of the picture is taken. Raises as `open_picture` does.
    """
    square = ImageOps.fit(open_picture(picture), (SIDE, SIDE), Image.Resampling.LANCZOS)
    return {THUMBNAIL: jpeg_url(square, QUALITY)}


def _legacy_hash(header: LoraHeader, changes: dict[str, str], remove: Collection[str]) -> dict[str, str]:
    """The entry `sshs_legacy_hash` for the changed header; {} for a file that has none."""
    entries = {k: v for k, v in (header.metadata | changes).items() if k.startswith("ss_") and k not in remove}
    key = "sshs_legacy_hash"
    return {k: v for k, v in hashes(load_file(header.path), entries).items() if k == key and key in header.metadata}


def _check(header: LoraHeader, changes: dict[str, str], remove: Collection[str]) -> None:
    """Raise ValueError for a change that is none, contradicts another, or makes the header say what is not true."""
    name = header.path.name
    if not changes and not remove:
        raise ValueError("Nothing to change. Give key=value, or --remove key.")
    if both := sorted(changes.keys() & set(remove)):
        raise ValueError(f"{both[0]} is to be both set and removed. Choose one.")
    for key in remove:
        if key not in header.metadata:
            known = ", ".join(sorted(header.metadata)) or "none"
            raise ValueError(f"{name} has no entry {key!r} to remove; available: {known}.")
        if key == PEFT_KEY:
            raise ValueError(f"{key} holds the LoRA's alpha: without it, it would be of another strength.")
    for key, value in changes.items():
        if key in OF_TENSORS:
            raise ValueError(f"{key} is what the tensors say, and is not set by hand. Leave it out.")
        meant = family_from_metadata({key: value})
        family = LoraHeader(header.path, header.tensors, {}).family or family_from_metadata(header.metadata)
        if meant and family and meant != family:
            raise ValueError(f"{key} tells of {family_title(meant)}, but {name} is a LoRA for {family_title(family)}.")
