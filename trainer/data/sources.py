"""The sources of a run's samples, and what tells them from others: a folder, drawn digits, or webdataset shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ..config.config import Config
from ..tiny.digits import NAME as DIGITS
from ..tiny.digits import Digit, drawn_digits
from .buckets import Buckets
from .decoding import aspect_of
from .folders import Folder, Picture, find_pictures
from .reading import ahead, file_hashes, stop_or_skip
from .shards import Sample, check_end, list_shards, local_path, read_shard, remote_identity, shard_name
from .store import SHARD

# The file, in the folder of caches, with the hashes of files that were read before.
HASHES = "hashes.json"


class Part(NamedTuple):
    """A share of the data that is cached by itself.

    items: called for its pictures. start, length: of what progress counts, its first and how many.
    """

    items: Callable[[], Iterable[Picture | Digit | Sample]]
    start: int
    length: int


@dataclass(frozen=True)
class Source:
    """Pictures to be cached.

    what: the word for what progress counts. name: of all together, for messages. identity: JSON-ready,
    differs where any of them does. skipped: a line for each that is known to be left out. notes: sentences to
    be told.
    """

    what: str
    name: str
    parts: Sequence[Part]
    identity: list[Any]
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """How many there are of what progress counts."""
        return self.parts[-1].start + self.parts[-1].length


def open_source(config: Config, buckets: Buckets | None, write: bool) -> Source:
    """The pictures that `data.images` or `data.shards` names. write: whether to remember the files' hashes.

    Raises ValueError for what is missing, bad captions (both unless `data.skip_bad`) and listed buckets that
    none of a folder's pictures fits.
    """
    data, known = config.data, config.cache_folder / HASHES
    if data.shards:
        return _shards(list_shards(data.shards), known, data.workers, data.skip_bad, write)

    pictures, skipped, notes = pictures_of(config)
    files = [p.path for p in pictures if isinstance(p, Picture)]
    if isinstance(data.buckets, tuple):
        buckets.check_filled(aspect for aspect in ahead(aspect_of, files, data.workers) if aspect)
    contents = file_hashes(files, known, data.workers, write) if files else [p.content() for p in pictures]
    identity = [(content, p.caption) for content, p in zip(contents, pictures, strict=True)]
    shares = [pictures[at : at + SHARD] for at in range(0, len(pictures), SHARD)]
    parts = [Part(partial(iter, share), number * SHARD, len(share)) for number, share in enumerate(shares)]
    name = f"the {len(pictures)} pictures in {data.images}"
    return Source("pictures", name, parts, identity, skipped, notes)


def _shards(shards: list[str], known: Path, workers: int, skip_bad: bool, write: bool) -> Source:
    """Shards here and far away. known: file of the remembered hashes. Raises as `open_source`."""
    paths = {shard: path for shard in shards if (path := local_path(shard))}
    here = {shard: path for shard, path in paths.items() if path.is_file()}
    hashes = dict(zip(here, file_hashes(list(here.values()), known, workers, write), strict=True))
    remote = [shard for shard in shards if shard not in paths]
    answers = dict(zip(remote, ahead(remote_identity, remote, workers), strict=True))

    bad = absent(shards)
    bad += [f"{shard_name(shard)}: {problem}" for shard, (_, problem) in answers.items() if problem]
    if not skip_bad:
        bad += [f"{shard_name(shard)}: {problem}" for shard in here if (problem := check_end(shard))]
    stop_or_skip(bad, skip_bad, f"{len(bad)} of the {len(shards)} shards in data.shards cannot be read")
    good = [s for s in shards if s in here or (s in answers and not answers[s][1])]
    if not good:
        raise ValueError(f"None of the {len(shards)} shards in data.shards can be read: {'; '.join(bad[:10])}.")

    identity = [(shard_name(s), hashes[s]) if s in here else _remote(s, answers[s][0]) for s in good]
    silent = sum(not answers[shard][0] for shard in good if shard in answers)
    notes = [
        f"{silent} of the {len(shards)} shards are known by their addresses alone, as their servers tell no ETag or "
        "length: if one changes under its address, delete the cache"
    ]
    parts = [Part(partial(read_shard, shard), at, 1) for at, shard in enumerate(good)]
    name = f"the samples of the {len(good)} shards in data.shards"
    return Source("shards", name, parts, identity, bad, notes if silent else [])


def _remote(shard: str, answer: str) -> tuple[str, str]:
    """A remote shard's part of the identity: its address, and what its server answers.

    With an answer the address goes without its query, which may be signed anew for every run.
    """
    return (urlsplit(shard)._replace(query="").geturl() if answer else shard), answer


def absent(shards: Iterable[str]) -> list[str]:
    """A line for each shard that is a file and is not there."""
    return [f"{shard}: no such file" for shard in shards if (path := local_path(shard)) and not path.is_file()]


def pictures_of(config: Config) -> Folder:
    """The pictures that `data.images` names: drawn digits, `data.count` of them, or a folder's.

    Raises ValueError where the word for the drawn ones is a folder's name too, and as `find_pictures`.
    """
    images = config.data.images
    if images == DIGITS and Path(images).is_dir():
        raise ValueError(
            f"data.images={images} means drawn digits, and a folder is called so: for that write ./{images}."
        )
    if images == DIGITS:
        return Folder(drawn_digits(config.data.count), [], [])
    return find_pictures(images, config.data.skip_bad, config.places_of_results)
