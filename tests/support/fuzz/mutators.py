"""What every kind of file's mutators share: the table of them, what is drawn from it, and damage that befalls any file.

A mutator takes a random generator and a whole file of its kind, and returns the bytes of a damaged or odd one. Those
that are registered as `same` change nothing that matters: what is read of the file must stay what it was.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

DEEP = 100_000  # levels of nesting, or keys


class Mutant(NamedTuple):
    """A mutated file. kind: its mutator's name. whole: what it was made of. same: whether it must be read as that."""

    kind: str
    data: bytes
    whole: bytes
    same: bool = False


@dataclass(frozen=True)
class Target:
    """draw: a mutant for this generator. read: the mutant -> what it is read as, comparable; raises where it is
    refused. names: one of these must be in what is said. share: of the inputs, relative to the others."""

    draw: Callable[[random.Random], Mutant]
    read: Callable[[Mutant], Any]
    names: tuple[str, ...]
    share: float = 1.0


class Mutators(dict):
    """Mutators of one kind of file by name. whole: what the file is to them -> its bytes."""

    def __init__(self, whole: Callable):
        super().__init__()
        self.whole = whole
        self.rare: set[str] = set()
        self.same: set[str] = set()
        for damage in (flipped, spliced, cut):
            self[damage.__name__] = lambda rng, file, damage=damage: damage(rng, whole(file))
        self["other_file"] = lambda rng, file: other_file(rng)

    def add(self, mutator: Callable | None = None, *, same: bool = False, rare: bool = False) -> Callable:
        """A decorator. rare: for one that takes long, and is drawn a tenth as often."""
        if mutator is None:
            return lambda function: self.add(function, same=same, rare=rare)
        self[mutator.__name__] = mutator
        self.same |= {mutator.__name__} if same else set()
        self.rare |= {mutator.__name__} if rare else set()
        return mutator

    def draw(self, rng: random.Random, file) -> Mutant:
        """One of them at random, of this file."""
        name = rng.choices(list(self), [0.1 if name in self.rare else 1 for name in self])[0]
        return Mutant(name, self[name](rng, file), self.whole(file), name in self.same)


def cut(rng: random.Random, data: bytes) -> bytes:
    """Its beginning alone."""
    return data[: rng.randrange(len(data))]


def flipped(rng: random.Random, data: bytes) -> bytes:
    """Some bits, mostly near the beginning."""
    data, end = bytearray(data), rng.choice((64, 1024, len(data)))
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(min(end, len(data)))] ^= 1 << rng.randrange(8)
    return bytes(data)


def other_file(rng: random.Random) -> bytes:
    """Nothing, noise, and the beginnings of other kinds of file; of EPS, too, for which some readers run a program."""
    kinds = [b"", b"\0" * 8, rng.randbytes(300), b"PK\x03\x04" + bytes(30), b"\x80\x02ctorch\n", b"GGUF" + bytes(99)]
    kinds += [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n%%EOF\n", b"<svg/>", b"<html>"]
    kinds += [
        b"cos\nsystem\n(S'true'\ntR.",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"{}",
        b"GIF89a" + bytes(20),
    ]
    return rng.choice(kinds)


def spliced(rng: random.Random, data: bytes) -> bytes:
    """A piece doubled, cut out, or zeroed."""
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:a] + rng.choice((data[a:b] * 2, b"", bytes(b - a))) + data[b:]
