"""The index of a cache, written once its latents are there: where each sample is, and every prompt once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from ..system.files import write_tensors
from .buckets import Buckets, bucket_notes
from .captions import chosen
from .store import INDEX, LATENTS, PROMPTS, SEVERAL, TEXTS, hashes_of, numbers, open_file, reading, strings

# What becomes of several captions, by the setting `data.captions`.
CHOICES = {
    "first": "the first is taken; data.captions=drawn draws one at each visit, data.captions=joined takes all as one",
    "drawn": "one is drawn at each visit",
    "joined": "all are taken as one",
}


# What a file of latents says of its pictures: how many have a colour profile that counts for nothing.
STRANGE = "strange profiles"


def latents_name(part: int, piece: int, last: bool) -> str:
    """The file of a piece of a part of the data. A part's last piece says so, which shows whether all are there."""
    return f"latents-{part:05d}-{piece:05d}{'-last' * last}.safetensors"


def pieces_there(folder: Path) -> dict[int, dict[int, bool]]:
    """Part -> piece -> whether it is the part's last, for each file of latents in a folder."""
    pieces: dict[int, dict[int, bool]] = {}
    for name in latents_files(folder):
        _, part, piece, *last = Path(name).stem.split("-")
        pieces.setdefault(int(part), {})[int(piece)] = bool(last)
    return pieces


def latents_files(folder: Path) -> list[str]:
    """The names of the latents' files in a folder, in the order of their numbers."""
    return sorted(file.name for file in folder.iterdir() if LATENTS.fullmatch(file.name)) if folder.is_dir() else []


def is_whole(pieces: dict[int, bool]) -> bool:
    """Whether these pieces are all of a part."""
    last = [piece for piece, is_last in pieces.items() if is_last]
    return bool(last) and all(piece in pieces for piece in range(last[0]))


def write_index(folder: Path, buckets: Buckets | None, listed: bool, choice: str = "first") -> None:
    """Write the index and the texts of a folder whose latents are all there.

    buckets: the sizes that were used, if any. listed: whether the user named them. choice: `data.captions`, which
    of several captions count. Raises ValueError for a listed bucket that no picture went to.
    """
    files = latents_files(folder)
    # shapes and prompts are numbered in the order in which they first come; the empty prompt is number 0
    shapes: dict[str, int] = {}
    prompts: dict[str, int] = {"": 0}
    columns: dict[str, list[np.ndarray]] = {"shape": [], "row": [], "prompt": [], "sizes": []}
    counts, skipped, spread = [0], [], False
    several: dict[int, list[int]] = {}  # by sample, the numbers of the prompts of which one is drawn
    number = lines = strange = 0
    for name in files:
        with reading(folder / name), open_file(folder / name) as file:
            facts = file.metadata()
            captions, shapes_here, left_out = (strings(facts[key]) for key in ("captions", "shapes", "skipped"))
            skipped += left_out
            strange += int(facts.get(STRANGE, 0))
            counts.append(len(captions))
            if not captions:
                continue
            # a file numbers its own shapes, the index those of all
            shape = numbers(file.get_tensor("shape"), len(captions), len(shapes_here))
            shape_numbers = np.array([shapes.setdefault(s, len(shapes)) for s in shapes_here], np.int16)
            prompt_numbers = []
            for caption in captions:
                some = [prompts.setdefault(text, len(prompts)) for text in chosen(caption, choice)]
                prompt_numbers.append(some[0])
                if len(some) > 1:
                    several[number] = some
                number += 1
                lines += "\n" in caption
            columns["shape"].append(shape_numbers[shape])
            columns["row"].append(_rows(shape))
            columns["prompt"].append(np.array(prompt_numbers, np.int32))
            columns["sizes"].append(file.get_tensor("sizes").reshape(len(captions), 6))
            spread = spread or any(key.startswith("std") for key in file.keys())  # noqa: SIM118 (no dict)

    table = {key: np.concatenate(c) if c else np.zeros(0, np.int32) for key, c in columns.items()}
    sizes = table.pop("sizes")
    if listed and len(sizes):
        buckets.check_filled(sizes[:, 1] / sizes[:, 0])
    notes = bucket_notes(sizes) if buckets and len(sizes) else []
    if lines:
        notes.append(f"{lines} of the {number} samples have several captions (lines, or a list): {CHOICES[choice]}")
    if strange:
        notes.append(
            f"{strange} of the {number} pictures have a colour profile that is damaged or of other colours than the "
            "picture: they are taken as sRGB"
        )
    if several:
        places = np.cumsum([0, *map(len, several.values())])
        table |= zip(SEVERAL, (np.array(list(several)), places, np.concatenate(list(several.values()))), strict=True)

    lists = {"files": files, "shapes": list(shapes), "skipped": skipped, "notes": notes}
    facts = {key: json.dumps(value) for key, value in lists.items()} | {"spread": "yes" if spread else "no"}
    table["first"] = np.cumsum(counts)[:-1] if files else np.zeros(0, np.int64)
    # the texts first: where the index is there, they are, too
    _write_texts(folder / TEXTS, prompts)
    _write(folder / INDEX, table, facts)


def _rows(shape: np.ndarray) -> np.ndarray:
    """(n,) the row of each sample among those of its own shape. shape: (n,) the number of each one's shape."""
    rows = np.empty(len(shape), np.int16)
    for number in np.unique(shape):
        same = shape == number
        rows[same] = np.arange(same.sum())
    return rows


def _write_texts(path: Path, prompts: Iterable[str]) -> None:
    """Write the prompts, and by their hashes, in order, the number of each.

    Encodings that are there and go by other numbers are deleted.
    """
    texts = [prompt.encode() for prompt in prompts]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    hashes = np.array([hashes_of(prompt) for prompt in prompts])
    order = np.argsort(hashes[:, 0], kind="stable")
    text = np.frombuffer(b"".join(texts) or b"\0", np.uint8)  # safetensors holds no tensor of nothing

    table = {
        "text": text,
        "offset": offsets,
        "hash": hashes[order, 0],
        "second": hashes[order, 1],
        "number": order.astype(np.int32),
    }
    if not _holds(path, table):
        for encodings in path.parent.glob(PROMPTS):  # which go by the prompts' numbers
            encodings.unlink()
    _write(path, table, {})


def _holds(path: Path, table: dict[str, np.ndarray]) -> bool:
    """Whether the file is there and holds these columns."""
    if not path.is_file():
        return False
    with reading(path), open_file(path) as file:
        return all(np.array_equal(file.get_tensor(key), column) for key, column in table.items())


def _write(path: Path, table: dict[str, np.ndarray], facts: dict[str, str]) -> None:
    """Write columns and facts as a safetensors file."""
    write_tensors(path, {key: torch.from_numpy(np.array(column)) for key, column in table.items()}, facts)


def texts_of(folder: Path, start: int, end: int) -> Iterator[str]:
    """The prompts of a cache with these numbers."""
    with reading(folder / TEXTS), open_file(folder / TEXTS) as file:
        offsets = file.get_slice("offset")[start : end + 1].tolist()
        text = file.get_slice("text")[offsets[0] : offsets[-1]].tobytes()
        pieces = (text[a - offsets[0] : b - offsets[0]] for a, b in zip(offsets, offsets[1:], strict=False))
        return iter([piece.decode() for piece in pieces])


def count_texts(folder: Path) -> int:
    """How many prompts a cache has."""
    with reading(folder / TEXTS), open_file(folder / TEXTS) as file:
        return file.get_slice("number").get_shape()[0]
