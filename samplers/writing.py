"""Files written whole or not at all, and LoRA files copied with another header."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from .families import family_title
from .lora_alphas import PEFT_KEY
from .lora_file import header_text, read_header
from .lora_modules import DTYPES
from .recipe import HEADER_KEY, Recipe

MOST_HEADER = 1 << 20  # bytes of a LoRA's header that ComfyUI's metadata view reads; safetensors itself reads 100 MB
BLOCK = 1 << 20
LONGEST = 200  # characters of a name in a path: systems take 255 bytes, and a copy's own name is longer while it grows
UNUSABLE = re.compile(r'[\x00-\x1f<>:"|?*]')  # in names on some system; ":" ends a drive's


def path_within(folder: Path, name: str) -> Path:
    """The .safetensors file of this name in a folder: "style", "style.safetensors", "fast/style".

    Raises ValueError for a name that leads out of the folder, or that a file cannot have.
    """
    parts = name.replace("\\", "/").split("/")
    unusable = UNUSABLE.search(name) or not name.isprintable() or max(map(len, parts)) > LONGEST
    if unusable or any(not part.strip() or part.startswith(".") for part in parts):
        raise ValueError(
            f"The name is {name!r:.300}; expected a file's name, with subfolders if you like, such as "
            "fast/style_4_steps. It may not begin with a slash or a drive, nor have empty or hidden parts, '..', or "
            f"more than {LONGEST} characters between slashes."
        )
    target = folder.joinpath(*parts)
    if target.suffix.lower() != ".safetensors":
        target = target.with_name(target.name + ".safetensors")
    if not target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"The name is {name!r}, which leads out of {folder} through a link: choose another subfolder.")
    return target


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which is renamed to `path` in the end.

    It is flushed to disk before, so that a power cut leaves the old file or the new one, and no part of
    either. On any error or interruption it is removed, and the file that stood at `path` is untouched.
    Its permissions are those that the umask gives a new file, whatever writes it: safetensors' own are the
    owner's alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.pcm.part")
    try:
        part.unlink(missing_ok=True)  # of a run that was killed
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":  # the new name must be on disk, too, before a caller deletes an older file
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def stamp_recipe(source: Path, target: Path, recipe: Recipe, overwrite: bool = False) -> bool:
    """Copy a LoRA file with this recipe and its usage hint in the header.

    Returns whether it was written, and raises, as `copy_with_metadata`; and ValueError for a file that is no
    LoRA or one of another family.
    """
    header = read_header(source)
    if header.family not in (None, recipe.family):
        raise ValueError(
            f"{source.name} is a LoRA for {family_title(header.family)}, but the recipe is for "
            f"{family_title(recipe.family)}. Take the recipe of a {family_title(header.family)} LoRA."
        )
    metadata = {HEADER_KEY: recipe.to_header(), "modelspec.usage_hint": recipe.usage_hint()}
    return copy_with_metadata(source, target, metadata, overwrite)


def check_header(name: str, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> int:
    """The bytes that safetensors would write as a LoRA file's header; ValueError above `MOST_HEADER`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    names = {dtype: name for name, dtype in DTYPES.items()}
    start = 0
    # safetensors' own order: the offsets are part of the text, and their digits of its length
    for key, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = start + tensor.nbytes
        header[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    return len(_header_bytes(name, header))


def _header_bytes(name: str, header: Mapping[str, Any], before: int = 0) -> bytes:
    """A header as it is written; ValueError above `MOST_HEADER`, unless it is no longer than one `before` it."""
    text = _json(header)
    text = text.ljust(-(-len(text) // 8) * 8)  # so that the tensors stay aligned
    if len(text) > max(MOST_HEADER, before):
        sizes = {key: len(_json(value)) for key, value in (header.get("__metadata__") or {}).items()}
        largest = max(sizes, key=sizes.get)
        raise ValueError(
            f"The header of {name} would have {len(text)} bytes, but programs read at most {MOST_HEADER} of it. Its "
            f"largest entry is {largest}, {sizes[largest]} bytes: shorten it, or take it out (pcm tag --remove)."
        )
    return text


def _json(value: Any) -> bytes:
    """JSON without spaces, as safetensors writes it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def copy_with_metadata(
    source: Path,
    target: Path,
    metadata: Mapping[str, str],
    overwrite: bool = False,
    remove: Collection[str] = (),
) -> bool:
    """Copy a safetensors file with entries of its header set and removed.

    The other entries stay, and so does every tensor's bytes. The weights are not loaded. AutoV3 and the
    hashes that the header stores are of the tensors, so they stay true.
    Returns whether it was written: a target that is this very copy is left as it is.
    overwrite: whether another file at `target` may be replaced; the source itself never is.
    Raises ValueError for a damaged source, a target that exists, or a header that would grow above
    `MOST_HEADER`; KeyError for an entry to remove that is not there; OSError naming the target when it cannot
    be written, and then no part of the file is left.
    """
    lora = read_header(source)
    source = lora.path
    _check_target(source, target)
    text = header_text(source)
    header = json.loads(text)
    # PEFT's settings stay beside the source: a copy elsewhere would lose its alphas
    beside = {PEFT_KEY: lora.config} if lora.config else {}
    entries = beside | (header.pop("__metadata__", None) or {}) | dict(metadata)
    for key in remove:
        del entries[key]
    new_text = _header_bytes(source.name, {"__metadata__": entries, **header}, before=len(text))
    new_head = struct.pack("<Q", len(new_text)) + new_text
    tensors = 8 + len(text)  # the byte where they begin in the source

    if _is_copy(target, new_head, source, tensors):
        return False
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists already: choose another name, or switch overwrite on.")
    try:
        with written_whole(target) as part, source.open("rb") as old, part.open("wb") as file:
            file.write(new_head)
            old.seek(tensors)
            shutil.copyfileobj(old, file, BLOCK)
    except OSError as error:
        advice = "Free space or choose another name; nothing that was there is lost."
        raise OSError(f"Cannot write {target}: {error}. {advice}") from error
    return True


def _is_copy(target: Path, header: bytes, source: Path, tensors: int) -> bool:
    """Whether there is a file that begins with this header and goes on as `source` does from byte `tensors` on."""
    if not target.is_file() or target.stat().st_size - len(header) != source.stat().st_size - tensors:
        return False
    with target.open("rb") as file, source.open("rb") as old:
        old.seek(tensors)
        if file.read(len(header)) != header:
            return False
        while block := file.read(BLOCK):
            if block != old.read(BLOCK):
                return False
    return True


def _check_target(source: Path, target: Path) -> None:
    """Raise ValueError for a target that is the source itself, or of another format by its name."""
    if target.suffix.lower() != ".safetensors":
        raise ValueError(f"{target.name} must end in .safetensors: a copy in no other format is made.")
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target.name} is the file that is copied, which is never written over: choose another name.")
