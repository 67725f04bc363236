"""Reading a finished cache: nothing is held in memory but a few numbers for each sample.

Files of a cache, all safetensors: `latents-<part>-<piece>` with up to `SHARD` samples each,
`prompts-<number>` with the encodings of up to `SHARD` prompts, `texts` with the prompts themselves, and
`index`, which says where each sample is.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...samplers.texts import brief

# The version of the files' layout. It is part of the fingerprint, so a cache of another one is never read.
FORMAT = 3
SHARD = 256  # most samples, or prompts, of a file
LATENTS = re.compile(r"latents-\d+-\d+(-last)?\.safetensors")
INDEX, TEXTS, PROMPTS = "index.safetensors", "texts.safetensors", "prompts-*.safetensors"
# Columns of the index, where samples have several captions: see `Captions`.
SEVERAL = ("several", "several.first", "several.prompt")
# How many files of a cache are kept open; each is mapped into memory.
OPEN = 128


class LatentCache:
    """The cached samples of one run: `captions`, and latents, sizes and encodings by the sample's number or the prompt.

    skipped: a line for each item that was left out. notes: sentences on what was done to the others. Both are
    those given and the index's own. Reads are safe from several threads. Raises ValueError for a file that is
    damaged.
    """

    def __init__(self, folder: Path, skipped: Iterable[str] = (), notes: Iterable[str] = ()):
        self.folder = folder
        self._open = OpenFiles(folder)
        self.prompts = Texts(folder)
        with reading(folder / INDEX), open_file(folder / INDEX) as index:
            facts = index.metadata()
            self._files, self._shapes = strings(facts["files"]), strings(facts["shapes"])
            self.skipped = [*skipped, *strings(facts["skipped"])]
            self.notes = [*notes, *strings(facts["notes"])]
            self._spread = facts["spread"] == "yes"
            self._first = index.get_tensor("first")  # by file, the number of its first sample
            self._shape = index.get_tensor("shape")  # by sample, as the following
            self._row = index.get_tensor("row")
            self._prompt = index.get_tensor("prompt")
            self._check()
            several = [index.get_tensor(key) for key in SEVERAL] if SEVERAL[0] in index.keys() else None  # noqa: SIM118
            self.captions = Captions(self.prompts, self._prompt, several)
        self._more: dict[str, dict[str, Tensor]] = {}

    def _check(self) -> None:
        """Raise ValueError where the index leads to what is not there."""
        count = len(self._row)
        numbers(self._shape, count, len(self._shapes))
        numbers(self._row, count, SHARD)
        numbers(self._prompt, count, len(self.prompts))
        numbers(self._first, len(self._files), count + 1)
        if not all(LATENTS.fullmatch(name) for name in self._files):
            raise ValueError("it lists files of other names")
        if (np.diff(self._first) < 0).any() or self._first[:1].any() or (count and not self._files):
            raise ValueError("its files do not follow each other")

    def __len__(self) -> int:
        return len(self._row)

    @cached_property
    def buckets(self) -> list[NDArray]:
        """The numbers of the samples of each latent shape that has any."""
        by_shape = [np.flatnonzero(self._shape == shape).astype(np.int32) for shape in range(len(self._shapes))]
        return [samples for samples in by_shape if len(samples)]

    def latents(self, indices: Iterable[int], generators: Iterable[torch.Generator]) -> Tensor:
        """(B, C, h, w) latents of one shape in fp32.

        Each is drawn from its VAE's posterior by its own generator, where the posterior has a spread.
        """
        rows = []
        for index, generator in zip(indices, generators, strict=True):
            shape, row = self._shapes[self._shape[index]], int(self._row[index])
            with self._reading(index) as file:
                latent = torch.from_numpy(file.get_slice(f"mean.{shape}")[row]).float()
                if self._spread:
                    spread = torch.from_numpy(file.get_slice(f"std.{shape}")[row]).float()
                    latent = latent + spread * torch.randn(latent.shape, generator=generator)
                if "x".join(map(str, latent.shape[1:])) != shape or rows and latent.shape != rows[0].shape:
                    raise ValueError(f"the latents {shape} are of {tuple(latent.shape)}")
            rows.append(latent)
        return torch.stack(rows)

    def sizes(self, indices: Iterable[int]) -> Tensor:
        """(B, 6) the sizes of each sample's picture, as `load_picture` gives them."""
        rows = []
        for index in indices:
            with self._reading(index) as file:
                rows.append(numbers(file.get_slice("sizes")[int(index - self._first[self._shard(index)])], 6))
        return torch.from_numpy(np.stack(rows))

    def encoding(self, prompts: Iterable[str]) -> dict[str, Tensor]:
        """Prompt encodings (B, ...) in fp32; the prompts must have been cached or added."""
        rows = [self._encoded(prompt) for prompt in prompts]
        with reading(self.folder / PROMPTS):
            return {key: torch.stack([row[key].float() for row in rows]) for key in rows[0]}

    def add_prompts(self, prompts: list[str], encoded: dict[str, Tensor]) -> None:
        """Know the encodings of prompts that are no sample's (a preview's) too, without writing them down."""
        self._more |= {p: {k: v[i] for k, v in encoded.items()} for i, p in enumerate(prompts)}

    def _encoded(self, prompt: str) -> dict[str, Tensor]:
        """The encoding of one prompt, cached or added, as it was stored."""
        number = self.prompts.find(prompt)
        if number is None:
            return self._more[prompt]
        shard, row = divmod(number, SHARD)
        file = self._open.get(prompts_name(shard))
        with reading(self.folder / prompts_name(shard)):
            return {key: torch.from_numpy(file.get_slice(key)[row]) for key in file.keys()}  # noqa: SIM118 (no dict)

    def _shard(self, index: int) -> int:
        """The number of a sample's file: of the last that begins at it or before."""
        return int(np.searchsorted(self._first, index, side="right")) - 1

    @contextmanager
    def _reading(self, index: int) -> Iterator[safe_open]:
        """A sample's file, open; where the block fails, this file is called damaged."""
        name = self._files[self._shard(index)]
        file = self._open.get(name)
        with reading(self.folder / name):
            yield file


class Texts(Sequence):
    """The prompts of a cache, each once, in the order in which they first came; the empty one is the first.

    They stay on disk: the file is opened anew for each, so that the process holds no mapped pages of it.
    """

    def __init__(self, folder: Path):
        self._path = folder / TEXTS
        with reading(self._path), open_file(self._path) as file:
            # three columns, sorted by the first hash: both of `hashes_of`, and the prompt's number
            self._hashes, self._second, self._numbers = map(file.get_tensor, ("hash", "second", "number"))
            for column in (self._hashes, self._second, self._numbers):
                numbers(column, len(self._hashes))
            numbers(self._numbers, below=len(self))

    def __len__(self) -> int:
        return len(self._hashes)

    def __getitem__(self, number: int) -> str:
        number = range(len(self))[number]
        with reading(self._path), open_file(self._path) as file:
            start, end = file.get_slice("offset")[number : number + 2].tolist()
            return file.get_slice("text")[start:end].tobytes().decode()

    def find(self, text: str) -> int | None:
        """The number of a prompt, or None."""
        first, second = hashes_of(text)
        start, end = (int(np.searchsorted(self._hashes, first, side)) for side in ("left", "right"))
        return next((int(self._numbers[at]) for at in range(start, end) if self._second[at] == second), None)


class Captions(Sequence):
    """The caption of each sample, the first where it has several.

    numbers: (N,) which of the prompts it is. several: the samples (K,) that have several captions, ascending; the
    place (K + 1,) of the first caption of each, and the end, among the third: (M,) which prompts these captions are.
    Raises ValueError for columns that do not fit each other.
    """

    def __init__(self, prompts: Texts, numbers: NDArray, several: Sequence[NDArray] | None = None):
        self._prompts, self.numbers = prompts, numbers
        none = np.zeros(0, np.int64)
        self._several, self._first, self._choices = several or (none, np.zeros(1, np.int64), none)
        self._check()

    def _check(self) -> None:
        numbers(self._several, below=len(self.numbers))
        numbers(self._first, len(self._several) + 1, len(self._choices) + 1)
        numbers(self._choices, below=len(self._prompts))
        if (np.diff(self._first) < 1).any() or self._first[0] or self._first[-1] != len(self._choices):
            raise ValueError("its captions do not follow each other")

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> str:
        return self._prompts[int(self.numbers[index])]

    def drawn(self, index: int, seed: int) -> str:
        """The caption of a sample that this seed draws where it has several, of which each is as likely."""
        at = int(np.searchsorted(self._several, index))
        if at == len(self._several) or self._several[at] != index:
            return self[index]
        first, end = map(int, self._first[at : at + 2])
        return self._prompts[int(self._choices[first + seed % (end - first)])]

    @cached_property
    def groups(self) -> NDArray:
        """(N,) a number for each sample, the same for all that share a caption, also by way of a third one."""
        if not len(self._several):
            return self.numbers
        owners = np.repeat(self._several, np.diff(self._first))
        samples = np.concatenate([np.arange(len(self)), owners])
        prompts = np.concatenate([self.numbers, self._choices])

        groups = np.arange(len(self))
        while True:
            least = np.full(len(self._prompts), len(self))
            np.minimum.at(least, prompts, groups[samples])
            lower = groups.copy()
            np.minimum.at(lower, samples, least[prompts])
            if np.array_equal(lower, groups):
                return groups
            groups = lower


class OpenFiles:
    """The safetensors files of a folder, of which the last used stay open."""

    def __init__(self, folder: Path, most: int = OPEN):
        self.folder, self.most = folder, most
        self._files: dict[str, safe_open] = {}
        self._lock = Lock()

    def get(self, name: str) -> safe_open:
        """A file by name, open for as long as the caller holds it."""
        with self._lock:
            file = self._files.pop(name, None) or open_file(self.folder / name)
            self._files[name] = file  # to the end, the last used
            if len(self._files) > self.most:
                del self._files[next(iter(self._files))]
            return file


def open_file(path: Path) -> safe_open:
    """Open a cache's file, whose tensors are then read as numpy arrays. Raises ValueError for a damaged one."""
    with reading(path):
        return safe_open(path, "np")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise ValueError that names this file of a cache as damaged, where the block fails at its content."""
    try:
        yield
    except Damaged:
        raise
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise Damaged(f"{path} is damaged ({brief(error)}). Delete it: the same command makes it again.") from error


class Damaged(ValueError):
    """A cache's file is damaged; the message says which, and what to do. Raised by `reading`."""


def strings(text: str) -> list[str]:
    """A JSON list of strings. Raises ValueError for anything else."""
    entries = json.loads(text)
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError("a list of strings is something else")
    return entries


def numbers(column: NDArray, count: int | None = None, below: int | None = None) -> NDArray:
    """The column, if it is one of `count` whole numbers from 0 to `below` - 1; None: of any count, or any size.

    Raises ValueError for anything else.
    """
    if column.ndim != 1 or column.dtype.kind != "i" or (count is not None and len(column) != count):
        expected = "" if count is None else f"{count} "
        raise ValueError(f"{expected}whole numbers are {column.dtype} of shape {column.shape}")
    if below is not None and len(column) and not 0 <= column.min() <= column.max() < below:
        raise ValueError(f"numbers below {below} are {column.min()} to {column.max()}")
    return column


def prompts_name(number: int) -> str:
    """The file with the encodings of the prompts from number * SHARD on."""
    return PROMPTS.replace("*", f"{number:05d}")


def hashes_of(text: str) -> tuple[int, int]:
    """Two signed 64-bit hashes; together they tell any two texts apart."""
    return struct.unpack("<qq", hashlib.blake2b(text.encode(), digest_size=16).digest())
